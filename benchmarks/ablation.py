"""What each extra of arch "speedrun" is worth: bits per byte with and without it, and its time.

    python benchmarks/ablation.py --source FOLDER --out DIR             all rows, resumable
    python benchmarks/ablation.py --source FOLDER --out DIR --speed     only: seconds of a step
    python benchmarks/ablation.py --source FOLDER --out DIR --table     only: what is known so far

The standard is arch speedrun with its standard extras; every variant changes one thing (an extra by
its name: turned off; `bigram_rows on`: what the standard lacks). `none` is without all of them,
`qwen3` the other arch. All runs of a depth and seed see the same tokens in the same
order: as many as the standard trains in `--seconds` at its own speed. The differences are taken
seed by seed. A line per run goes to rows.jsonl, so a stopped script goes on where it was.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from quality import interval
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

SHAPES: dict[int, dict[str, Any]] = {
    2: {"model.max_seq_len": 256, "tokenizer.vocab_size": 4096},
    4: {"model.max_seq_len": 256, "tokenizer.vocab_size": 4096},
}
STANDARD: dict[str, Any] = {"model.arch": "speedrun", "base.global_batch_tokens": 4096}
OFF: dict[str, float] = {
    "relu2": 0,
    "embedding_norm": 0,
    "qk_scale": 1,
    "final_logit_softcapping": 0,
    "value_embeddings": 0,
    "residual_scalars": 0,
    "embedding_scalars": 0,
    "smear": 0,
    "backout": 0,
}
"""Extras of [model] and what turns each off."""
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    **{name: {"model.extras": {name: value}} for name, value in OFF.items()},
    "bigram_rows on": {"model.extras": {"bigram_rows": 32768}},
    "norm_weights": {"model.extras": {"norm_weights": 1}},
    "windows": {"model.window_pattern": "L"},
    "untied head": {"model.tie_word_embeddings": True},
    "row_variance": {"base.row_variance": 0.0},
    "adamw 2025": {"base.adamw": "2025"},
    "none": {"model.extras": OFF | {"norm_weights": 1}, "model.window_pattern": "L"},
    "qwen3": {"model.arch": "qwen3"},
}
SPEED_SECONDS = 8.0


def subject(variant: str, depth: int) -> Subject:
    """The recipe of a variant."""
    keys = {"model.depth": depth} | SHAPES[depth] | STANDARD | VARIANTS[variant]
    return Subject(f"{variant}, depth {depth}", keys)


def measure_speeds(text: Text, path: Path) -> dict[str, float]:
    """Tokens a second of every variant and depth; nobody else should compute."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for depth in SHAPES:
        for variant in VARIANTS:
            key = f"{variant}, depth {depth}"
            if key not in known:
                known[key] = round(speed(subject(variant, depth), text, seconds=SPEED_SECONDS))
                print(f"{key}: {known[key]:,} tokens/s", flush=True)
                path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known


def run_all(text: Text, out: Path, seconds: float, seeds: int) -> None:
    """Every missing row, seed by seed, so that all variants have one before any has two."""
    speeds = measure_speeds(text, out / "speeds.json")
    for seed in range(seeds):
        for depth in SHAPES:
            for variant in VARIANTS:
                asked = {"variant": variant, "depth": depth, "seed": seed, "seconds": seconds}
                rows = read_rows(out / "rows.jsonl")
                if any(all(row[k] == v for k, v in asked.items()) for row in rows):
                    continue
                tokens = round(speeds[f"standard, depth {depth}"] * seconds)
                row = train_and_measure(subject(variant, depth), text, tokens=tokens, seed=seed)
                append_row(out / "rows.jsonl", asked | row)
                print(f"{row['name']}, seed {seed}: {row['bpb']:.4f} bits per byte", flush=True)


def table(out: Path, seconds: float) -> str:
    """A line per variant and depth: bits, what they are worse by, and how fast a step is."""
    speeds_file = out / "speeds.json"
    speeds = json.loads(speeds_file.read_text(encoding="utf-8")) if speeds_file.is_file() else {}
    rows = [row for row in read_rows(out / "rows.jsonl") if row["seconds"] == seconds]
    lines = [
        "| changed | depth | bits per byte | needs more by | steps a second, of the standard's |",
        "| --- | --- | --- | --- | --- |",
    ]
    for depth in SHAPES:
        found = {(row["variant"], row["seed"]): row["bpb"] for row in rows if row["depth"] == depth}
        for variant in VARIANTS:
            seeds = sorted(seed for name, seed in found if name == variant)
            if not seeds:
                continue
            more = [
                100 * (found[variant, seed] / found["standard", seed] - 1)
                for seed in seeds
                if ("standard", seed) in found
            ]
            mean = statistics.mean(found[variant, seed] for seed in seeds)
            ratio = speeds[f"{variant}, depth {depth}"] / speeds[f"standard, depth {depth}"]
            worse = "-" if variant == "standard" else interval(more)
            lines.append(f"| {variant} | {depth} | {mean:.4f} | {worse} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    wanted = prepared(parser)
    wanted.out.mkdir(parents=True, exist_ok=True)
    if not wanted.table:
        text = Text(wanted.source, MAX_BYTES, wanted.out)
        if wanted.speed:
            measure_speeds(text, wanted.out / "speeds.json")
        else:
            run_all(text, wanted.out, wanted.seconds, wanted.seeds)
    print(table(wanted.out, wanted.seconds))


if __name__ == "__main__":
    main()
