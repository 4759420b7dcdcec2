"""L0: right answers, the format of the training data, and no way to make it work hard."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.sandbox.arithmetic import NotArithmetic, evaluate
from fledge.sandbox.result import ToolError


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("(347+58)*3", "1215"),
        ("7/2", "3.5"),
        ("10/2", "5"),
        ("0.1+0.2", "0.3"),
        ("2/3", "0.6666666667"),
        ("48/2", "24"),
        ("0.2*50", "10"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("-0.0", "0"),
        ("2**10", "1024"),
        ("2**-1", "0.5"),
        ("1<<10", "1024"),
        ("1e5", "100000"),
        ("1e22/3", "3.333333333e+21"),
        ("1_000*2", "2000"),
        (".5*.5", "0.25"),
        ("  5 + 5 ", "10"),
        ('"lantern".count("n")', "2"),
        ("'a1b'.count('1')", "1"),
        ('len("abc")', "3"),
        ('"Abc".upper()', "ABC"),
        ('"Abc".lower().count("a")', "1"),
        ("round(2.567, 1)", "2.6"),
        ("abs(-3) + max(1, 2.5) + min(4, 5)", "9.5"),
        ("int(7/2)", "3"),
        ("17 > 5", "True"),
        ("2**4000 % 7", str(2**4000 % 7)),
    ],
)
def test_answers(expression: str, text: str) -> None:
    assert evaluate(expression) == text


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1/0", "ZeroDivisionError"),
        ("1//0.0", "ZeroDivisionError"),
        ("0**-1", "ZeroDivisionError"),
        ("1e308*10", "OverflowError"),
        ("1e400", "OverflowError"),
        ("1<<-1", "ValueError"),
        ("1.5<<2", "TypeError"),
    ],
)
def test_errors_of_arithmetic(expression: str, message: str) -> None:
    with pytest.raises(ToolError, match=message) as caught:
        evaluate(expression)
    assert not isinstance(caught.value, NotArithmetic)


HOSTILE = [
    "9**9**9", "2**4096", "1<<10**10", "10**10**10", "(2**4000)*(2**4000)", "2**(2**70)",
    "round(5,-10**9)", "1<<2**70", "-" * 500 + "1", "(" * 250 + "1" + ")" * 250, "1+" * 250 + "1",
    "'a'*10**10", "'a'.ljust(400000000).count('a')", "'a'.__class__", "().__class__.__bases__",
    "__import__('os').system('id')", "open('/etc/passwd').read()", "(lambda: 1)()", "x", "[1]*9",
    "f'{1}'", "f'{().__class__}'", "'{0.__class__}'.format(1)", "'%99999999d' % 1", "1j", "True",
    "1 if 1 else 2", "1 and 2", "not 1", "(1,2)", "1,000", "print(1)", "eval('1')", "len([1])",
    "'a'.count", "'a'.count('a', 0)", "max(*[1,2])", "round(number=1)", "1or 2", "0x1for x in 1",
    "'\\d'", "1;2", "x:=1", "(x:=1)", "1\n2", "", " ", "\0", "\ud800", "1 # comment", "1 is 1",
    "1 < 2 < 3", "(-8)**0.5", "9" * 513, "0" * 500 + "1", "b'a'.count(b'a')", "...", "@", "1 +",
]  # fmt: skip


@pytest.mark.parametrize("expression", HOSTILE)
def test_anything_else_is_refused(expression: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotArithmetic):
            evaluate(expression)


def test_the_hardest_input_is_still_quick() -> None:
    worst = [*HOSTILE, "*".join(["2**80"] * 50), "-" * 60 + "1", "'" + "a" * 505 + "'.upper()"]
    times = []
    for expression in worst * 10:
        started = time.perf_counter()
        with contextlib.suppress(ToolError):
            evaluate(expression)
        times.append(time.perf_counter() - started)
    # the gate is p99 <= 1 ms (benchmarks measure it); a loaded test machine gets slack
    assert sorted(times)[len(times) * 9 // 10] < 0.01


numbers = st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6, allow_nan=False).map(
    lambda f: round(f, 3)
)
operators = st.sampled_from(["+", "-", "*", "/", "//", "%"])


@settings(max_examples=200, deadline=None)
@given(numbers, operators, numbers, operators, st.integers(1, 50))
def test_it_agrees_with_python(a: float, op1: str, b: float, op2: str, c: int) -> None:
    from fledge.sandbox.arithmetic import format_value

    expression = f"({a} {op1} {b}) {op2} {c}"
    try:
        expected = _python(op2, _python(op1, a, b), c)
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="ZeroDivisionError"):
            evaluate(expression)
    else:
        assert evaluate(expression) == format_value(expected)


def _python(op: str, a: float, b: float) -> float:
    return {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "//": lambda: a // b,
        "%": lambda: a % b,
    }[op]()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.+-*/%()eE<>= \"'abcoutlnx,_\\#", max_size=60))
def test_no_text_does_anything_but_answer_or_refuse(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(ToolError):
            assert isinstance(evaluate(text), str)


def test_threads_may_calculate_at_the_same_time():
    # CPython 3.11 fails here without a lock: the collector lets another thread in while it builds
    class Cycle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            time.sleep(0)  # gives the interpreter away

    failed: list[BaseException] = []

    def work(depth: int) -> None:
        try:
            for number in range(300):
                Cycle()
                with contextlib.suppress(ToolError):
                    evaluate("(" * depth + f"{number}+1" + ")*2" * depth)
        except BaseException as error:
            failed.append(error)

    threshold = gc.get_threshold()
    gc.set_threshold(20)
    try:
        threads = [threading.Thread(target=work, args=(3 + 3 * n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*threshold)
    assert not failed
