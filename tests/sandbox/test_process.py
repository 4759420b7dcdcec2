"""L2: what CPython answers, what a program may use, and that lost processes are replaced."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.sandbox import process
from fledge.sandbox.process import CPython, Limits


@pytest.fixture(scope="module")
def cpython() -> Iterator[CPython]:
    with CPython(Limits(seconds=10.0), workers=2) as made:
        reason = made.why_unavailable()
        if reason is not None:
            pytest.skip(f"L2 is off here: {reason}")
        yield made


@pytest.fixture
def hasty(cpython: CPython) -> Iterator[CPython]:
    """One with short limits of its own."""
    with CPython(Limits(seconds=0.3, memory_bytes=64 << 20), workers=1) as made:
        yield made


def children(pid: int | str) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("7/2", "3.5"),
        ("'abc'", "abc"),
        ("print(1)\n2", "1\n2"),
        ("[1, 2.5, 'a', None, (1,)]", "[1, 2.5, 'a', None, (1,)]"),
        ("x = 3", ""),
        ("float('nan')", "nan"),
        ("", ""),
        ("# nothing\n", ""),
        ("import sys\nprint('e', file=sys.stderr)", "e"),
        ("'\\N{BULLET}' + 'caf\\u00e9'.encode('utf-16').decode('utf-16')", "\u2022caf\u00e9"),
        ("chr(0xd800)", "\\ud800"),
        ("__name__", "__main__"),
        ("import sys\n(sys.argv, sys.path, __import__('os').environ.copy())", "([''], [], {})"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)", "P(x=1)"),
        ("from typing import *\ndef f(a: 'List[int]'): pass\nget_type_hints(f)['a']", "List[int]"),
        ("import datetime\ndatetime.datetime.strptime('2020-02-03', '%Y-%m-%d').day", "3"),
        ("import statistics, fractions, decimal\nstatistics.mean([1, 2])", "1.5"),
        ("import hashlib\nhashlib.md5(b'').hexdigest()[:8]", "d41d8cd9"),
        ("import time\ntime.sleep(0.001)\ntime.time() > 1e9", "True"),
        ("import threading\nlen(threading.enumerate())", "1"),
    ],
)
def test_answers(cpython: CPython, code: str, text: str) -> None:
    result = cpython.run(code)
    assert result.ok, result
    assert result.text.replace("typing.", "") == text


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError: '(' was never closed (<program>, line 1)"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
        ("\ud800", "SyntaxError: the code is not Unicode text"),
        ("#" * 300_000, "the code is longer than 262144 bytes"),
        ("raise SystemExit", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("open('x')", "PermissionError: [Errno 1] Operation not permitted: 'x'"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import os\nos._exit(0)", "the program left without a result (exit code 0)"),
        ("import os\nos._exit(7)", "the program left without a result (exit code 7)"),
        ("import ctypes\nctypes.string_at(0)", "the program was ended by SIGSEGV"),
        ("assert 1 == 2", "AssertionError"),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
            "E",
        ),
    ],
)
def test_errors(cpython: CPython, code: str, error: str) -> None:
    result = cpython.run(code)
    assert not result.ok
    assert result.error == error or (result.error or "").startswith(error[:40])


def test_limits_in_words(hasty: CPython) -> None:
    memory = "MemoryError: the memory limit of 64 MB was exceeded"
    time = "TimeoutError: the time limit of 0.3 s was exceeded"
    assert hasty.run("x = bytearray(200_000_000)").error == memory
    assert hasty.run("x = []\nwhile True: x.append(bytearray(10**6))").error == memory
    assert hasty.run("bytearray(30_000_000) and 1").stdout == "1\n"
    loop = hasty.run("print('before')\nwhile True: pass")
    assert (loop.error, loop.stdout) == (time, "before\n")
    assert hasty.run("import time\ntime.sleep(60)").error == time
    flood = hasty.run("while True: print('spam' * 1000)")
    assert flood.truncated and not flood.ok and len(flood.stdout) == 16 * 1024
    long = hasty.run("print('a' * 100_000)")
    assert long.ok and long.truncated and len(long.stdout) == 16 * 1024


def test_a_result_cannot_be_another_run_s(cpython: CPython) -> None:
    forged = cpython.run('import os\nos.write(3, b\'{"run": 1, "status": 0}\' * 2)\nos._exit(0)')
    assert not forged.ok
    # its own success it can forge, as any program that judges itself
    assert cpython.run("import os\nos.write(3, b'{\"error\": null}')\nos._exit(0)").ok
    assert not cpython.run("import os\nos.write(3, b'{\"error\": null}')\nos._exit(1)").ok


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_whatever_the_child_writes_is_a_result(result: bytes, output: bytes) -> None:
    outcome = process._Outcome(bytearray(output), bytearray(output), bytearray(result))
    outcome.reply = {"run": 1, "status": 0, "timed_out": False}
    made = process._result(outcome, Limits())
    assert isinstance(made.text, str) and len(made.text) <= made.max_chars
    assert made.ok is (made.error is None)


def test_programs_see_nothing_of_each_other(cpython: CPython) -> None:
    cpython.run("SECRET = 'mother-of-pearl'\nprint(SECRET)\nimport math\nmath.leak = SECRET")
    # the server that forks both has never held the first program: look through all of its memory
    look = (
        "import gc, math\n"
        "word = ''.join(map(chr, [109, 111, 116, 104, 101, 114, 45, 111, 102]))\n"
        "names = [n for o in gc.get_objects() if isinstance(o, dict) for n in o.values()]\n"
        "found = [n for n in names if isinstance(n, str) and word in n and n != word]\n"
        "(found, hasattr(math, 'leak'), 'SECRET' in globals())"
    )
    assert cpython.run(look).stdout == "([], False, False)\n"
    assert cpython.run("import random\nrandom.random()").stdout == (
        cpython.run("import random\nrandom.random()").stdout
    )


def test_eight_threads_share_two_servers(cpython: CPython) -> None:
    cpython.run("1")
    open_before = len(os.listdir("/proc/self/fd"))
    code = "print({i})\n{i} + 1 if {i} % 4 else 1/0"
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda i: cpython.run(code.format(i=i)), range(160)))
    for i, result in enumerate(results):
        assert result.stdout == (f"{i}\n{i + 1}\n" if i % 4 else f"{i}\n")
        assert result.ok is bool(i % 4)
    servers = [s for s in children("self") if "process_server" in _command(s)]
    assert not any(children(s) for s in servers)  # no child is left, dead or alive
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2  # at most the second server's


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def _in_a_run(sandbox: CPython, act: object, code: str) -> process.ToolResult:
    """The result of `code`, with `act(server, child)` called while it runs."""
    server = sandbox._idle[-1].process.pid
    found: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(sandbox.run, code)
        while not running.done() and not found:
            found = children(server)
        act(server, found[0])  # type: ignore[operator]
        return running.result(timeout=60)


@pytest.mark.parametrize("victim", ["child", "server", "stopped server", "stopped child"])
def test_a_lost_process_is_an_error_and_a_fresh_one(
    cpython: CPython, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    seconds = 60.0 if "stopped" not in victim else 0.5

    def act(server: int, child: int) -> None:
        pid = child if "child" in victim else server
        os.kill(pid, signal.SIGSTOP if "stopped" in victim else signal.SIGKILL)

    with CPython(Limits(seconds=seconds), workers=1) as sandbox:
        assert sandbox.why_unavailable() is None
        server = sandbox._idle[-1].process.pid
        result = _in_a_run(sandbox, act, "while True: pass")
        assert not result.ok
        assert (result.error or "") == {
            "child": "the program was ended by SIGKILL",
            "server": "the sandbox could not run the code: its process was lost",
            "stopped server": "the sandbox could not run the code: the fork server does not answer",
            "stopped child": "TimeoutError: the time limit of 0.5 s was exceeded",
        }[victim]
        assert sandbox.run("6 * 7").stdout == "42\n"
        assert (server in children("self")) is ("child" in victim)


def test_a_server_that_died_between_runs_is_replaced(cpython: CPython) -> None:
    with CPython(workers=1) as sandbox:
        assert sandbox.run("1").ok
        dead = sandbox._idle[-1].process
        dead.kill()
        dead.wait()
        assert sandbox.run("2").stdout == "2\n"


def test_closing_ends_the_servers_also_in_a_run(cpython: CPython) -> None:
    before = set(children("self"))
    sandbox = CPython(Limits(seconds=5.0), workers=2)
    assert sandbox.run("1").ok
    assert len(set(children("self")) - before) == 1
    result = _in_a_run(sandbox, lambda *_: sandbox.close(), "import time\ntime.sleep(0.2)\n3")
    assert result.stdout == "3\n"
    assert set(children("self")) == before
    assert sandbox.run("4").stdout == "4\n"
    sandbox.close()
    sandbox.close()
    assert set(children("self")) == before


def test_the_server_ends_with_its_parent(cpython: CPython) -> None:
    script = (
        "from fledge.sandbox.process import CPython\nimport os\nc = CPython(workers=1)\n"
        "assert c.run('1').ok\nprint(c._idle[0].process.pid, flush=True)\nos._exit(9)"
    )
    read, write = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", script],
        {**os.environ, "PYTHONPATH": str(Path(process.__file__).parents[2])},
        file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
    )
    os.close(write)
    with os.fdopen(read) as lines:
        server = int(lines.readline())
        try:
            watch = os.pidfd_open(server)
        except ProcessLookupError:
            watch = None
    os.waitpid(pid, 0)
    if watch is not None:
        import select

        assert select.select([watch], [], [], 60)[0], "the server outlived its parent"
        os.close(watch)


@pytest.mark.parametrize(
    ("system", "machine", "executable", "words"),
    [
        ("darwin", "arm64", "/usr/bin/python", "it needs Linux"),
        ("win32", "AMD64", "python.exe", "it needs Linux"),
        ("linux", "riscv64", "/usr/bin/python", "x86_64 and aarch64 only, and this is riscv64"),
        ("linux", "x86_64", "", "it needs the path of a Python program"),
        ("linux", "x86_64", "/nowhere/python", "the fork server does not start"),
        ("linux", "x86_64", "/bin/true", "the fork server does not start: /bin/true ended"),
    ],
)
def test_where_it_cannot_be_it_is_off_with_a_sentence(
    system: str, machine: str, executable: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    sandbox = CPython(workers=1)
    sandbox.executable = executable
    assert words in (sandbox.why_unavailable() or "")
    result = sandbox.run("print('ran')")
    assert not result.ok and result.stdout == "" and words in result.text
    assert "\n" not in result.text


def test_start_up_is_shared_by_threads(cpython: CPython) -> None:
    with CPython(workers=2) as sandbox:
        barrier = threading.Barrier(4)

        def run(i: int) -> str:
            barrier.wait()
            return sandbox.run(str(i)).stdout

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(run, range(4))) == ["0\n", "1\n", "2\n", "3\n"]
        assert len(sandbox._idle) <= 2


def test_the_messages_are_json(cpython: CPython) -> None:
    assert json.loads(json.dumps(cpython.facts)).keys() == {"landlock", "uid"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os\nos.write(3, b'{\"run\":1}')\nos._exit(7)", "without a result"),
        ("raise Exception(chr(0xd800))", "Exception: "),
        ("import os\nos.write(3, b'{\"refused\":\"' + b'A' * 8000 + b'\"}')\nos._exit(0)", "AAA"),
    ],
)
def test_what_a_program_says_of_itself_is_short_and_can_be_written(
    cpython: CPython, code: str, message: str
) -> None:
    result = cpython.run(code)
    assert not result.ok and message in (result.error or "")
    assert len((result.error or "").encode()) < 700
