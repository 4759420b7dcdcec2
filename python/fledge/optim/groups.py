"""Which optimizer trains which parameter, and their state by parameter name.

`Optimizers` joins Muon (matrices of the blocks) and AdamW (embedding, head, norms) behind one
`step`, one learning-rate factor and one flat state dict, which `train.checkpoint` writes. Used by
`train.loop` and `train.rl`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fledge.optim.muon import Muon


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates and decay; `scaled` gives a later stage its share."""

    matrix_lr: float
    embed_lr: float
    head_lr: float
    norm_lr: float
    weight_decay: float

    @classmethod
    def of(cls, section: Any) -> LearningRates:
        """Those of anything that has them as attributes, such as a planned [base]."""
        return cls(*(getattr(section, field.name) for field in fields(cls)))

    def scaled(self, share: float) -> LearningRates:
        """The rates times `share`; the decay is multiplied by the rate anyway."""
        names = ("matrix_lr", "embed_lr", "head_lr", "norm_lr")
        return replace(self, **{name: getattr(self, name) * share for name in names})


class Optimizers:
    """Muon and AdamW over one model, stepped together."""

    def __init__(self, model: nn.Module, rates: LearningRates) -> None:
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        matrices, embed, head, norms = [], [], [], []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and name.startswith("model.layers."):
                matrices.append(parameter)
            elif "embed_tokens" in name:
                embed.append(parameter)
            elif "lm_head" in name:
                head.append(parameter)
            else:
                norms.append(parameter)
        self.muon = Muon(matrices, lr=rates.matrix_lr, weight_decay=rates.weight_decay)
        adam_groups = [
            {"params": embed, "lr": rates.embed_lr},
            {"params": head, "lr": rates.head_lr},
            {"params": norms, "lr": rates.norm_lr},
        ]
        # betas and eps of nanochat's AdamW groups (92d63d4); no decay on embeddings and norms
        self.adamw = torch.optim.AdamW(
            [g for g in adam_groups if g["params"]],
            betas=(0.8, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=True,
        )
        self.all = (self.muon, self.adamw)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def set_lr(self, factor: float) -> None:
        """Every group's learning rate = its peak x factor."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor

    def step(self) -> None:
        """One update from the gradients, which are then dropped."""
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

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
            state[key] = tensor.clone().to(parameter.device if tensor.ndim else "cpu")
