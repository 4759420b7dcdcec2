"""`fledge run`: a recipe carried through its stages, or rehearsed in miniature first.

Called by `fledge.cli`. A rehearsal is a run like any other, in a folder of its own; afterwards the
model is asked a question as `fledge chat` would, and what the whole run will need is printed.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fledge.cli import Parser, positive
from fledge.errors import EXIT_DONE, UserError

REHEARSAL = "rehearsal"
QUESTION = "Why is the sky blue?"


def add_flags(parser: Parser) -> None:
    """The own flags of `fledge run`."""
    parser.add_argument("--out", type=Path, help="run directory (default: runs/RECIPE)")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--restart", metavar="STAGE", help="redo this stage and all later ones")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the same recipe in miniature, then what the whole run will need",
    )
    parser.add_argument(
        "--nproc", type=positive, default=1, help="processes: one per GPU, or per group of cores"
    )


def origin(asked: str, recipe: Any, words: list[str]) -> dict[str, Any]:
    """How a run was asked for: the command, what the recipe's header expects of it, and the keys
    that the command line changed."""
    from fledge import config
    from fledge.fingerprint import changed_keys

    before, now = (config.recipe_to_dict(r) for r in (config.load_recipe(asked)[1], recipe))
    processes = os.environ.get("WORLD_SIZE", "1")
    kept = [*words, *(["--nproc", processes] if processes != "1" else [])]
    return {
        "command": shlex.join(["fledge", "run", *kept]),
        "expected": config.expected_of(config.recipe_text(asked)),
        "overrides": changed_keys({"values": config.flat(before)}, {"values": config.flat(now)}),
    }


def run(args: Any, name: str, recipe: Any, words: list[str]) -> int:
    """Carries the recipe through its stages and says where its report and its model are."""
    from fledge.plan.planner import require_text

    require_text(recipe)
    if args.rehearse:
        return rehearse(args, name, recipe, words)
    from fledge.stages.pipeline import run_recipe

    finished = run_recipe(
        recipe,
        name,
        args.out or Path("runs") / name,
        until=args.until,
        restart=args.restart,
        origin=origin(args.recipe, recipe, words),
    )
    if leads():
        _tell(finished)
    return EXIT_DONE


def launch(size: int, words: list[str]) -> int:
    """The same command in `size` processes that meet on this machine; returns their code."""
    from fledge import launch

    if size > launch.MOST_PROCESSES:
        raise UserError(
            f"--nproc {size:,}",
            f"one machine carries at most {launch.MOST_PROCESSES} of them: each holds the model",
            "give the number of its GPUs, or of groups of its cores",
        )
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == "--nproc":
            kept.pop()
        elif not word.startswith("--nproc="):
            kept.append(word)
    return launch.ranks([sys.executable, "-m", "fledge", "run", *kept], size)


def leads() -> bool:
    """Whether this process speaks for the run: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def rehearse(args: Any, name: str, recipe: Any, words: list[str]) -> int:
    """The whole path at a tiny size, a chat, and the needs of the real run."""
    from fledge import chat, files
    from fledge.plan import hardware, planner, rehearsal
    from fledge.stages.pipeline import run_recipe

    whole = planner.resolve(recipe, hardware.detect())
    small, factors = rehearsal.shrink(whole, recipe)
    if leads():
        print(rehearsal.factors_text(name, factors), flush=True)
    out = args.out or Path("runs") / f"{name}-{REHEARSAL}"
    table = rehearsal.needs(recipe, whole, out)  # before anything runs: its target may be wrong
    finished = run_recipe(
        small,
        f"{name}-{REHEARSAL}",
        out,
        until=args.until,
        restart=args.restart,
        rehearsal={"of": name, "factors": factors},
        origin=origin(args.recipe, recipe, words) | {"expected": None},  # of the whole run
    )
    if not leads():
        return EXIT_DONE
    _tell(finished)
    if finished.last_model() is not None and args.until is None:
        chat.one_shot(finished.path, QUESTION, chat.Settings(max_tokens=16))
    table["missing"] += _data_missed(finished)
    files.write_json(finished.needs_file, table)
    print(rehearsal.needs_text(name, table), flush=True)
    return EXIT_DONE


def _data_missed(run: Any) -> list[str]:
    """The sentences of the run's notes that say which data could not be had."""
    records = [run.read_stage(stage) for stage in ("evaluate", "base")]
    notes = next((record["notes"] for record in records if record and record.get("notes")), [])
    return [note for note in notes if " is not under " in note or " is left out" in note]


def _tell(run: Any) -> None:
    shown = os.path.relpath(run.path) if run.path.is_relative_to(Path.cwd()) else str(run.path)
    if run.report_file("md").is_file():
        print(f"report: {shown}/{run.report_file('md').name}")
    if run.last_model() is not None:
        print(f"talk to it: fledge chat {shown}", flush=True)
