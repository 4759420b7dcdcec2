"""What a training step is measured by: the row that goes into metrics.jsonl.

Called by `train.loop`. Values that depend on the clock or the machine are named in
`runlog.TIMING_KEYS`, so that two runs can be compared without them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

Row = dict[str, float]  # one row of metrics: "step" and what was measured


@dataclass(frozen=True)
class Speed:
    """What turns tokens per second into a share of the machine."""

    flops_per_token: float
    """Of the forward and backward pass."""
    peak_flops: float
    """Of all devices together: what a matrix product reaches, or the maker's figure."""


def peak_memory_bytes() -> int:
    """The most memory this process held so far: of the GPU where there is one, else of the host."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def timing(
    *, tokens: int, seconds: float, waited: float, steps_left: int, speed: Speed | None
) -> Row:
    """The part of a row that depends on the clock: rate, waiting for data, time left, MFU, memory.

    MFU: model FLOPs utilisation, the share of the machine's peak that the useful arithmetic of the
    step reaches (PaLM, arXiv 2204.02311).
    """
    row: Row = {
        "seconds": seconds,
        "data_seconds": waited,
        "tokens_per_second": tokens / seconds,
        "eta": steps_left * seconds,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if speed is not None:
        row["mfu"] = tokens / seconds * speed.flops_per_token / speed.peak_flops
    return row
