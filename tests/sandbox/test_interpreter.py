"""L1: what Monty answers, what it keeps, and that its limits hold. Short limits keep this quick."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fledge.sandbox.interpreter import Interpreter, InterpreterState, Limits, format_result

pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter(Limits(seconds=0.3), workers=2) as made:
        assert made.why_unavailable() is None
        yield made


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("7/2", "3.5"),
        ("10/2", "5"),
        ("'abc'", "abc"),
        ("print(1)\n2", "1\n2"),
        ("[1, 2.5, 'a', None, (1,)]", "[1, 2.5, 'a', None, (1,)]"),
        ("{'a': {1}}", "{'a': {1}}"),
        ("x = 3", ""),
        ("float('nan')", "nan"),
        ("import math\nmath.gcd(12, 18)", "6"),
        ("import string\nstring.ascii_lowercase[:3]", "abc"),
        ("class A:\n    pass\nA()", "<A object at 0x50>"),
        ("import time\ntime.sleep(60)", ""),
    ],
)
def test_answers(interpreter: Interpreter, code: str, text: str) -> None:
    result = interpreter.run(code)
    assert (result.ok, result.text) == (True, text), result


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("1/0", "ZeroDivisionError: division by zero"),
        ("x = (", "SyntaxError"),
        ("while True: pass", "TimeoutError: the time limit of 0.3 s was exceeded"),
        ("try:\n  while True: pass\nexcept BaseException:\n  while True: pass", "TimeoutError"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("'a' * 10**10", "MemoryError: the memory limit of 64 MB was exceeded"),
        ("9**9**9", "MemoryError"),
        ("x = [0] * 30_000_000", "MemoryError"),
        ("10**5000", "ValueError"),
        ("open('/etc/passwd').read()", "PermissionError"),
        ("import os\nos.listdir('/')", "Error"),
        ("import os\nos.environ", "Error"),
        ("import socket", "ModuleNotFoundError"),
        ("import subprocess", "ModuleNotFoundError"),
        ("import ctypes", "ModuleNotFoundError"),
        ("input()", "NameError"),
        ("().__class__.__bases__[0].__subclasses__()", "Error"),
        ("'{0.__class__.__init__.__globals__}'.format(1)", "Error"),
        ("raise SystemExit", "SystemExit"),
    ],
)
def test_errors_and_limits(interpreter: Interpreter, code: str, error: str) -> None:
    result = interpreter.run(code)
    assert not result.ok
    assert error in (result.error or ""), result


def test_output_is_capped(interpreter: Interpreter) -> None:
    result = interpreter.run("print('a' * 1_000_000)")
    assert result.truncated and len(result.stdout) == 16 * 1024
    assert len(result.text) == 1000
    flood = interpreter.run("while True: print('spam')")
    assert not flood.ok and flood.truncated and len(flood.stdout) <= 16 * 1024


@pytest.mark.parametrize(
    "code",
    [
        "x = [0]\nfor _ in range(60): x = [x, x]\nx",
        "{i * (2**61 - 1): 0 for i in range(100_000)}",
        "x = ()\nfor _ in range(100_000): x = (x,)\nx",
        "raise ValueError({i * (2**61 - 1): 0 for i in range(100_000)})",
    ],
)
def test_a_value_costs_the_worker_and_not_this_process(interpreter: Interpreter, code: str) -> None:
    before = time.process_time()
    result = interpreter.run(code)
    assert time.process_time() - before < 0.25
    assert len(result.stdout) <= 16 * 1024 + 1


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("import math; math.sqrt(16)", "4"),
        ("[1,\n2,\n3]", "[1, 2, 3]"),
        ("f = lambda *a, **k: (a, k)\nf(\n1,\n2\n)", "((1, 2), {})"),
        ("x = '''\na;b\n'''\nx", "\na;b"),
        ("x = \\\n5", ""),
        ("x = 5\nif x:\n    x", ""),
        ("5  # five", "5"),
        ("1\n# end", "1"),
        ("';x'", ";x"),
        ("# only\n", ""),
        ("None", ""),
        (
            "print('a')\neval('(')",
            "a\nSyntaxError: unexpected EOF while parsing (<string>, line 1)",
        ),
    ],
)
def test_the_last_expression_is_found(interpreter: Interpreter, code: str, text: str) -> None:
    assert interpreter.run(code).text == text


def test_code_that_is_too_long(interpreter: Interpreter) -> None:
    assert "longer than" in interpreter.run("#" * 100_000).text


def test_state_lasts_and_survives_errors_and_limits(interpreter: Interpreter) -> None:
    state = InterpreterState()
    assert interpreter.run("x = 1", state).ok
    assert not interpreter.run("y = x + 1\n1/0", state).ok
    assert interpreter.run("y", state).text == "2"
    assert not interpreter.run("x = 99\nwhile True: pass", state).ok
    assert interpreter.run("x", state).text == "1"
    assert interpreter.run("import time\ntime.sleep(60)\nx", state).text == "1"
    assert interpreter.run("import string\nlen(string.digits)", state).text == "10"
    assert not interpreter.run("z = 'a' * 5_000_000\nlen(y)", state).ok  # len of an int
    assert "NameError" in interpreter.run("z", state).text  # over what a state may hold


def test_randomness_is_the_same_in_every_conversation(interpreter: Interpreter) -> None:
    code = "import random\nrandom.randint(0, 10**9)"
    assert interpreter.run(code).text == interpreter.run(code).text


def test_threads_share_the_pool(interpreter: Interpreter) -> None:
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda i: interpreter.run(f"x = {i}\nx + 1").text, range(64)))
    assert texts == [str(i + 1) for i in range(64)]


def test_closing_ends_the_workers_and_a_later_run_starts_new_ones() -> None:
    interpreter = Interpreter(workers=1)
    before = _children()
    assert interpreter.run("1 + 1").text == "2"
    assert len(_children() - before) == 1
    interpreter.close()
    assert _children() - before == set()
    assert interpreter.run("1 + 2").text == "3"
    interpreter.close()
    interpreter.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_worker_is_an_error_and_a_fresh_one(how: signal.Signals) -> None:
    before = _children()
    seconds = 60.0 if how == signal.SIGKILL else 0.2  # a stopped one is given up after 2 s + 3
    with Interpreter(Limits(seconds=seconds), workers=1) as interpreter:
        assert interpreter.why_unavailable() is None
        (worker,) = _children() - before
        if how == signal.SIGSTOP:
            os.kill(int(worker), how)
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(interpreter.run, "while True: pass")
            while how == signal.SIGKILL and not _is_busy(worker):
                pass
            os.kill(int(worker), how)
            result = running.result(timeout=60)
        assert not result.ok and result.error
        assert interpreter.run("6 * 7").text == "42"
        assert worker not in _children()


def _is_busy(worker: str) -> bool:
    """Whether the worker has computed for a tenth of a second."""
    fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) >= os.sysconf("SC_CLK_TCK") / 10


def _children() -> set[str]:
    """The process ids of our children, by any thread (Linux)."""
    tasks = Path("/proc/self/task")
    if not (tasks / str(threading.get_native_id()) / "children").exists():
        pytest.skip("/proc does not list children here")
    return {pid for t in tasks.iterdir() for pid in (t / "children").read_text().split()}


def test_a_missing_binary_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONTY_BIN", "/nonexistent/monty")
    with Interpreter() as interpreter:
        reason = interpreter.why_unavailable()
        assert reason is not None and "do not start" in reason
        assert "unavailable" in interpreter.run("1").text


def test_format_result() -> None:
    assert format_result("a" * 50, 10) == "aaaaaaa..."
    assert format_result((), 100) == "()"
    assert format_result(set(), 100) == "set()"
