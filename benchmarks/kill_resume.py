"""kill -9 at random moments of a whole run, then run on: does it end in the same files?

    .venv/bin/python benchmarks/kill_resume.py [--recipe tiny] [--kills 10] [--seed 0]

One run is left alone and timed; each of the others is killed at a random share of that time and
run again to its end. Every artefact must then equal, byte for byte, that of the run left alone, but
for what depends on the clock (`tests.helpers_mini.artefacts` names it). The table of results goes
to benchmarks/kill_resume.md. `--recipe mini` is the recipe of the tests, of a few seconds.

    .venv/bin/python benchmarks/kill_resume.py --saving 50

kills one run of `mini`, which saves after every step of base, 50 times inside a save, half of them
with checkpoints written in the background. After every kill the checkpoint that LATEST names
must verify and load, weights and optimizers; at the end the run must hold the files of one that was
left alone. Results: benchmarks/kill_saving.md.
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

os.environ["OMP_NUM_THREADS"] = "1"  # --saving forks, which torch's threads would not survive
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from tests.faults.killing import kill_in_save, loads  # noqa: E402
from tests.helpers_mini import artefacts, command, differences, environment, write_recipe  # noqa: E402

import fledge.stages.pipeline  # noqa: E402, F401  (for the forks: all of torch)
from fledge.config import STAGES  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
SAVING_RESULTS = RESULTS.with_name("kill_saving.md")
SAVING_STEPS = 120
LONGEST_DELAY = 0.05  # seconds after a save has begun; one of `mini` takes about as long
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


@dataclass
class SavingKill:
    """One kill inside a save."""

    saving: str  # the temporary folder that it left
    behind: bool
    loaded: int  # the step of the checkpoint that then loaded


def kill_in_saves(
    kills: int, steps: int, seed: int, folder: Path
) -> tuple[list[SavingKill], int, list[str]]:
    """(the kills, how many missed a save, files that differ from those of a run left alone)."""
    recipe = write_recipe(folder)
    words: list[object] = ["run", recipe, "--until", "base", "--base.save-every", 1]
    words += ["--base.tokens", 512 * steps]
    whole_run([*words, "--out", folder / "alone"])
    out, dice = folder / "killed", random.Random(seed)
    found: list[SavingKill] = []
    missed = 0
    while len(found) < kills:
        behind = bool(len(found) % 2)
        flags = ("--out", out, "--hardware.async-checkpoints", behind)
        first = not (out / "base" / "LATEST").exists()  # one must be whole before it counts
        nth, delay = dice.randint(2 if first else 1, 3), dice.uniform(0, LONGEST_DELAY)
        inside = kill_in_save(out / "base" / "checkpoints", nth, delay, *words, *flags)
        if inside is None:
            raise SystemExit(f"the run was over after {len(found)} kills: give more --steps")
        step = loads(out, "base")
        missed += not inside
        if inside:
            found.append(SavingKill(inside, behind, step))
            print(f"kill {len(found)} in {inside}: step {step} loads", flush=True)
    whole_run([*words, "--out", out])
    expected, ours = artefacts(folder / "alone"), artefacts(out)
    # recipe.toml, resolved.json and the report say how checkpoints were written
    different = [n for n in differences(expected, ours) if n.partition("/")[0] in STAGES]
    return found, missed, different


def saving_page(args: argparse.Namespace, found: tuple[list[SavingKill], int, list[str]]) -> str:
    """The results of kills inside saves as Markdown."""
    kills, missed, different = found
    steps = ", ".join(f"{kill.saving} ({kill.loaded})" for kill in kills)
    return (
        "# kill -9 inside a save\n\n"
        f"`python benchmarks/kill_resume.py --saving {args.saving} --seed {args.seed}` on "
        f"{os.cpu_count()} cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}.\n\n"
        f"One run of {args.steps} steps, a checkpoint after each, killed {len(kills)} times "
        f"inside a save ({sum(k.behind for k in kills)} of them while a thread wrote it; {missed} "
        "further kills fell between two saves). After every kill the checkpoint of LATEST was "
        "verified by its sums and loaded, weights and optimizers. Run to its end, it differed from "
        f"a run left alone in **{len(different)} files**{': ' if different else ''}"
        f"{', '.join(different)}.\n\n"
        f"What was being written, and the step that then loaded: {steps}.\n"
    )


def main() -> int:
    """Measure, write the page; exit code 1 if any file differed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="tiny", help="a recipe's name or file; mini: seconds")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to write")
    parser.add_argument("--saving", type=int, default=0, help="kill so often inside a save instead")
    parser.add_argument("--steps", type=int, default=SAVING_STEPS, help="of the run of --saving")
    args = parser.parse_args()
    if args.saving:
        with tempfile.TemporaryDirectory() as folder:
            found = kill_in_saves(args.saving, args.steps, args.seed, Path(folder))
        place = SAVING_RESULTS if args.results == RESULTS else args.results
        place.write_text(saving_page(args, found), encoding="utf-8")
        return 1 if found[2] else 0
    with tempfile.TemporaryDirectory() as folder:
        alone, expected, kills = measure(args.recipe, args.kills, args.seed, Path(folder))
    args.results.write_text(page(args, alone, len(expected), kills), encoding="utf-8")
    print(f"written: {args.results}")
    return 1 if any(kill.different for kill in kills) else 0


if __name__ == "__main__":
    sys.exit(main())
