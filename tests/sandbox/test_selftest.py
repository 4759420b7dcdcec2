"""A self-test that cannot fail is none: each wall is taken away, and the layer must be off."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from fledge.sandbox import arithmetic, process, selftest
from fledge.sandbox.interpreter import Interpreter
from fledge.sandbox.process import CPython
from fledge.sandbox.result import ToolResult

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="L2 is Linux's")

# what is done to the fork server before it starts, and what the sentence must say
HOLES = {
    "no seccomp": (
        "lockdown.RULES = {}\nlockdown.ALLOWED = {str(i): (i, i) for i in range(480)}\n",
        "came through: the program ",
    ),
    "no seccomp, no landlock": (
        "lockdown.ALLOWED = {str(i): (i, i) for i in range(480)}\n"
        "call = lockdown._call\n"
        "lockdown._call = lambda libc, n, *a: 0 if n == 446 else call(libc, n, *a)\n",
        "left a file",
    ),
    "no memory limit": ("lockdown.resource.RLIMIT_AS = lockdown.resource.RLIMIT_CORE\n", "memory"),
    "executable memory": (
        "del lockdown.RULES['mmap']\nlockdown.ALLOWED['mmap'] = (9, 222)\n",
        "execute",
    ),
    "sockets": (
        "lockdown.ALLOWED['socket'] = (41, 198)\n"
        "lockdown.resource.RLIMIT_NOFILE = lockdown.resource.RLIMIT_CORE\n",
        "makes an inet socket",
    ),
    "signals": (
        "lockdown.ALLOWED['kill'] = (62, 129)\n"
        "lockdown.landlock_attributes = lambda abi: bytes([1]) + bytes(7)\n",
        "signals the server",
    ),
    "metadata": ("lockdown.ALLOWED['newfstatat'] = (262, 79)\n", "sees a file's size"),
    "descriptors": ("lockdown.CLOSE_RANGE = 39\n", "holds a descriptor"),
    "environment": (
        "server.os.environ.__class__.clear = lambda self: None\n",
        "has an environment",
    ),
    "no deadline": (
        "server._readable = (lambda r: lambda fds, s: r(fds, s and s + 1.5))(server._readable)\n"
        "server.lockdown.resource.RLIMIT_CPU = 5\n",
        "",  # late, but ended
    ),
    "no landlock in the kernel": (
        "lockdown.landlock_abi = lambda: 0\n",
        "the kernel has no Landlock",
    ),
    "landlock refused": (
        "lockdown.LANDLOCK_RESTRICT_SELF = 9999\n",
        "Function not implemented",
    ),
    "seccomp refused": ("lockdown.PR_SET_SECCOMP = 9999\n", "Invalid argument"),
    "limits refused": (
        "def no(*a): raise ValueError('not allowed')\nlockdown.resource.setrlimit = no\n",
        "not allowed",
    ),
    "a server that breaks": ("server._preload = lambda: 1/0\n", "ended before it was ready"),
    "a child that breaks": ("server.run_program = lambda source: 1/0\n", "left without a result"),
}


@pytest.mark.parametrize("hole", HOLES)
def test_without_a_wall_it_is_off(hole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if CPythonIsOff.sentence() is not None:
        pytest.skip(f"L2 is off here anyway: {CPythonIsOff.sentence()}")
    damage, words = HOLES[hole]
    boot = process.BOOT.replace(
        "process_server.main",
        f"lockdown = process_server.lockdown\nserver = process_server\n{damage}process_server.main",
    )
    assert boot != process.BOOT
    monkeypatch.setattr(process, "BOOT", boot)
    with CPython(workers=1) as sandbox:
        reason = sandbox.why_unavailable()
        if not words:
            assert reason is None  # it still holds, only later
        if words:
            assert reason is not None and words in reason
            assert "\n" not in reason
            result = sandbox.run("print('ran')")
            assert not result.ok and result.stdout == "" and "unavailable" in result.text


class CPythonIsOff:
    """Asks once."""

    found: list[str | None] = []  # noqa: RUF012

    @classmethod
    def sentence(cls) -> str | None:
        if not cls.found:
            with CPython(workers=1) as sandbox:
                cls.found.append(sandbox.why_unavailable())
        return cls.found[0]


def test_the_canaries_notice_a_plain_python() -> None:
    """Run with no wall at all, nearly every attack of the self-test must come through."""
    import subprocess

    def plain(code: str) -> ToolResult:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            capture_output=True,
            text=True,
            env={"CANARY": "1"},
            timeout=60,
        )
        return ToolResult(ok=done.returncode == 0, stdout=done.stdout, stderr=done.stderr)

    harmless = {
        name: attack
        for name, attack in selftest.PROCESS_ATTACKS.items()
        if name.startswith(("reads", "sees", "lists", "knows", "makes", "maps"))
        and "packet" not in name
        and "folder" not in name
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "PROCESS_ATTACKS", harmless)
        sentence = selftest.check_process(plain, memory_bytes=1 << 20, run_briefly=plain)
    assert sentence is not None
    for name in set(harmless) - {"makes a process", "makes a process by libc"}:
        if name != "reads /proc" and "inet6" not in name:
            assert name in sentence or "reached a port" in sentence, (name, sentence)


def test_monty_is_off_if_an_attack_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    real = Interpreter._run

    def leaky(self: Interpreter, pool: object, code: str, *rest: object) -> ToolResult:
        if "environ" in code:
            return ToolResult(ok=True, stdout="/usr/bin\n")
        return real(self, pool, code, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Interpreter, "_run", leaky)
    with Interpreter(workers=1) as interpreter:
        reason = interpreter.why_unavailable()
        assert reason is not None and "came through Monty" in reason
        assert "unavailable" in interpreter.run("1").text


def test_the_calculator_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest.check_arithmetic() is None
    monkeypatch.setattr(arithmetic, "evaluate", lambda text: "1")
    assert "came through the calculator" in (selftest.check_arithmetic() or "")


def test_nothing_is_left_by_the_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.tempfile, "tempdir", str(tmp_path))
    with CPython(dataclasses.replace(process.Limits(), seconds=1.0), workers=1) as sandbox:
        sandbox.why_unavailable()
    assert list(tmp_path.iterdir()) == []
