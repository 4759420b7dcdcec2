"""A whole run in miniature: a recipe of seconds, ways to call fledge, and what must be equal.

`artefacts` is the yardstick of stages/ and faults/: every file of a run with what depends on the
clock taken out. Whatever it leaves out is named here and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fledge.runlog import without_timing

ROOT = Path(__file__).parents[1]

RECIPE = """\
[model]
depth = 1
max_seq_len = 128

[data]
world = "village"

[tokenizer]
vocab_size = 640
train_bytes = 60_000

[base]
tokens = 10_240
global_batch_tokens = 512
eval_tokens = 1024
eval_every = 10
save_every = 3

[mid]
tokens = 4096
global_batch_tokens = 512
save_every = 2

[sft]
tokens = 2048
global_batch_tokens = 512
save_every = 2

[rl]
steps = 2
prompts_per_step = 2
samples_per_prompt = 2
max_new_tokens = 16
save_every = 1

[evaluate]
max_examples = 4
samples = 2
dialogues = 4

[hardware]
threads = 1
dtype = "float32"
"""
"""20, 8, 4 and 2 steps; no save_every divides the 20, so the last checkpoint is off the beat."""


def write_recipe(folder: Path, *, name: str = "mini") -> Path:
    """The miniature recipe as a file."""
    path = folder / f"{name}.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """For `python -m fledge` in a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}


def command(*words: object) -> list[str]:
    """`fledge WORDS` with this interpreter."""
    return [sys.executable, "-m", "fledge", *map(str, words)]


def fledge(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `fledge WORDS` to its end in a process of its own."""
    return subprocess.run(
        command(*words), capture_output=True, text=True, env=environment(), cwd=cwd, check=False
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; empty folders count too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"<folder>"
        for path in sorted(folder.rglob("*"))
    }


def artefacts(run: Path) -> dict[str, Any]:
    """What a run left behind, without what depends on the clock.

    JSON loses its TIMING_KEYS; the two report pages lose the lines that tell times and memory;
    log.txt (the lines the terminal showed, rates and times in them), .lock (a process id) and the
    plots of speed and memory are left out; all else is compared byte for byte.
    """
    found: dict[str, Any] = {}
    for name, data in snapshot(run).items():
        if name == ".lock" or name.endswith("/log.txt") or name in TIMED_FILES:
            continue
        if name.endswith((".json", ".jsonl")) and "/checkpoints/" not in name:
            found[name] = [without_timing(json.loads(x)) for x in _documents(name, data)]
        elif name in ("report.md", "report.html"):
            found[name] = _without_times(data.decode("utf-8"))
        else:
            found[name] = data
    return found


def _documents(name: str, data: bytes) -> list[str]:
    text = data.decode("utf-8")
    return text.splitlines() if name.endswith(".jsonl") else [text]


TIMED_PLOTS = {"Throughput", "Use of the machine (MFU)", "Largest memory of the process by stage"}
TIMED_FILES = {f"plots/{name}.svg" for name in ("speed", "mfu", "memory")}


def _without_times(page: str) -> str:
    """A report page without what depends on the clock or the command line: the duration in its
    summary, three answers of its brief, the table of stages, the plan against the time taken, how
    often a stage was taken up, and three plots."""
    page = re.sub(r"(It read \S+ tokens in) .+? on ", r"\1 TIME on ", page, count=1)
    titles = "Planned and actual|What went wrong"
    page = re.sub(rf"(## |<h2>)({titles}).*?(?=\n## |\n<h2>)", "", page, flags=re.DOTALL)
    for title in TIMED_PLOTS:
        figure = rf'<figure aria-label="{re.escape(title)}">.*?</figure>'
        page = re.sub(figure, "", page, flags=re.DOTALL)
    between = r"(</td><td[^>]*>| \| )"
    row = rf"\|? ?(<tr><td[^>]*>)?(tokenizer|base|mid|sft|rl|evaluate){between}(done|interrupted)"
    asked = r"\|? ?(<tr><td[^>]*>)?(How long did it take|What went wrong|How was it started)\?"
    return "\n".join(
        line for line in page.splitlines() if not re.match(f"{row}|{asked}", line.strip())
    )


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the files that are missing on one side or differ."""
    return sorted(
        name for name in {*left, *right} if name not in left or left[name] != right.get(name)
    )


def assert_three_parts(err: str) -> None:
    """One user error: what, why and fix, after any plain lines of progress, and no traceback."""
    assert "Traceback" not in err, err
    assert re.search(r"(\A|\n)error: .+\n  why: .+\n  fix: .+\n\Z", err), err
