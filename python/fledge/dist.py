"""One process or many: the only file that touches torch.distributed's process groups.

A process that torchrun (or anything that keeps its contract) started finds RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment; any other is a world of one, in which
every collective is nothing. NCCL joins GPUs, gloo joins CPUs. Used by `optim.sharded` and
`train.loop`. It never decides what is communicated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as process_group
from torch import Tensor

from fledge.errors import UserError


@dataclass(frozen=True)
class World:
    """Which of how many processes this is. Collectives must be called by all in one order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, in place, summed over all ranks."""
        if self.size > 1:
            process_group.all_reduce(tensor)
        return tensor

    def sum_number(self, number: float, device: torch.device | str = "cpu") -> float:
        """A number summed over all ranks in double precision."""
        if self.size == 1:
            return number
        return self.sum_(torch.tensor(number, dtype=torch.float64, device=device)).item()

    def scatter_sum(self, out: Tensor, parts: Tensor) -> None:
        """Sums `parts` [size x n] over the ranks; rank r gets part r of the sum in `out` [n]."""
        if self.size == 1:
            out.copy_(parts)
        elif hasattr(process_group, "reduce_scatter_single"):  # the name since torch 2.13
            process_group.reduce_scatter_single(out, parts)
        else:
            process_group.reduce_scatter_tensor(out, parts)

    def gather(self, out: Tensor, part: Tensor) -> None:
        """Puts the ranks' parts [n] side by side into `out` [size x n]."""
        if self.size == 1:
            out.copy_(part)
        elif hasattr(process_group, "all_gather_single"):
            process_group.all_gather_single(out, part)
        else:
            process_group.all_gather_into_tensor(out, part)

    def sum_to(self, tensor: Tensor, owner: int) -> None:
        """Sums a tensor over the ranks; only `owner` has the result."""
        if self.size > 1:
            process_group.reduce(tensor, dst=owner)

    def copy_from(self, tensor: Tensor, owner: int) -> None:
        """Overwrites a tensor by that of rank `owner`."""
        if self.size > 1:
            process_group.broadcast(tensor, src=owner)

    def share(self, count: int) -> slice:
        """Which of `count` rows of a global batch are this rank's; every row is somebody's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)


@contextmanager
def joined(device: str = "cpu") -> Iterator[World]:
    """The world of this process, by torchrun's contract; leaves it at the end.

    Raises UserError where the environment names a world but not the place to meet.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set",
            "a process of several must know its rank and where the others meet",
            "start it with torchrun, or unset WORLD_SIZE",
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    process_group.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    finally:
        process_group.destroy_process_group()
