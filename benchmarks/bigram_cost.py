"""What the table of hashed pairs (`bigram_rows`) costs in a training step on this CPU.

    python benchmarks/bigram_cost.py            needs a quiet machine; about 40 s

Two networks of the quickstart's size (arch speedrun, depth 3, 4,096 words, T = 256, 4,096 tokens a
step), without and with a table of 32,768 rows, take steps in turns, so that a machine that slows
down slows both. A step is the pass, the gradients' norm, Muon and AdamW, and gradients back to
zero; what each of those takes is printed with the difference of the medians. Tokens have the
frequencies of words. The loader and the log are left out: the table does not touch them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.plan import scaling
from fledge.stages.pipeline import keep_freed_memory

VOCAB, CONTEXT, ROWS = 4096, 256, 16
PARTS = ("pass", "norm", "muon", "adamw", "zero")


class Subject:
    """One network, its optimizers, and the seconds of every part of every step."""

    def __init__(self, bigram_rows: int, dtype: str) -> None:
        config = scaling.model_config(
            3,
            vocab_size=VOCAB,
            arch="speedrun",
            max_seq_len=CONTEXT,
            extras={"bigram_rows": bigram_rows},
        )
        self.model = Transformer(config, seed=0).compute_in(dtype)
        self.optimizers = Optimizers(self.model, LearningRates(0.01, 0.1, 0.004, 0.001, 0.0, 0.9))
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def step(self, ids: torch.Tensor) -> None:
        weights = torch.full((ROWS, CONTEXT), 1 / (ROWS * CONTEXT))
        optimizers = self.optimizers
        calls = (
            lambda: self.model.add_gradients(ids[:, :-1], ids[:, 1:], weights),
            optimizers.gradient_norm,
            optimizers.muon.step,
            optimizers.adamw.step,
            optimizers.zero_grad,
        )
        for part, call in zip(PARTS, calls, strict=True):
            began = time.perf_counter()
            call()
            self.seconds[part].append(time.perf_counter() - began)

    def medians(self, warm: int) -> dict[str, float]:
        """Milliseconds of each part and of the whole step."""
        columns = {part: seconds[warm:] for part, seconds in self.seconds.items()}
        columns["step"] = [sum(row) for row in zip(*columns.values(), strict=True)]
        return {part: 1000 * statistics.median(seconds) for part, seconds in columns.items()}


def measure(dtype: str, rows: int, steps: int) -> None:
    """Prints a line per part: without, with, difference."""
    plain, with_table = Subject(0, dtype), Subject(rows, dtype)
    rng = np.random.default_rng(0)
    for step in range(steps):
        words = np.minimum(rng.zipf(1.2, size=(ROWS, CONTEXT + 1)), VOCAB) - 1
        ids = torch.from_numpy(words)
        for subject in (plain, with_table) if step % 2 else (with_table, plain):
            subject.step(ids)
    before, after = plain.medians(3), with_table.medians(3)
    tokens = ROWS * CONTEXT
    print(f"{dtype}, {rows:,} rows, medians of {steps - 3} steps in turns, ms")
    for part in (*PARTS, "step"):
        more = after[part] - before[part]
        share = 100 * more / before["step"]
        print(f"  {part:6} {before[part]:7.1f} {after[part]:7.1f} {more:+6.1f} = {share:+.1f} %")
    speeds = (1000 * tokens / m["step"] for m in (before, after))
    print("  tokens a second: {:,.0f} and {:,.0f}".format(*speeds), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=43)
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    keep_freed_memory()
    for dtype in ("bfloat16_products", "float32"):
        measure(dtype, wanted.rows, wanted.steps)


if __name__ == "__main__":
    main()
