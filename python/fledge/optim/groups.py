"""Which optimizer trains which parameter, and their state by parameter name.

`Optimizers` joins Muon (matrices of the blocks) and AdamW (embeddings, head, norms, scalars) behind
one `step`, one schedule and one flat state dict, which `train.checkpoint` writes. Used by
`train.loop` and `train.rl`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fledge.optim.adamw import AdamW
from fledge.optim.muon import Muon
from fledge.optim.schedule import Schedule


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates and decay; `scaled` gives a later stage its share."""

    matrix_lr: float
    embed_lr: float
    head_lr: float
    norm_lr: float
    weight_decay: float
    row_variance: float = 0.0
    adamw: str | None = None
    """"2025" or "2026": whose AdamW groups; None = those of the model's arch."""

    @classmethod
    def of(cls, section: Any) -> LearningRates:
        """Those of anything that has them as attributes, such as a planned [base]."""
        return cls(*(getattr(section, field.name) for field in fields(cls)))

    def scaled(self, share: float) -> LearningRates:
        """The rates times `share`; the decay is multiplied by the rate anyway."""
        names = ("matrix_lr", "embed_lr", "head_lr", "norm_lr")
        return replace(self, **{name: getattr(self, name) * share for name in names})


@dataclass(frozen=True)
class AdamGroup:
    """AdamW's settings of one kind of parameter: rate = share x the rate named `lr`."""

    lr: str
    share: float = 1.0
    betas: tuple[float, float] = (0.8, 0.95)
    weight_decay: float = 0.0


ADAM_GROUPS = {
    "embed": AdamGroup("embed_lr"),
    "head": AdamGroup("head_lr"),
    "norm": AdamGroup("norm_lr"),
}
"""Of Qwen3: betas and eps of nanochat's first AdamW groups, no decay."""

SPEEDRUN_GROUPS = {
    "embed": AdamGroup("embed_lr", 1.0, (0.8, 0.995), 0.001),
    "head": AdamGroup("head_lr", 1.0, (0.8, 0.96), 0.01),
    "norm": AdamGroup("norm_lr"),
    "value_embed": AdamGroup("embed_lr", 0.5, (0.8, 0.995), 0.01),
    "bigram_embed": AdamGroup("embed_lr", 1.0, (0.8, 0.995)),
    "residual": AdamGroup("norm_lr", 1.0, (0.8, 0.95), 0.05),
    "embedding": AdamGroup("norm_lr", 100.0, (0.96, 0.95)),
    "gate": AdamGroup("norm_lr", 40.0),
}
"""Of arch "speedrun": nanochat 2026 (gpt.py, 92d63d4) has 0.3, 0.008, -, 0.15, 0.005, 0.5 and 0.2;
the last three are kept in their proportion to norm_lr, whose planned value is 0.005 at depth.
bigram_embed is fledge's own: the embedding's rate and betas, and no decay, which a row that is
seldom met would lose all to."""


def adam_groups(arch: str, release: str | None) -> dict[str, AdamGroup]:
    """AdamW's groups of a network: by its arch, or those of a release of nanochat."""
    if arch != "speedrun":
        return ADAM_GROUPS
    if release != "2025":
        return SPEEDRUN_GROUPS
    return {kind: AdamGroup(group.lr, group.share) for kind, group in SPEEDRUN_GROUPS.items()}


def kind_of(name: str, parameter: Tensor) -> str:
    """Which group a parameter belongs to, by its name; "matrix" is Muon's."""
    if parameter.ndim >= 2 and name.startswith("model.layers."):
        return "matrix"
    for part, kind in (
        ("embed_tokens", "embed"),
        ("value_embeddings", "value_embed"),
        ("bigram_embeddings", "bigram_embed"),
        ("lm_head", "head"),
        ("residual_scalars", "residual"),
        ("embedding_scalars", "embedding"),
        ("bigram_scale", "embedding"),
        ("smear", "gate"),
        ("backout", "gate"),
    ):
        if part in name:
            return kind
    return "norm"


class Optimizers:
    """Muon and AdamW over one model, stepped together."""

    def __init__(self, model: nn.Module, rates: LearningRates) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        arch = getattr(getattr(model, "config", None), "arch", "qwen3")
        table = adam_groups(arch, rates.adamw)
        members: dict[str, list[Tensor]] = {kind: [] for kind in ("matrix", *table)}
        for parameter, name in self.names.items():
            members[kind_of(name, parameter)].append(parameter)
        self.muon = Muon(
            members["matrix"],
            lr=rates.matrix_lr,
            weight_decay=rates.weight_decay,
            beta2=rates.row_variance,
            products=getattr(model, "product_dtype", None),
        )
        self.adamw = AdamW(
            [
                {
                    "params": members[kind],
                    "lr": getattr(rates, group.lr) * group.share,
                    "betas": group.betas,
                    "weight_decay": group.weight_decay,
                }
                for kind, group in table.items()
                if members[kind]
            ],
            eps=1e-10,
        )
        self.all = (self.muon, self.adamw)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
                group["peak_decay"] = group["weight_decay"]

    def set_lr(self, factor: float) -> None:
        """Every group's learning rate = its peak x factor."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def follow(self, schedule: Schedule, step: int) -> None:
        """Rates, decay and momentum for the update that leads from `step` to `step + 1`."""
        self.set_lr(schedule.factor(step))
        for group in self.muon.param_groups:
            group["momentum"] = schedule.momentum(step)
            group["weight_decay"] = group["peak_decay"] * schedule.decay_factor(step)

    def reduce_gradients(self) -> None:
        """Makes gradients those of the whole batch; of one process they are."""

    def scale_gradients(self, factor: float) -> None:
        """Multiplies what this process will update from, after `reduce_gradients`."""
        if factor == 1.0:
            return
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together; not finite if one of them is not."""
        gradients = [p.grad for p in self.names if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0

    def step(self) -> None:
        """One update from the gradients, which are then zero."""
        for optimizer in self.all:
            optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Gradients to zero; their memory is kept."""
        for optimizer in self.all:
            optimizer.zero_grad()

    def forget(self) -> None:
        """Drops all state, as before the first step."""
        for optimizer in self.all:
            optimizer.state.clear()

    def state_tensors(self) -> dict[str, Tensor]:
        """Every state tensor under "parameter name/state name", whole, on the CPU."""
        return {
            f"{self.names[parameter]}/{key}": value.detach().cpu().contiguous()
            for optimizer in self.all
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; names that the model lacks are an error of ours."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {p: o for o in self.all for group in o.param_groups for p in group["params"]}
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = by_name[name]
            state = owner[parameter].state[parameter]
            # a copy: two optimizers must never share a buffer
            state[key] = tensor.clone().to(parameter.device)
