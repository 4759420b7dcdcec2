"""kill -9 at random moments of a whole run, then run on: does it end in the same files?

    .venv/bin/python benchmarks/kill_resume.py [--recipe tiny] [--kills 10] [--seed 0]

One run is left alone and timed; each of the others is killed at a random share of that time and
run again to its end. Every artefact must then equal, byte for byte, that of the run left alone, but
for what depends on the clock (`tests.helpers_mini.artefacts` names it). The table of results goes
to benchmarks/kill_resume.md. `--recipe mini` is the recipe of the tests, of a few seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from tests.helpers_mini import artefacts, command, differences, environment, write_recipe  # noqa: E402

from fledge.config import STAGES  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
MOST_TRIES = 5  # a run that ended before its kill is tried again with an earlier moment


@dataclass
class Kill:
    """One killed and resumed run."""

    after: float  # seconds from the start to the kill
    where: str
    resumed: float  # seconds of the second go
    compared: int
    different: list[str]


def whole_run(words: list[object]) -> float:
    """Run to the end; returns the seconds."""
    began = time.monotonic()
    done = subprocess.run(
        command(*words), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"fledge {words} ended with {done.returncode}:\n{done.stderr}")
    return time.monotonic() - began


def killed_run(words: list[object], seconds: float) -> bool:
    """Start a run and kill it after `seconds`; False if it was over before."""
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    return False


def place_of(run: Path) -> str:
    """Where a killed run stood, from its own files."""
    for stage in reversed(STAGES):
        record = run / stage / "stage.json"
        if not record.is_file():
            continue
        if json.loads(record.read_text())["status"] == "done":
            return f"after {stage}" if stage != STAGES[-1] else "report"
        metrics = run / stage / "metrics.jsonl"
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        saving = ", saving" if list(run.glob(f"{stage}/checkpoints/*.tmp")) else ""
        exams = len(list(run.glob("evaluate/*/*.samples.jsonl")))
        return f"evaluate, exam {exams + 1}" if stage == STAGES[-1] else f"{stage} {steps}{saving}"
    return "before the first stage"


def measure(
    recipe: str, kills: int, seed: int, folder: Path
) -> tuple[float, dict[str, object], list[Kill]]:
    """(seconds of the run left alone, its artefacts, the killed runs)."""
    if recipe == "mini":
        recipe = str(write_recipe(folder))
    alone = whole_run(["run", recipe, "--out", folder / "alone"])
    expected = artefacts(folder / "alone")
    print(f"left alone: {alone:.1f} s, {len(expected)} files")
    dice, results = random.Random(seed), []
    for number in range(kills):
        out = folder / f"killed{number}"
        words: list[object] = ["run", recipe, "--out", out]
        after = dice.uniform(0.02, 1.0) * alone
        for _ in range(MOST_TRIES):
            if killed_run(words, after):
                break
            subprocess.run(["rm", "-rf", str(out)], check=True)
            after *= 0.8
        where = place_of(out)
        resumed = whole_run(words)
        found = artefacts(out)
        results.append(Kill(after, where, resumed, len(found), differences(expected, found)))
        verdict = "same" if not results[-1].different else f"DIFFERS: {results[-1].different}"
        print(f"kill {number + 1} after {after:.1f} s in {where}: {verdict}")
        subprocess.run(["rm", "-rf", str(out)], check=True)
    return alone, expected, results


def page(args: argparse.Namespace, alone: float, count: int, kills: list[Kill]) -> str:
    """The results as Markdown."""
    same = sum(not kill.different for kill in kills)
    lines = [
        "# kill -9 and run on",
        "",
        f"`python benchmarks/kill_resume.py --recipe {args.recipe} --kills {args.kills} "
        f"--seed {args.seed}` on {os.cpu_count()} cores ({platform.machine()}), "
        f"{time.strftime('%Y-%m-%d')}.",
        "",
        f"A run left alone took {alone:.1f} s and left {count} files. Of {len(kills)} runs killed "
        f"at random moments and run again, **{same} ended in the same files**, byte for byte but "
        "for times: the TIMING_KEYS of the JSON files, the summary's duration and the table of "
        "stages in the report pages, log.txt and the process id in .lock.",
        "",
        "| kill | after | where it stood | second go | files compared | different |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {i} | {k.after:.1f} s | {k.where} | {k.resumed:.1f} s | {k.compared} | "
        f"{', '.join(k.different) or 'none'} |"
        for i, k in enumerate(kills, 1)
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, write the page; exit code 1 if any file differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="tiny", help="a recipe's name or file; mini: seconds")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        alone, expected, kills = measure(args.recipe, args.kills, args.seed, Path(folder))
    args.results.write_text(page(args, alone, len(expected), kills), encoding="utf-8")
    print(f"written: {args.results}")
    return 1 if any(kill.different for kill in kills) else 0


if __name__ == "__main__":
    sys.exit(main())
