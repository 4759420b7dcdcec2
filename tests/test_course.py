"""The code blocks of the tour and of every chapter of the course run, in order, as one program.

The numbers in the text are asserted by the blocks themselves. Each file runs in a Python of its
own, in an empty folder, so that nothing of this process helps or hinders it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = [ROOT / "docs" / "tour.md", *sorted((ROOT / "docs" / "course").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 540  # a lesson takes seconds; a crowded machine may take minutes


def program_of(lesson: Path) -> str:
    """The python blocks of a lesson with blank lines between, so that line numbers are its own."""
    text = lesson.read_text(encoding="utf-8")
    program, line = [], 1
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1)) + 1
        program.append("\n" * (first - line) + block.group(1))
        line = first + block.group(1).count("\n")
    return "".join(program)


def test_there_are_lessons():
    assert {p.name for p in LESSONS} >= {"tour.md", "01-the-whole-path.md"}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_lesson_runs(lesson: Path, tmp_path: Path):
    program = program_of(lesson)
    assert program.strip(), f"{lesson.name} has no python block"
    script = tmp_path / f"{lesson.stem}.py"
    script.write_text(program, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{lesson.name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
