"""L1, the default Python of a model: pydantic-monty, an interpreter with no way out.

Monty is a Python interpreter written in Rust that runs in worker processes: it has no files, no
network, no environment and no imports of real modules by construction; memory, time and recursion
are limited inside the worker, and a worker that dies is replaced. Called by `fledge.engine.tools`
(whatever L0 does not take) and by the HumanEval task. One `InterpreterState` per conversation keeps
the variables between calls as bytes, so that a conversation holds no process while it waits. This
module never runs model code in our own process, never passes it a host function, and where Monty is
missing it says so instead of falling back to something weaker.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any

from fledge.sandbox import selftest
from fledge.sandbox.arithmetic import format_value
from fledge.sandbox.result import ToolError, ToolResult, shorten

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    seconds: float = 2.0
    memory_bytes: int = 64 * MIB
    output_chars: int = 16 * 1024
    code_chars: int = 64 * 1024
    recursion: int = 500
    state_bytes: int = 4 * MIB  # of variables kept between the calls of one conversation


@dataclass
class InterpreterState:
    """The variables of one conversation between two calls (opaque bytes that Monty wrote)."""

    dump: bytes | None = field(default=None, repr=False)


class Interpreter:
    """A pool of Monty workers; use it as a context manager or call `close()`.

    Workers start with the first run. `run` may be called from several threads at once.
    """

    def __init__(self, limits: Limits | None = None, *, workers: int | None = None) -> None:
        self.limits = limits or Limits()
        self.workers = workers or min(4, os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._pool: Any = None
        self._monty: ModuleType | None = None
        self._unavailable: str | None = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def why_unavailable(self) -> str | None:
        """None if code can be run here, else the sentence that says why not and what helps.

        The first workers are put to the canary attacks of `selftest`; one that comes through
        switches the layer off for good.
        """
        self._start()
        return self._unavailable

    def close(self) -> None:
        """Ends the workers; a later `run` starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.__exit__(None, None, None)

    def run(self, code: str, state: InterpreterState | None = None) -> ToolResult:
        """Runs `code`; its prints and the value of a last expression are the result's stdout.

        With a `state` the variables of earlier calls are there and the new ones are kept, unless
        the call ran into a limit, which leaves the state as it was. Never raises for what the code
        does.
        """
        started = time.perf_counter()
        pool = self._start()
        if pool is None:
            return _failed(f"unavailable: {self._unavailable}", started)
        return self._run(pool, code, state, started)

    def _run(
        self, pool: Any, code: str, state: InterpreterState | None, started: float
    ) -> ToolResult:
        assert self._monty is not None
        if len(code) > self.limits.code_chars:
            return _failed(f"the code is longer than {self.limits.code_chars} characters", started)
        output = _Output(self.limits.output_chars)
        try:
            with pool.checkout(**self._checkout_options()) as session:
                error = self._feed(session, code, state, output)
        except self._monty.MontyError as problem:  # the worker died or could not be reached
            error = _describe(problem, self.limits)
        except (TimeoutError, OSError, RuntimeError) as problem:
            error = f"the sandbox could not run the code: {problem}"
        return ToolResult(
            ok=error is None,
            stdout=output.text("stdout"),
            stderr=output.text("stderr"),
            error=error,
            ms=(time.perf_counter() - started) * 1e3,
            truncated=output.truncated,
        )

    def _feed(
        self, session: Any, code: str, state: InterpreterState | None, output: _Output
    ) -> str | None:
        """Runs `code` in a checked-out session; the error in words, or None."""
        assert self._monty is not None
        if state is not None and state.dump is not None:
            session.load_session(state.dump)
        error = None
        try:
            value = self._value_of(session, code, output)
            if value is not None:
                output.take("stdout", format_result(value, self.limits.output_chars) + "\n")
        except (self._monty.MontyRuntimeError, self._monty.MontySyntaxError) as problem:
            if output.flooded:
                return "the output limit was exceeded"
            error = _describe(problem, self.limits)
            if _hit_a_limit(problem):
                return error
        except (ValueError, OverflowError, RecursionError) as problem:  # a value too big to show
            error = f"{type(problem).__name__}: {problem}"
        except OutputFlood:
            return "the output limit was exceeded"
        if state is not None:
            dump = session.dump()
            if len(dump) <= self.limits.state_bytes:
                state.dump = dump
        return error

    def _value_of(self, session: Any, code: str, output: _Output) -> int | float | str | None:
        """Runs `code`; a last expression's value, as text unless it is a number.

        Monty would hand the value itself over, and a dict whose keys collide takes this process
        minutes to build. So the value is kept in a variable and turned into text in the sandbox.
        """
        assert self._monty is not None
        for program in keeping_last_value(code):
            output.started = False
            try:
                session.feed_run(program + _END, print_callback=output.take)
            except self._monty.MontySyntaxError:
                if output.started:  # its own, from eval
                    raise
                continue
            most = str(self.limits.output_chars + 2)
            text = session.feed_run(_TAKE_VALUE.replace("MOST", most))
            return (_number(text[1:]) if text[0] == "n" else text[1:]) if text else None
        session.feed_run(code + _END, print_callback=output.take)
        return None

    def _checkout_options(self) -> dict[str, Any]:
        assert self._monty is not None
        return {
            "limits": {
                "max_feed_duration_secs": self.limits.seconds,
                "max_memory": self.limits.memory_bytes,
                "max_recursion_depth": self.limits.recursion,
                "max_suspensions": 100,
            },
            # sleeping would hold a worker; a fixed seed keeps rollouts reproducible
            "os_policy": {"sleep": "zero", "random_start": {"seed": 0}},
            "assert_message_annotations": False,
            "external_modules": {"string": self._monty.ExternalModule(_string_constants())},
        }

    def _start(self) -> Any:
        """The running pool, or None with `_unavailable` set."""
        with self._lock:
            if self._pool is not None or self._unavailable is not None:
                return self._pool
            try:
                monty = self._monty = importlib.import_module("pydantic_monty")
            except ImportError:
                self._unavailable = (
                    "the Python sandbox needs the package pydantic-monty; "
                    "install it with `pip install pydantic-monty`"
                )
                return None
            try:
                pool = monty.Monty(
                    min_processes=1,
                    max_processes=self.workers,
                    checkout_timeout=30.0 + 2 * self.limits.seconds,
                    request_timeout=2 * self.limits.seconds + 3.0,
                    max_checkouts_per_worker=100,
                )
                pool.__enter__()
            except (OSError, RuntimeError, monty.MontyError) as problem:
                self._unavailable = f"the workers of pydantic-monty do not start: {problem}"
                return None
            self._unavailable = selftest.check_interpreter(
                lambda code: self._run(pool, code, None, time.perf_counter())
            )
            if self._unavailable is not None:
                pool.__exit__(None, None, None)
                return None
            self._pool = pool
            return pool


class OutputFlood(Exception):
    """Raised into the print callback to stop listening to a program that prints without end."""


class _Output:
    """Collects prints up to a number of characters and counts what came after them."""

    FLOOD_FACTOR = 64  # stop listening at this multiple of the kept characters

    def __init__(self, max_chars: int) -> None:
        self.max_chars = max_chars
        self.parts: list[tuple[str, str]] = []
        self.seen = 0
        self.flooded = False
        self.started = False  # the program was accepted

    @property
    def truncated(self) -> bool:
        return self.seen > self.max_chars

    def take(self, stream: str, text: str) -> None:
        """The print callback: keeps what still fits."""
        if not self.started and _MARK in text:
            self.started, text = True, text.replace(_MARK, "", 1).removeprefix("\n")
        room = self.max_chars - self.seen
        self.seen += len(text)
        if room > 0:
            self.parts.append((stream, text[:room]))
        if self.seen > self.FLOOD_FACTOR * self.max_chars:
            self.flooded = True
            raise OutputFlood

    def text(self, stream: str) -> str:
        return "".join(text for name, text in self.parts if name == stream)


_VALUE = "_fledge_value"
_MARK = "\0fledge: parsed"
MAX_SPLITS = 12
# Always text, and looked up under names that a program may have taken: an f-string is text whatever
# `type` or `isinstance` have become. The first letter says what it is: text, number, repr.
_TAKE_VALUE = (
    f'[(f"t{{{_VALUE}}}" if isinstance({_VALUE}, str) else "" if {_VALUE} is None else '
    f'f"n{{{_VALUE}!r}}" if type({_VALUE}) in (int, float, bool) else f"r{{{_VALUE}!r}}")[:MOST], '
    f"({_VALUE} := None)][0]"
)
_END = "\npass\nNone"  # `pass` goes on with no expression before it; None is then the value


def keeping_last_value(code: str) -> Iterator[str]:
    """`code` with its last expression assigned to a variable, cut at ever earlier places.

    Only the right cut is a program: the others leave a bracket or string open, or put a statement
    where none may be, so Monty refuses them before anything runs. Without a last expression none
    is. Each prints _MARK first, which shows that it was accepted.
    """
    ends = [m.start() for m in _STATEMENT.finditer(code)][-MAX_SPLITS:]
    for start in reversed(ends):
        separator = code[start - 1 : start]
        # "if 1:" cannot stand inside brackets, where a bare assignment would be a keyword argument
        begin = "" if separator == ";" else "if 1: "
        yield f"print({_MARK!r})\n{code[:start]}{begin}{_VALUE} = ({code[start:]}\n)"


def _number(text: str) -> int | float | str:
    """The number that a repr tells; the text itself if it tells none."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


# where a statement may begin: a line's first column, or after a semicolon
_STATEMENT = re.compile(r"^(?=[^\s#)\]}])|(?<=;)(?=.)", re.MULTILINE)


def format_result(value: Any, max_chars: int) -> str:
    """A last expression's value as text of at most `max_chars` characters.

    Numbers look as the calculator shows them, a string stands for itself, the rest is its repr.
    """
    if isinstance(value, str):
        return shorten(value, max_chars)
    if type(value) in (int, float, bool):
        try:
            return shorten(format_value(value), max_chars)
        except ToolError:  # inf and nan, which the calculator never shows
            return repr(value)
    return shorten(repr(value), max_chars)


def _describe(problem: Any, limits: Limits) -> str:
    """An error in one line, without the parts that differ from run to run."""
    display = getattr(problem, "display", None)
    text = display(format="type-msg") if display is not None else str(problem)
    if text.startswith("TimeoutError: feed time limit") or getattr(problem, "timed_out", False):
        return f"TimeoutError: the time limit of {limits.seconds:g} s was exceeded"
    if text.startswith(("MemoryError: memory limit", "MemoryError: the worker")):
        return f"MemoryError: the memory limit of {limits.memory_bytes // MIB} MB was exceeded"
    return shorten(text, 500)


def _hit_a_limit(problem: Any) -> bool:
    """True after a limit: the heap is in no known state and must not be kept."""
    return problem.display(format="type-msg").startswith(("TimeoutError", "MemoryError"))


def _failed(error: str, started: float) -> ToolResult:
    return ToolResult(ok=False, error=error, ms=(time.perf_counter() - started) * 1e3)


def _string_constants() -> dict[str, Any]:
    """The constants of the standard module `string`, which Monty lacks (two HumanEval items)."""
    lower = "abcdefghijklmnopqrstuvwxyz"
    punctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
    letters, digits, whitespace = lower + lower.upper(), "0123456789", " \t\n\r\x0b\x0c"
    return {
        "ascii_lowercase": lower,
        "ascii_uppercase": lower.upper(),
        "ascii_letters": letters,
        "digits": digits,
        "hexdigits": digits + "abcdefABCDEF",
        "octdigits": "01234567",
        "punctuation": punctuation,
        "whitespace": whitespace,
        "printable": digits + letters + punctuation + whitespace,
    }
