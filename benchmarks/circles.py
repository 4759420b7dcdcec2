"""Replies that go round in circles, by how the next token is chosen.

    python benchmarks/circles.py RUN STAGE [--dialogues 128]

The dialogues and problems of the report's "Is the chat any good?", answered by the run's model in
several ways: shares of replies that end and of four-word runs said before, and of problems answered
with a tool call in good form, each with its 95 % interval. What a way costs in right answers says
`fledge eval RUN --dry-multiplier 0.8` beside `fledge eval RUN`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from fledge.dist import World
from fledge.engine import Engine, SamplingParams
from fledge.engine.tools import Tools
from fledge.evals.chat_quality import MOST_TOKENS, Partner, calls, form
from fledge.run import Run
from fledge.stages.material import open_material
from fledge.stats import format_interval

WAYS: tuple[dict[str, Any], ...] = (
    {},
    *({"dry_multiplier": value} for value in (0.4, 0.8, 1.6)),
    *({"frequency_penalty": value} for value in (0.3, 0.6)),
    *({"repetition_penalty": value} for value in (1.1, 1.2)),
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_k": 50},
)


def main() -> None:
    """Prints a row of the table for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("stage", choices=("mid", "sft", "rl"))
    parser.add_argument("--dialogues", type=int, default=128)
    args = parser.parse_args()
    run = Run.read(args.run)
    folder = run.latest_checkpoint(args.stage)
    if folder is None:
        raise SystemExit(f"{args.run} has no checkpoint of {args.stage}")
    engine = Engine.from_folder(folder)
    material = open_material(run.recipe).talks(args.stage, args.dialogues)
    print("| chosen by | replies that end | four-word runs said before | tool calls in good form |")
    print("| --- | --- | --- | --- |")
    plain = SamplingParams(max_tokens=MOST_TOKENS, logprobs=False)
    with Tools() as tools:
        for way in WAYS:
            partner = Partner(engine, tools, World(), dataclasses.replace(plain, **way))
            scores = form(partner, material.dialogues)[1] | calls(partner, material.problems)
            cells = [
                f"{format_interval(s['value'], s['low'], s['high'])}, n = {s['n']}"
                for s in (scores.get(name) for name in ("stops", "repeats", "calls"))
                if s is not None
            ]
            named = ", ".join(f"{k} {v:g}" for k, v in way.items()) or "the likeliest"
            print(f"| {named} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
