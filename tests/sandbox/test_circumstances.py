"""The layers as root, as a user, without network, temporary folder, memory or rights.

Each circumstance starts a Python of its own. There a layer holds or is off with one sentence; where
it says that it holds, it runs a program and refuses an attack.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the circumstances are Linux's")

PACKAGE = Path(__file__).resolve().parents[2] / "python"
SCRIPT = """
import json
from fledge.sandbox import selftest
from fledge.sandbox.interpreter import Interpreter
from fledge.sandbox.process import CPython
found = {"L0": {"why": selftest.check_arithmetic()}}
for name, made in (("L1", Interpreter(workers=1)), ("L2", CPython(workers=1))):
    found[name] = {
        "why": made.why_unavailable(),
        "sum": made.run("print(6 * 7)").text,
        "attack": made.run("import os\\nos.listdir('/')").ok,
        "facts": getattr(made, "facts", None),
    }
    made.close()
print(json.dumps(found))
"""
AGAIN = """
import fledge, subprocess, sys
assert sys.version_info >= (3, 11)
subprocess.run([sys.executable, "-c", ""], check=True)
"""
NOBODY = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups"]
MOUNTED = ["unshare", "-m", "sh", "-c"]
CIRCUMSTANCES: dict[str, list[str]] = {
    "as it is": [],
    "ordinary user": NOBODY,
    "no network": ["unshare", "-n"],
    "/tmp read-only": [*MOUNTED, 'mount -t tmpfs -o ro none /tmp && exec "$@"', "sh"],
    "no /proc": [*MOUNTED, 'mount -t tmpfs -o ro none /proc && exec "$@"', "sh"],
    "512 MiB": ["prlimit", f"--as={512 << 20}"],
    "root without rights": ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"],
    "user without new rights": [*NOBODY, "--no-new-privs"],
    "root of a namespace": ["unshare", "-r"],
    "few descriptors": ["prlimit", "--nofile=64"],
    "few processes": ["prlimit", "--nproc=400"],
}


def run(wrapper: list[str], python: str, *words: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*wrapper, python, *words],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(PACKAGE), "PATH": os.environ["PATH"], "HOME": "/", **more},
        cwd="/",
    )


@functools.cache
def python_for(circumstance: str) -> str:
    """A Python that starts in this circumstance; skips where none does."""
    wrapper = CIRCUMSTANCES[circumstance]
    if wrapper and shutil.which(wrapper[0]) is None:
        pytest.skip(f"needs the program {wrapper[0]}")
    tried = ""
    for python in (sys.executable, "/usr/bin/python3"):  # ours may lie in root's own folder
        # setpriv may still reach a program that the user may not; a second start tells
        done = run(wrapper, python, "-c", AGAIN)
        if done.returncode == 0:
            return python
        tried = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "an old Python"
    pytest.skip(f"no Python starts here {circumstance}: {tried}")


def layers_in(circumstance: str, **more: str) -> dict[str, dict]:
    python = python_for(circumstance)
    done = run(CIRCUMSTANCES[circumstance], python, "-c", SCRIPT, **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, dict]) -> None:
    assert found["L0"]["why"] is None
    for name in ("L1", "L2"):
        layer = found[name]
        assert layer["attack"] is False
        if layer["why"] is None:
            assert layer["sum"] == "42"
        else:
            assert layer["why"] and "\n" not in layer["why"] and layer["why"] in layer["sum"]


@functools.cache
def as_it_is() -> dict[str, dict]:
    return layers_in("as it is")


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_layers_hold_or_are_off_with_a_sentence(circumstance: str) -> None:
    found = layers_in(circumstance)
    check(found)
    if as_it_is()["L2"]["why"] is None:
        assert found["L2"]["why"] is None  # it needs no privilege and no place to write


def test_nowhere_to_write(tmp_path: Path) -> None:
    check(layers_in("as it is", TMPDIR=str(tmp_path / "missing")))


def test_a_program_of_root_runs_as_nobody() -> None:
    if os.getuid() != 0 or as_it_is()["L2"]["why"] is not None:
        pytest.skip("needs root and L2")
    assert as_it_is()["L2"]["facts"]["uid"] == 65534
