"""Quality per second on this CPU: bits per byte of unseen text after some minutes of training.

    python benchmarks/quality.py --source FOLDER --out DIR            all of it, resumable
    python benchmarks/quality.py --source FOLDER --out DIR --speed    only: how fast each one is
    python benchmarks/quality.py --source FOLDER --out DIR --table    only: what is known so far

Four contenders learn the same documents with the same loop. `laptop` and `laptop-speedrun` are our
recipes of that name, whose depth, vocabulary and context were chosen by hand on this kind of
machine, as they resolve. `recipe` is nanochat's depth-4 network (32,768 words, T = 512, all extras,
no windows) with its own optimizers and schedules; `adamw` is that network under plain AdamW. The
last two are tuned first, with runs of a sixth of the time: three learning rates at 4,096 tokens a
step, then 8,192 and 16,384 tokens at the best of them.

A run is as many steps as fit into the minutes at the contender's speed, which is measured in turns
on a quiet machine and kept in speeds.json; so what a run reaches does not depend on who else
computes (short_run.py). A line per run goes to rows.jsonl; what stands there is not run again: one
--out for one text, one machine and one version.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from short_run import (
    MAX_BYTES,
    Subject,
    Text,
    append_row,
    parser_of,
    prepared,
    read_rows,
    speed,
    train_and_measure,
)

from fledge.config import flat, load_recipe, recipe_to_dict
from fledge.plan.releases import OPTIMIZER_2026

OURS = ("laptop", "laptop-speedrun")
BATCHES = (4096, 8192, 16384)
TUNING_SHARE = 1 / 6
SPEED_SECONDS = 15.0
SPEED_ROUNDS = 3
NANOCHAT: dict[str, Any] = {
    "model.depth": 4,
    "model.arch": "speedrun",
    "model.head_dim": 64,
    "model.max_seq_len": 512,
    "model.window_pattern": "L",
    "tokenizer.vocab_size": 32768,
    "tokenizer.pattern": "gpt4-2",
}
"""runs/runcpu.sh of nanochat (92d63d4) at depth 4."""
RECIPE_TIMES = (1.0, 3.0, 9.0)
"""Of nanochat's own rates, which are small at these batches: 0.02 x sqrt(4,096 / 2^19) = 0.0018."""
PLAIN_RATES = (1e-3, 3e-3, 1e-2)
STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
"""Two-sided 95 % points of Student's t for so many pairs."""


@dataclass(frozen=True)
class Trial:
    """A contender at one batch and one rate."""

    contender: str
    batch: int
    rate: float

    def subject(self) -> Subject:
        """What is trained."""
        name = f"{self.contender} batch {self.batch} rate {self.rate:g}"
        if self.contender in OURS:
            asked = flat(recipe_to_dict(load_recipe(self.contender)[1]))
            sections = ("model.", "tokenizer.", "base.")
            horizon = ("base.minutes", "base.tokens", "tokenizer.train_bytes")
            keys = {k: v for k, v in asked.items() if k.startswith(sections) and k not in horizon}
            return Subject(self.contender, {k: v for k, v in keys.items() if v is not None})
        keys = NANOCHAT | {"base.global_batch_tokens": self.batch}
        if self.contender == "adamw":
            return Subject(name, keys, plain_lr=self.rate)
        by_batch = math.sqrt(self.batch / 2**19) * self.rate
        by_width = math.sqrt(768 / 256) * by_batch
        rates = {
            "base.matrix_lr": 0.02 * by_batch,
            "base.embed_lr": 0.3 * by_width,
            "base.head_lr": 0.008 * by_width,
            "base.norm_lr": 0.005 * by_batch,
            # not its factor (tokens of d12 / tokens), which at this horizon is some hundred
            "base.weight_decay": 0.28 * math.sqrt(self.batch / 2**19),
        }
        return Subject(name, keys | OPTIMIZER_2026 | rates)


class Comparison:
    """The runs of one comparison, kept in a folder."""

    def __init__(self, source: Path, out: Path, minutes: float, seeds: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.text = Text(source, MAX_BYTES, out)
        self.seconds, self.seeds = 60 * minutes, seeds
        self._rows_file, self._speeds_file = out / "rows.jsonl", out / "speeds.json"

    # speed depends on the network and the batch, not on the learning rate
    def speeds(self) -> dict[str, list[float]]:
        """Tokens a second: "contender batch" -> one figure a round."""
        if not self._speeds_file.is_file():
            return {}
        return json.loads(self._speeds_file.read_text(encoding="utf-8"))

    def measure_speeds(self) -> None:
        """Another round of each until all have SPEED_ROUNDS; nobody else should compute."""
        trials = [Trial(name, 0, 0.0) for name in OURS]
        trials += [Trial(kind, batch, 1e-3) for kind in ("recipe", "adamw") for batch in BATCHES]
        for count in range(1, SPEED_ROUNDS + 1):
            for trial in trials:
                known = self.speeds()
                found = known.setdefault(f"{trial.contender} {trial.batch}", [])
                if len(found) >= count:
                    continue
                found.append(round(speed(trial.subject(), self.text, seconds=SPEED_SECONDS)))
                print(f"{trial.contender} {trial.batch}: {found[-1]:,} tokens/s", flush=True)
                self._speeds_file.write_text(json.dumps(known, indent=1), encoding="utf-8")

    def run(self, trial: Trial, *, seconds: float, seed: int) -> dict[str, Any]:
        """The row of a run, made now or before."""
        rates = self.speeds()[f"{trial.contender} {trial.batch}"]
        asked = {"contender": trial.contender, "batch": trial.batch, "rate": trial.rate}
        asked |= {"seconds": seconds, "seed": seed}
        for row in read_rows(self._rows_file):
            if all(row[key] == value for key, value in asked.items()):
                return row
        tokens = round(statistics.median(rates) * seconds)
        row = asked | train_and_measure(trial.subject(), self.text, tokens=tokens, seed=seed)
        append_row(self._rows_file, row)
        print(
            f"{row['name']}, seed {seed}, {seconds:.0f} s: {row['tokens']:,} tokens, "
            f"{row['bpb']:.4f} bits per byte",
            flush=True,
        )
        return row

    def tuned(self, kind: str) -> Trial:
        """The best batch and rate of a baseline, by short runs."""
        rates = RECIPE_TIMES if kind == "recipe" else PLAIN_RATES
        best = self._best(Trial(kind, BATCHES[0], rate) for rate in rates)
        return self._best(Trial(kind, batch, best.rate) for batch in BATCHES)

    def _best(self, trials: Iterable[Trial]) -> Trial:
        seconds = self.seconds * TUNING_SHARE
        found = [(self.run(trial, seconds=seconds, seed=0)["bpb"], trial) for trial in trials]
        return min(found, key=lambda pair: pair[0])[1]

    def all(self) -> None:
        """Everything that is missing, seed by seed."""
        self.measure_speeds()
        trials = [Trial(name, 0, 0.0) for name in OURS]
        trials += [self.tuned("recipe"), self.tuned("adamw")]
        for seed in range(self.seeds):
            for trial in trials:
                self.run(trial, seconds=self.seconds, seed=seed)

    def table(self) -> str:
        """The runs of the whole time, and how much fewer bits our recipes need."""
        lines = [
            "| contender | tokens a step | rate | tokens/s | tokens | seeds | bits per byte | "
            + " | ".join(f"{name} needs less by" for name in OURS)
            + " |",
            "| --- " * (7 + len(OURS)) + "|",
        ]
        whole = [row for row in read_rows(self._rows_file) if row["seconds"] == self.seconds]
        for kind in (*OURS, "recipe", "adamw"):
            rows = {row["seed"]: row for row in whole if row["contender"] == kind}
            if not rows:
                continue
            row = next(iter(rows.values()))
            rates = self.speeds()[f"{kind} {row['batch']}"]
            less = [self._less(whole, name, rows) for name in OURS]
            shown = ", ".join(f"{rows[seed]['bpb']:.4f}" for seed in sorted(rows))
            lines.append(
                f"| {kind} | {row['batch'] or 'planned'} | {row['rate'] or 'planned'} | "
                f"{statistics.median(rates):,.0f} ({min(rates):,} to {max(rates):,}) | "
                f"{row['tokens']:,} | {len(rows)} | {shown} | "
                f"{' | '.join('-' if kind in OURS else part for part in less)} |"
            )
        return "\n".join(lines)

    @staticmethod
    def _less(whole: list[dict[str, Any]], name: str, rows: dict[int, dict[str, Any]]) -> str:
        """How many per cent fewer bits our recipe needs than `rows`, seed by seed, as text."""
        ours = {row["seed"]: row["bpb"] for row in whole if row["contender"] == name}
        return interval(
            [100 * (1 - ours[seed] / rows[seed]["bpb"]) for seed in rows if seed in ours]
        )


def interval(percents: list[float]) -> str:
    """Mean and 95 % interval of differences by seed, as text."""
    if not percents:
        return "?"
    mean = statistics.mean(percents)
    if len(percents) == 1:
        return f"{mean:.1f} % (one seed)"
    if len(percents) not in STUDENT_95:
        raise SystemExit(f"no interval is known for {len(percents)} seeds; give at most 8")
    half = STUDENT_95[len(percents)] * statistics.stdev(percents) / math.sqrt(len(percents))
    return f"{mean:.1f} % ({mean - half:.1f} to {mean + half:.1f})"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    wanted = prepared(parser)
    comparison = Comparison(wanted.source, wanted.out, wanted.minutes, wanted.seeds)
    if wanted.speed:
        comparison.measure_speeds()
    elif not wanted.table:
        comparison.all()
    print(comparison.table())


if __name__ == "__main__":
    main()
