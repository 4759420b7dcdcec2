"""One process or many: the only file that touches torch.distributed's process groups.

A process that torchrun (or anything that keeps its contract) started finds RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment; any other is a world of one, in which
every collective is nothing. NCCL joins GPUs, gloo joins CPUs; a second gloo group carries what
ranks tell each other and lets them wait for hours while one of them works alone. Used by
`optim.sharded`, `train.loop`, `evals` and `stages`. It never decides what is communicated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as process_group
from torch import Tensor

from fledge.errors import Interrupted, UserError

LONGEST_WAIT = timedelta(days=7)
"""For a rank that works alone: exams of a large model take hours. A rank that died is noticed by
whoever started it."""


@dataclass(frozen=True)
class World:
    """Which of how many processes this is. Collectives must be called by all in one order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None
    """The gloo group of `tell` and `wait`."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes what a run leaves behind."""
        return self.rank == 0

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank; anything that can be pickled."""
        if self.size == 1:
            return value
        told = [value]
        process_group.broadcast_object_list(told, src=0, group=self.control)
        return told[0]

    def all_of(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        process_group.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            process_group.barrier(group=self.control)

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

    def max_number(self, number: float, device: torch.device | str = "cpu") -> float:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64, device=device)
        process_group.all_reduce(found, op=process_group.ReduceOp.MAX)
        return found.item()

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

    def strided(self, count: int) -> range:
        """The same as every `size`-th of them, so that neighbours go to different ranks."""
        return range(self.rank, count, self.size)


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank ended; whoever started it will tell.

    By the words of gloo and of NCCL for a connection that the other side closed; any other error of
    theirs is one.
    """
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return isinstance(error, process_group.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


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
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {local_rank} of this machine has no GPU of its own",
                f"the machine has {torch.cuda.device_count()}",
                f"give --nproc {torch.cuda.device_count()}",
            )
        torch.cuda.set_device(local_rank)
    process_group.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        control = process_group.new_group(backend="gloo", timeout=LONGEST_WAIT)
        yield World(rank, size, local_rank, control)
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        raise Interrupted("another process of this run ended") from error
    finally:
        process_group.destroy_process_group()
