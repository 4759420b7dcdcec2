"""How much of this machine's matrix speed a training step reaches.

    python benchmarks/train_cpu.py --depth 4            results: benchmarks/train_cpu.md
    python benchmarks/train_cpu.py --depth 4 --profile  where the time goes

The network is nanochat's CPU shape (arch speedrun, all extras, no windows, vocabulary 32,768,
T = 512, 16,384 tokens a step), or what `--arch`, `--bigram-rows`, `--vocab`, `--context` and
`--batch` say, trained by `fledge.train.loop` on made-up tokens. After every step a float32 matrix
product of 2048^3 is timed, the best of a few, by torch and by the library that training uses here
(`fledge.products`); a step's ratio is its FLOP/s over that product's, so that a machine that slows
down slows both. On a machine that others use, `--cpu-clock --threads 1` compares processor time
with processor time.
FLOPs a token = 6 N + 12 n T L, with N the matrices and the head (nanochat's count, attention not
halved). Nothing about malloc is set outside: fledge's own `keep_freed_memory` runs, as in every
fledge run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bare_hooks import BareHooks

from fledge.data.loader import Loader
from fledge.model import ModelConfig, Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.plan import scaling
from fledge.products import multiply
from fledge.stages.pipeline import keep_freed_memory
from fledge.train.loop import Job, train

GEMM = 2048


def since_start() -> float:
    """Seconds since this process was started, imports included."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


class Zipf:
    """Documents of 200 to 1,200 made-up tokens with the frequencies of words."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def piece(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        ids = np.minimum(rng.zipf(1.2, size=rng.integers(200, 1200)), self.vocab - 1)
        return ids.astype(np.int32), np.ones(len(ids), dtype=np.uint8)


class Timing(BareHooks):
    """Hooks: after each step, the speed of a matrix product in the same minute."""

    def __init__(self, flops: float, clock: Callable[[], float]) -> None:
        self.flops = flops
        self.clock = clock
        self.since = clock()
        self.ratios: list[float] = []
        self.rows: list[dict] = []
        self.peaks: dict[str, list[float]] = {"torch": [], "own": []}
        self.own_ratios: list[float] = []
        self.first = 0.0
        self.a, self.b = torch.randn(2, GEMM, GEMM)
        self.c = torch.empty(GEMM, GEMM)

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def log(self, row: dict) -> None:
        self.first = self.first or since_start()
        step_seconds = row["step_seconds"] = self.clock() - self.since
        peak = self._product("torch", lambda: torch.mm(self.a, self.b, out=self.c))
        own = self._product("own", lambda: multiply(self.a, self.b, out=lambda: self.c))
        self.rows.append(row)
        self.ratios.append(row["tokens"] * self.flops / step_seconds / peak)
        self.own_ratios.append(row["tokens"] * self.flops / step_seconds / own)
        rate, ratio = row["tokens"] / step_seconds, self.ratios[-1]
        print(
            f"step {row['step']}: {step_seconds:.2f} s, {rate:,.0f} tokens/s, "
            f"product {peak / 1e9:.0f} GFLOP/s, ratio {ratio:.3f}; "
            f"own product {own / 1e9:.0f} GFLOP/s, ratio {self.own_ratios[-1]:.3f}",
            flush=True,
        )
        self.since = self.clock()

    def _product(self, name: str, call: Callable[[], object]) -> float:
        """FLOP/s of a product, the best of four calls."""
        seconds = []
        for _ in range(4):
            began = self.clock()
            call()
            seconds.append(self.clock() - began)
        self.peaks[name].append(2 * GEMM**3 / min(seconds))
        return self.peaks[name][-1]


def shape(wanted: argparse.Namespace) -> ModelConfig:
    """nanochat's network of `--depth --head-dim 64 --window-pattern L --max-seq-len 512`."""
    return scaling.model_config(
        wanted.depth,
        vocab_size=wanted.vocab,
        arch=wanted.arch,
        max_seq_len=wanted.context,
        head_dim=64,
        window_pattern="L",
        extras={"bigram_rows": wanted.bigram_rows} if wanted.bigram_rows else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, default=4, help="rows per forward pass")
    parser.add_argument("--arch", default="speedrun", choices=("speedrun", "qwen3"))
    parser.add_argument("--bigram-rows", type=int, default=0, help="rows of the table of pairs")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16384, help="tokens of a step")
    parser.add_argument("--dtype", default="float32", help="as hardware.dtype")
    parser.add_argument("--cpu-clock", action="store_true", help="processor time, not wall time")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    if wanted.batch % wanted.context:
        parser.error("--batch must be a multiple of --context")
    torch.set_num_threads(wanted.threads)
    keep_freed_memory()
    config = shape(wanted)
    counts = scaling.count(config)
    attention = 12 * config.hidden_size * wanted.context * config.num_hidden_layers
    flops = 6 * counts.scaling_parameters + attention
    model = Transformer(config, seed=0).compute_in(wanted.dtype)
    optimizers = Optimizers(model, LearningRates(0.01, 0.1, 0.004, 0.001, 0.0, 0.9))
    loader = Loader(Zipf(wanted.vocab), row_tokens=wanted.context, pad_id=0, split=True)
    timing = Timing(flops, time.process_time if wanted.cpu_clock else time.perf_counter)
    schedule = Schedule(wanted.steps, 2, 0.5, 0.1)
    job = Job(model, optimizers, schedule, timing, eval_every=10**9, save_every=10**9)
    size = {"rows_per_step": wanted.batch // wanted.context, "device_batch_size": wanted.rows}
    if wanted.profile:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            train(job, loader, **size)
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
        return
    train(job, loader, **size)
    ratios, rows = sorted(timing.ratios[1:]), timing.rows[1:]
    seconds = statistics.median(row["step_seconds"] for row in rows)
    result = {
        "depth": wanted.depth,
        "arch": wanted.arch,
        "bigram_rows": wanted.bigram_rows,
        "dtype": wanted.dtype,
        "threads": wanted.threads,
        "clock": "processor" if wanted.cpu_clock else "wall",
        "rows_per_pass": wanted.rows,
        "ratio": round(statistics.median(ratios), 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "seconds_per_step": round(seconds, 2),
        "tokens_per_second": round(wanted.batch / seconds),
        "product_gflops": round(statistics.median(timing.peaks["torch"]) / 1e9, 1),
        "own_ratio": round(statistics.median(timing.own_ratios[1:]), 3),
        "own_product_gflops": round(statistics.median(timing.peaks["own"]) / 1e9, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "first_step_seconds_after_start": round(timing.first, 1),
        "minor_faults_per_step": resource.getrusage(resource.RUSAGE_SELF).ru_minflt // wanted.steps,
        "flops_per_token": flops,
        "parameters": counts.parameters,
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=None if wanted.json else 1))


if __name__ == "__main__":
    main()
