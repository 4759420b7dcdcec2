"""The verb `eval`: exams of a model, of two models on the same questions, and bits per byte.

Called by `fledge.cli` only. It reads its words, calls one function and prints: tables for people on
standard output, one JSON object with --json, progress on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.cli import VERBS, Parser, positive, print_json, require_folder
from fledge.errors import EXIT_DONE, UserError


def evaluate(words: list[str]) -> int:
    """`fledge eval ...`."""
    args = _parser().parse_args(words)
    require_folder(args.model)
    if args.bpb is not None:
        return _bits_per_byte(args)
    from fledge.evals.examine import Sampling
    from fledge.evals.suite import Options
    from fledge.stages.evaluate import evaluate_model

    if args.samples > 1 and args.temperature == 0:
        raise UserError(
            f"--samples {args.samples} without a temperature",
            "greedy replies are all alike, so pass@k would be pass@1",
            "add --temperature 0.8",
        )
    options = Options(
        max_examples=args.max_examples,
        profile=args.profile,
        deterministic=args.deterministic,
        sampling=Sampling(args.samples, args.temperature, args.seed, args.dry_multiplier),
    )
    tasks = tuple(t.strip() for t in args.tasks.split(",") if t.strip()) if args.tasks else None

    def examine(model: Path, out: Path | None) -> Any:
        return evaluate_model(
            model,
            tasks,
            options,
            args.data_root,
            out=out,
            keep=not args.no_store,
            note=lambda line: print(line, file=sys.stderr, flush=True),
        )

    first = examine(args.model, args.out)
    if args.compare is None:
        _print(args, first.table)
        return EXIT_DONE
    require_folder(args.compare)
    second = examine(args.compare, args.out / "compared" if args.out else None)
    from fledge.evals.compare import compare
    from fledge.stages.evaluate import chances

    rows = compare(
        {result.name: result.records for result in first.results},
        {result.name: result.records for result in second.results},
        chances(first.results),
    )
    table = {"a": str(args.model), "b": str(args.compare), "tasks": rows}
    if args.json:
        print_json(first.table | {"compared": second.table, "comparison": table})
    else:
        from fledge.report import comparison_text

        print(comparison_text(table), end="")
    return EXIT_DONE


def _parser() -> Parser:
    parser = Parser("eval", VERBS["eval"].summary)
    parser.add_argument("model", type=Path, help="a run directory or a checkpoint folder")
    parser.add_argument(
        "--tasks",
        help="names with commas between: core (its 22 tasks), core/NAME, mmlu, arc_easy, "
        "arc_challenge, gsm8k, humaneval, chat, a world's exams, or a .jsonl file of yours; "
        "default: all that the data offers but core",
    )
    parser.add_argument("--max-examples", type=positive, help="at most this many of each task")
    parser.add_argument(
        "--profile", choices=("nanochat", "dclm"), default="nanochat",
        help="how CORE's prompts are made (default nanochat: comparable with its tables)",
    )  # fmt: skip
    parser.add_argument("--compare", type=Path, metavar="MODEL", help="differences to this model")
    parser.add_argument(
        "--samples", type=positive, default=1, help="replies a question, for pass@k"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of the replies; 0 = greedy")
    parser.add_argument(
        "--dry-multiplier",
        type=float,
        default=0.0,
        help="holds back replies that go round in circles, as the chats do with 0.8",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampled replies")
    parser.add_argument(
        "--deterministic", action="store_true", help="one prompt per pass: bitwise, slower"
    )
    parser.add_argument(
        "--bpb", type=Path, metavar="TEXT", help="instead of tasks: bits per byte of this text"
    )
    parser.add_argument("--data-root", help="folder with task files (default: FLEDGE_DATA)")
    parser.add_argument(
        "--out", type=Path, help="folder for results and records (default: beside the checkpoint)"
    )
    parser.add_argument("--no-store", action="store_true", help="keep nothing, read nothing back")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _print(args: argparse.Namespace, table: Mapping[str, Any]) -> None:
    if args.json:
        print_json(table)
        return
    from fledge.report import scores_text

    print(scores_text(table), end="")


def _bits_per_byte(args: argparse.Namespace) -> int:
    from fledge.stages.evaluate import bits_per_byte

    table = bits_per_byte(args.model, args.bpb)
    _print(args, table)
    return EXIT_DONE
