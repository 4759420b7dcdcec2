"""The optimizers of `optim.groups`, their state spread over the ranks (ZeRO-2, arXiv 1910.02054).

Every rank has all weights and adds up gradients of its own rows. At the end of a step the gradients
are summed, each rank updates what it owns and hands the result to the others:

- a tensor of AdamW's is cut into equal ranges, one per rank (reduce-scatter, update, all-gather);
- a matrix of Muon's belongs to one rank as a whole, because it is orthogonalised as a whole
  (reduce, update, broadcast); owners are chosen so that the work is even;
- a tensor of less than SMALL numbers is summed everywhere and updated by all.

No size has to be divisible by the number of ranks. Saved state is whole tensors by parameter name,
so that any other number of ranks, one among them, can go on with it. Used by `train.loop`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fledge.dist import World
from fledge.optim.groups import LearningRates, Optimizers

SMALL = 1024


class ShardedOptimizers(Optimizers):
    """Muon and AdamW over one model in a world of several processes."""

    def __init__(self, model: nn.Module, rates: LearningRates, world: World) -> None:
        super().__init__(model, rates)
        self.world = world
        self.ranges: dict[Tensor, Tensor] = {}  # parameter -> this rank's range of it, a view
        self.owners: dict[Tensor, int] = {}  # matrix -> rank
        self._own_ranges()
        self._own_matrices()

    def _own_ranges(self) -> None:
        for group in self.adamw.param_groups:
            mine = []
            for parameter in group["params"]:
                if parameter.numel() < SMALL:
                    mine.append(parameter)
                    continue
                chunk = -(-parameter.numel() // self.world.size)
                start = min(parameter.numel(), self.world.rank * chunk)
                part = parameter.detach().view(-1)[start : start + chunk]
                self.ranges[parameter] = part
                mine.append(part)
            group["params"] = mine

    def _own_matrices(self) -> None:
        """The largest first, each to the rank that has least to do."""
        work = [0] * self.world.size
        for group in self.muon.param_groups:
            order = sorted(group["params"], key=lambda p: -p.numel() * min(p.shape[-2:]))
            for parameter in order:
                owner = work.index(min(work))
                self.owners[parameter] = owner
                work[owner] += parameter.numel() * min(parameter.shape[-2:])
            group["params"] = [p for p in group["params"] if self.owners[p] == self.world.rank]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sums the gradients of all ranks; each then has the sums of what it updates."""
        for parameter in self.names:
            gradient = parameter.grad
            if gradient is None:
                gradient = parameter.grad = torch.zeros_like(parameter)
            if parameter in self.owners:
                self.world.sum_to(gradient, self.owners[parameter])
            elif parameter in self.ranges:
                part = self.ranges[parameter]
                padded = self._padded(gradient)
                out = padded.new_empty(padded.numel() // self.world.size)
                self.world.scatter_sum(out, padded)
                part.grad = out[: part.numel()]
            else:
                self.world.sum_(gradient)

    def _padded(self, tensor: Tensor) -> Tensor:
        """The tensor as a row whose length the number of ranks divides."""
        flat = tensor.view(-1)
        extra = -flat.numel() % self.world.size
        return torch.cat([flat, flat.new_zeros(extra)]) if extra else flat

    def gradient_norm(self) -> float:
        """As of one process, after `reduce_gradients`; every part is counted once."""
        total = 0.0
        for parameter in self.names:
            gradient = parameter.grad
            if parameter in self.owners:
                gradient = gradient if self.owners[parameter] == self.world.rank else None
            elif parameter in self.ranges:
                gradient = self.ranges[parameter].grad
            elif self.world.rank != 0:
                gradient = None
            if gradient is not None:
                total += gradient.double().square().sum().item()
        return self.world.sum_number(total, next(iter(self.names)).device) ** 0.5

    @torch.no_grad()
    def step(self) -> None:
        """Updates what this rank owns, then spreads it; gradients are zero after it."""
        for optimizer in self.all:
            optimizer.step()
        for parameter, owner in self.owners.items():
            self.world.copy_from(parameter.data, owner)
        for parameter, part in self.ranges.items():
            whole = self._gathered(part, parameter.numel())
            parameter.view(-1).copy_(whole)
        self.zero_grad()

    def _gathered(self, part: Tensor, size: int) -> Tensor:
        """The whole row of `size` numbers of which every rank has a range."""
        chunk = -(-size // self.world.size)
        mine = part
        if part.numel() < chunk:
            mine = torch.cat([part, part.new_zeros(chunk - part.numel())])
        out = part.new_empty(chunk * self.world.size)
        self.world.gather(out, mine.contiguous())
        return out[:size]

    def zero_grad(self) -> None:
        """Gradients to zero, those of other ranks' parameters too."""
        for parameter in self.names:
            if parameter.grad is not None:
                parameter.grad.zero_()
        for part in self.ranges.values():
            part.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Whole tensors by name, as of one process. Collective; every rank gets all of it."""
        found: dict[str, Tensor] = {}
        for parameter, name in self.names.items():
            if parameter in self.owners:
                found |= self._matrix_state(parameter, name)
                continue
            part = self.ranges.get(parameter)
            state = self.adamw.state.get(parameter if part is None else part, {})
            for key, value in state.items():
                if part is not None and value.ndim:
                    value = self._gathered(value, parameter.numel()).view(parameter.shape)
                found[f"{name}/{key}"] = value.detach().cpu().contiguous()
        return found

    def _matrix_state(self, parameter: Tensor, name: str) -> dict[str, Tensor]:
        across = -1 if parameter.shape[-2] >= parameter.shape[-1] else -2
        shapes = {"momentum_buffer": parameter, "row_variance": parameter.mean(across, True)}
        found = {}
        for key, like in shapes.items():
            own = self.muon.state.get(parameter, {}).get(key)
            exists = self.world.sum_number(0.0 if own is None else 1.0, parameter.device)
            if exists:
                value = torch.empty_like(like) if own is None else own.clone()
                self.world.copy_from(value, self.owners[parameter])
                found[f"{name}/{key}"] = value.detach().cpu().contiguous()
        return found

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse; every rank keeps its share."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        for full_name, tensor in tensors.items():
            name, key = full_name.rsplit("/", 1)
            parameter = by_name[name]
            value = tensor.clone().to(parameter.device)
            if parameter in self.owners:
                if self.owners[parameter] == self.world.rank:
                    self.muon.state[parameter][key] = value
                continue
            part = self.ranges.get(parameter)
            if part is not None and value.ndim:
                start = part.storage_offset() - parameter.storage_offset()
                value = value.view(-1)[start : start + part.numel()].clone()
            self.adamw.state[parameter if part is None else part][key] = value
