"""Ten thousand programs from eight threads: what is left behind?

    .venv/bin/python benchmarks/sandbox_soak.py [--runs 10000] [--threads 8] [--layers L1,L2]

Programs that answer, fail, crash, print too much, take too much memory or never end are run in a
fixed mixture through each layer. Before, at every tenth and after closing it counts this process's
memory, descriptors, threads, living and unreaped children, and the servers' own. The table goes to
benchmarks/sandbox_soak.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]

from fledge.sandbox import interpreter, process  # noqa: E402
from fledge.sandbox.result import Python  # noqa: E402

RESULTS = Path(__file__).with_suffix(".md")
PROGRAMS = {  # program: (how many of a hundred, whether it must succeed)
    "6 * 7": (60, True),
    "print('a' * 1000)\nsum(range(10**4))": (20, True),
    "1 / 0": (8, False),
    "import os\nos._exit(3)": (4, False),
    "import ctypes\nctypes.string_at(0)": (2, False),
    "x = bytearray(10**11)": (3, False),
    "print('spam' * 10**6)": (2, None),
    "while True: pass": (1, False),
}


@dataclass(frozen=True)
class Count:
    """What this process and its servers hold."""

    runs: int
    memory_mib: float
    servers_mib: float
    descriptors: int
    threads: int
    children: int
    grandchildren: int
    zombies: int


def count(runs: int) -> Count:
    gc.collect()
    children = children_of("self")
    grandchildren = [pid for child in children for pid in children_of(child)]
    states = [state_of(pid) for pid in children + grandchildren]
    return Count(
        runs=runs,
        memory_mib=memory_of("self"),
        servers_mib=sum(memory_of(pid) for pid in children),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        children=len(children),
        grandchildren=len(grandchildren),
        zombies=states.count("Z"),
    )


def children_of(pid: str) -> list[str]:
    found: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def state_of(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def memory_of(pid: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0  # a zombie


def soak(made: Python, runs: int, threads: int) -> tuple[list[Count], float, int]:
    """(counts, seconds, answers that were not as they must be)."""
    programs = [code for code, (weight, _) in PROGRAMS.items() for _ in range(weight)]
    order = random.Random(0).choices(programs, k=runs)
    wrong = 0

    def one(code: str) -> bool:
        expected = PROGRAMS[code][1]
        return expected is None or made.run(code).ok is expected

    with ThreadPoolExecutor(threads) as pool:
        assert made.why_unavailable() is None, made.why_unavailable()
        list(pool.map(one, ["6 * 7"] * 50))
        counts = [count(0)]
        began = time.monotonic()
        for tenth in range(10):
            part = order[tenth * runs // 10 : (tenth + 1) * runs // 10]
            wrong += sum(not right for right in pool.map(one, part))
            counts.append(count((tenth + 1) * runs // 10))
        seconds = time.monotonic() - began
    made.close()
    counts.append(count(runs))
    return counts, seconds, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="ten thousand programs from eight threads")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--layers", default="L1,L2")
    args = parser.parse_args()
    made: dict[str, Python] = {
        "L1": interpreter.Interpreter(interpreter.Limits(seconds=0.2)),
        "L2": process.CPython(process.Limits(seconds=0.2)),
    }
    lines = [
        "# What ten thousand programs leave behind",
        "",
        f"`python benchmarks/sandbox_soak.py --runs {args.runs} --threads {args.threads} "
        f"--layers {args.layers}` on {os.cpu_count()} cores ({platform.machine()}), "
        f"{date.today()}.",
        "",
        "Memory is resident MiB of this process and of its servers or workers; the last line of "
        "each layer is after `close()`.",
    ]
    for name in args.layers.split(","):
        counts, seconds, wrong = soak(made[name], args.runs, args.threads)
        columns = list(Count.__dataclass_fields__)
        lines += [
            "",
            f"## {name}",
            "",
            f"{args.runs / seconds:.0f} runs a second; {wrong} wrong.",
            "",
        ]
        lines += ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
        for c in counts:
            values = [getattr(c, column) for column in columns]
            cells = [f"{v:.1f}" if isinstance(v, float) else str(v) for v in values]
            lines.append("| " + " | ".join(cells) + " |")
        print("\n".join(lines[-len(counts) - 5 :]))
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
