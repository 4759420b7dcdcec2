"""A whole rehearsal on N gloo ranks of this machine, one of them killed on the way, restarted.

    PYTHONPATH=python:. python benchmarks/rehearsal.py --nproc 8 --recipe speedrun

Against the local hub of the tests. Prints the seconds of both attempts and the table of the report
in nanochat's form; ends with an error where a cell of it is empty.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from tests.faults.killing import rows
from tests.helpers_hub import local_hub
from tests.helpers_mini import command, environment, fledge
from tests.helpers_mini_hub import mini_hub
from tests.stages.test_ranks import ranks_of
from tests.stages.test_rehearsal import check_scores

KILL_AT_STEP = 7  # of base's 12: behind its first checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nproc", type=int, default=8)
    parser.add_argument("--recipe", default="speedrun")
    args = parser.parse_args()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.delenv("FLEDGE_DATA", raising=False)
        out = Path(folder) / "run"
        words = ("run", args.recipe, "--rehearse", "--nproc", str(args.nproc), "--out", out)
        with local_hub(mini_hub(), f"{folder}/home", patch):
            began = time.monotonic()
            process = subprocess.Popen(
                command(*words),
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            while rows(out / "base" / "metrics.jsonl") < KILL_AT_STEP and process.poll() is None:
                time.sleep(0.01)
            os.kill(ranks_of(process.pid)[args.nproc // 2], signal.SIGKILL)
            _, told = process.communicate()
            print(f"killed: code {process.returncode}, {told.strip().splitlines()[-1]}")
            print(f"seconds until it had ended: {time.monotonic() - began:.1f}")
            began = time.monotonic()
            done = fledge(*words)
            assert done.returncode == 0, done.stderr
            print(f"seconds of the second attempt: {time.monotonic() - began:.1f}")
        check_scores(out, of=args.recipe)
        page = (out / "report.md").read_text(encoding="utf-8")
        table = re.search(r"\| metric \|.*?\n\n", page, re.DOTALL)
        print(table.group(0) if table else page)


if __name__ == "__main__":
    main()
