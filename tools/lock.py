"""Writes requirements.lock and requirements-dev.lock from pyproject.toml, with ordinary pip.

    .venv/bin/python tools/lock.py            (a few minutes; needs a package index)

First pip resolves everything for this machine, then it is asked, without downloading, which file it
would take for each supported Python and platform; the hashes of all those files go into the lock.
torch and what only its CUDA build needs (nvidia, cuda, triton) are left out: the Makefile installs
torch first, because the right build depends on the machine.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TORCH = "torch==2.13.0"
LEFT_OUT = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*)$")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def _linux(machine: str) -> list[str]:
    old = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
    tags = []
    for minor in range(39, 4, -1):
        tags.append(f"manylinux_2_{minor}_{machine}")
        if minor in old:
            tags.append(f"{old[minor]}_{machine}")
    return tags


def _mac(machine: str, newest: int) -> list[str]:
    tags = [f"macosx_{major}_0_{arch}" for major in range(newest, 10, -1)
            for arch in (machine, "universal2")]  # fmt: skip
    tags += [f"macosx_10_{minor}_{arch}" for minor in range(16, 8, -1)
             for arch in (machine, "universal2")]  # fmt: skip
    return tags


# An older macOS takes other files than a newer one.
PLATFORMS = {
    "Linux x86-64": _linux("x86_64"),
    "Linux arm64": _linux("aarch64"),
    "macOS 15 arm64": _mac("arm64", 15),
    "macOS 12 arm64": _mac("arm64", 12),
    "macOS 15 x86-64": _mac("x86_64", 15),
    "macOS 12 x86-64": _mac("x86_64", 12),
}


def pip_report(*arguments: str) -> list[dict[str, Any]]:
    """What pip would install, from its own report. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--quiet",
                "--ignore-installed", "--report", str(report), *arguments,
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return json.loads(report.read_text())["install"]


def normal(name: str) -> str:
    """The one spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: list[str]) -> dict[str, str]:
    """name -> version of everything that the requirements need."""
    items = (item["metadata"] for item in pip_report(*requirements))
    return {normal(m["name"]): m["version"] for m in items}


def files_for(pins: list[str], python: str, platforms: list[str]) -> dict[str, str]:
    """name -> sha256 of the wheel that this Python takes there; missing ones are left out."""
    where = [f"--platform={tag}" for tag in platforms]
    options = ["--no-deps", "--only-binary=:all:", "--target=unused", f"--python-version={python}"]
    try:
        items = pip_report(*options, *where, *pins)
    except subprocess.CalledProcessError:
        if len(pins) == 1:
            return {}
        half = len(pins) // 2
        return files_for(pins[:half], python, platforms) | files_for(pins[half:], python, platforms)
    return {
        normal(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"]["sha256"]
        for item in items
    }


def write_lock(path: Path, pins: dict[str, str], hashes: dict[str, set[str]], note: str) -> None:
    """One requirement per block, sorted by name, hashes sorted."""
    lines = [f"# {note}", "# Written by tools/lock.py; do not edit.", ""]
    for name in sorted(pins):
        parts = [f"{name}=={pins[name]}", *(f"--hash=sha256:{h}" for h in sorted(hashes[name]))]
        lines.append(" \\\n    ".join(parts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Resolves, asks for all platforms, writes both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    build = [r for r in extras["dev"] if r.startswith("maturin")]
    parts = [*extras["report"], *extras["serve"], *build]
    core = [TORCH, *project["dependencies"][1:], *parts]
    print("resolving for this machine ...", flush=True)
    everything = resolve([*core, *extras["dev"]])
    constraints = [f"{name}=={version}" for name, version in everything.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        needed = resolve([*core, "-c", file.name])
    pins = {n: v for n, v in everything.items() if not LEFT_OUT.match(n)}
    hashes: dict[str, set[str]] = {name: set() for name in pins}
    for python in PYTHONS:
        for label, platforms in PLATFORMS.items():
            print(f"files for Python {python} on {label} ...", flush=True)
            found = files_for([f"{n}=={v}" for n, v in pins.items()], python, platforms)
            for name, sha256 in found.items():
                hashes[name].add(sha256)
            if missing := sorted(set(pins) - set(found)):
                print("  no wheel there:", ", ".join(missing))
    run = {n: v for n, v in pins.items() if n in needed}
    dev = {n: v for n, v in pins.items() if n not in needed}
    write_lock(ROOT / "requirements.lock", run, hashes, "What fledge runs on, without torch.")
    write_lock(
        ROOT / "requirements-dev.lock", dev, hashes, "What `make test` and `make check` add."
    )
    print(f"requirements.lock: {len(run)} packages; requirements-dev.lock: {len(dev)} more")


if __name__ == "__main__":
    main()
