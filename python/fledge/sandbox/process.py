"""L2, real CPython for HumanEval and power users: one locked process for every program.

A program runs in a child of a fork server (`process_server`) that is exec'd once with an empty
environment; the child locks itself down with rlimits, Landlock and seccomp (`lockdown`) before it
reads the program as Python. Linux on x86-64 and aarch64, as any user, no privilege needed. Before
the first program a self-test (`selftest`) attacks the walls; where one gives way, or the kernel
lacks one, L2 is off and `why_unavailable` says so in a sentence: it never runs with less.

Only the operator's code makes a `CPython`; no prompt, model or request can. Nothing that comes from
the child is trusted: it can print and return what it likes within its own pipes and bounds. It
could also forge success of its own run, as any program that is its own judge can.
"""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from fledge.sandbox import selftest
from fledge.sandbox.interpreter import MIB, InterpreterState
from fledge.sandbox.result import ToolResult, shorten

# What the server's Python is told: where fledge lies, whose child it is, where its socket is.
BOOT = """\
import os, sys
root, parent, control = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.dup2(control, 3)
os.closerange(4, 4096)
sys.path.append(root)
from fledge.sandbox import process_server
process_server.main(parent)
"""
START_SECONDS = 60.0  # of a fork server on a very busy machine
GRACE_SECONDS = 5.0  # after which a server that should have answered is given up
RESULT_BYTES = 8192
FLOOD_FACTOR = 64  # a program is stopped at this multiple of the output that is kept


@dataclass(frozen=True)
class Limits:
    """What one program may use; memory is on top of what an empty Python needs."""

    seconds: float = 2.0
    memory_bytes: int = 256 * MIB
    output_bytes: int = 16 * 1024
    code_bytes: int = 256 * 1024


class CPython:
    """A pool of fork servers, each running one program at a time; close it or use `with`.

    Servers start when they are needed. `run` may be called from any number of threads.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        executable: str | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.workers = workers or min(
            8, 2 * (os.cpu_count() or 1)
        )  # a run waits a third of its time
        self.executable = executable or sys.executable
        self.facts: dict[str, Any] = {}
        """After the self-test: {"landlock": version, "uid": of the programs}."""
        self._slots = threading.Semaphore(self.workers)
        self._lock = threading.Lock()
        self._idle: list[_Server] = []
        self._generation = 0
        self._test_lock = threading.Lock()
        self._tested = False
        self._unavailable: str | None = None

    def __enter__(self) -> CPython:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def why_unavailable(self) -> str | None:
        """None if programs can be run here, else the sentence that says why not.

        The first call starts a server and attacks it; the answer stays the same after that.
        """
        with self._test_lock:
            if not self._tested:
                self._unavailable = self._self_test()
                self._tested = True
                if self._unavailable is not None:
                    self.close()
        return self._unavailable

    def close(self) -> None:
        """Ends the servers; a later `run` starts new ones."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._generation += 1
        for server in idle:
            server.end()

    def run(self, code: str, state: InterpreterState | None = None) -> ToolResult:
        """Runs `code`; its prints and the value of a last expression are the result's stdout.

        Every run begins afresh: `state`, which L1 fills, is left alone. Never raises for what the
        code does.
        """
        started = time.perf_counter()
        reason = self.why_unavailable()
        if reason is not None:
            result = ToolResult(ok=False, error=f"unavailable: {reason}")
        else:
            result = self._run(code, self.limits)
        return replace(result, ms=(time.perf_counter() - started) * 1e3)

    def _run(self, code: str, limits: Limits) -> ToolResult:
        try:
            program = code.encode()
        except UnicodeEncodeError:
            return ToolResult(ok=False, error="SyntaxError: the code is not Unicode text")
        if len(program) > limits.code_bytes:
            return ToolResult(ok=False, error=f"the code is longer than {limits.code_bytes} bytes")
        if not self._slots.acquire(timeout=30.0 + 2 * limits.seconds):
            return ToolResult(ok=False, error="the sandbox is busy")
        try:
            server, generation = self._take()
            try:
                outcome = server.run(program, limits)
            except BaseException:
                server.end()
                raise
            self._put_back(server, generation)
            return _result(outcome, limits)
        except (OSError, _Gone) as problem:
            return ToolResult(ok=False, error=f"the sandbox could not run the code: {problem}")
        finally:
            self._slots.release()

    def _take(self) -> tuple[_Server, int]:
        """An idle server that lives, or a new one."""
        while True:
            with self._lock:
                generation = self._generation
                server = self._idle.pop() if self._idle else None
            if server is None:
                return _Server(self.executable), generation
            if server.lives():
                return server, generation
            server.end()

    def _put_back(self, server: _Server, generation: int) -> None:
        with self._lock:
            if generation == self._generation:
                self._idle.append(server)
                return
        server.end()  # closed meanwhile

    def _self_test(self) -> str | None:
        reason = why_not_here(self.executable)
        if reason is not None:
            return reason
        try:
            server = _Server(self.executable)
        except (OSError, _Gone) as problem:
            return f"the fork server does not start: {problem}"
        self.facts = server.facts
        self._put_back(server, self._generation)
        patient = replace(self.limits, seconds=max(10.0, self.limits.seconds))
        brief = replace(self.limits, seconds=0.1)
        return selftest.check_process(
            lambda code: self._run(code, patient),
            memory_bytes=self.limits.memory_bytes,
            run_briefly=lambda code: self._run(code, brief),
        )


def why_not_here(executable: str | None) -> str | None:
    """None if this kind of machine may have L2, else the sentence that says why not."""
    if sys.platform != "linux":
        return f"it needs Linux, and this is {platform.system() or sys.platform}"
    from fledge.sandbox.lockdown import MACHINES

    if platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return f"it knows 64-bit x86_64 and aarch64 only, and this is {platform.machine()}"
    if not executable:
        return "it needs the path of a Python program, and this Python does not know its own"
    return None


class _Gone(Exception):
    """The fork server did not start, ended or does not answer."""


@dataclass
class _Outcome:
    """What a run left: the server's word on its end, and what the child wrote."""

    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    result: bytearray = field(default_factory=bytearray)
    seen: int = 0  # bytes of output, kept or not
    flooded: bool = False
    reply: dict[str, Any] = field(default_factory=dict)


class _Server:
    """One fork server: a process and the socket to it; used by one thread at a time."""

    def __init__(self, executable: str) -> None:
        self._runs = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        words = [executable, "-I", "-S", "-B", "-c", BOOT, root, str(os.getpid())]
        self._socket = ours
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [*words, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # a Ctrl-C in the terminal is not for it
                )
        except BaseException:
            ours.close()
            raise
        try:
            self.facts = self._hello()
        except BaseException:
            self.end()
            raise

    def _hello(self) -> dict[str, Any]:
        self._socket.settimeout(START_SECONDS)
        try:
            data = self._socket.recv(RESULT_BYTES)
        except TimeoutError:
            raise _Gone(f"it was not ready after {START_SECONDS:g} s") from None
        finally:
            self._socket.setblocking(False)
        if not data:
            raise _Gone(f"{self.process.args[0]} ended before it was ready")  # type: ignore[index]
        facts = json.loads(data)
        if "unavailable" in facts:
            raise _Gone(facts["unavailable"])
        return facts

    def lives(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Ends the process, whatever it does, and reaps it. Its child dies with it."""
        self._socket.close()
        try:
            self.process.kill()
            self.process.wait(GRACE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass  # another user's now and no CAP_KILL: it ends by itself, its socket is closed

    def run(self, program: bytes, limits: Limits) -> _Outcome:
        """One program to its end. _Gone or OSError if the server is lost."""
        self._runs += 1
        pipes = [os.pipe() for _ in range(4)]  # code to the child; output, errors, result from it
        open_ends = {fd for pipe in pipes for fd in pipe}
        mine = [pipes[0][1], *(read for read, _ in pipes[1:])]
        theirs = [pipes[0][0], *(write for _, write in pipes[1:])]
        request = {
            "run": self._runs,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_bytes,
        }
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], theirs)
            for fd in theirs:
                os.close(fd)
                open_ends.remove(fd)
            for fd in mine:
                os.set_blocking(fd, False)
            return _Exchange(self._socket, self._runs, mine, open_ends, program, limits).follow()
        finally:
            for fd in open_ends:
                os.close(fd)


class _Exchange:
    """The front end's side of one run: feeds the code, takes the output, waits for the end."""

    def __init__(
        self,
        control: socket.socket,
        run: int,
        ends: list[int],
        open_ends: set[int],
        program: bytes,
        limits: Limits,
    ) -> None:
        self.control = control
        self.run = run
        self.code, self.out, self.err, self.res = ends
        self.open_ends = open_ends
        self.left = memoryview(program)
        self.limits = limits
        self.outcome = _Outcome()
        self.poll = select.poll()
        for fd in (control.fileno(), self.out, self.err, self.res):
            self.poll.register(fd, select.POLLIN)
        self.poll.register(self.code, select.POLLOUT)

    def follow(self) -> _Outcome:
        deadline = time.monotonic() + self.limits.seconds + GRACE_SECONDS
        while not self.outcome.reply:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _Gone("the fork server does not answer")
            for fd, _ in self.poll.poll(left * 1e3):
                if fd == self.code:
                    self._feed()
                elif fd == self.control.fileno():
                    self._hear()
                else:
                    self._take(fd)
        for fd in (self.out, self.err, self.res):  # the child is dead: what is there is all
            while fd in self.open_ends and self._take(fd) and not self.outcome.flooded:
                pass
        return self.outcome

    def _feed(self) -> None:
        try:
            self.left = self.left[os.write(self.code, self.left) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the child is dead already
            self.left = self.left[:0]
        if not self.left:
            self._close(self.code)

    def _hear(self) -> None:
        data = self.control.recv(RESULT_BYTES)
        if not data:
            raise _Gone("its process was lost")
        reply = json.loads(data)
        if reply.get("run") == self.run:
            self.outcome.reply = reply

    def _take(self, fd: int) -> bool:
        """Reads once; False if nothing was there. Ends the run of a program that floods."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._close(fd)
            return False
        outcome = self.outcome
        if fd == self.res:
            outcome.result += data[: RESULT_BYTES - len(outcome.result)]
        else:
            room = max(0, self.limits.output_bytes - len(outcome.stdout) - len(outcome.stderr))
            kept = outcome.stdout if fd == self.out else outcome.stderr
            kept += data[:room]
        outcome.seen += len(data)
        if outcome.seen > FLOOD_FACTOR * self.limits.output_bytes and not outcome.flooded:
            outcome.flooded = True
            self.control.send(json.dumps({"kill": self.run}).encode())
        return True

    def _close(self, fd: int) -> None:
        self.poll.unregister(fd)
        os.close(fd)
        self.open_ends.remove(fd)


def _result(outcome: _Outcome, limits: Limits) -> ToolResult:
    """The tool's answer; `ok` only if server and child both say that all went well."""
    return ToolResult(
        ok=(error := _error(outcome, limits)) is None,
        stdout=outcome.stdout.decode(errors="replace"),
        stderr=outcome.stderr.decode(errors="replace"),
        error=error,
        truncated=outcome.seen - len(outcome.result) > limits.output_bytes,
    )


def _error(outcome: _Outcome, limits: Limits) -> str | None:
    reply = outcome.reply
    if "refused" in reply:
        return f"the sandbox could not run the code: {reply['refused']}"
    if outcome.flooded:
        return "the output limit was exceeded"
    if reply["timed_out"]:
        return f"TimeoutError: the time limit of {limits.seconds:g} s was exceeded"
    status = reply["status"]
    if status < 0:
        return f"the program was ended by {_signal_name(-status)}"
    try:
        told = json.loads(outcome.result)
        refused, error = told.get("refused"), told.get("error")
    except (ValueError, AttributeError, RecursionError):
        return f"the program left without a result (exit code {status})"
    if refused is not None:
        return f"the sandbox could not run the code: {_told(refused)}"
    if error is None:
        left = f"the program left without a result (exit code {status})"
        return left if status or "error" not in told else None
    text = _told(error)
    if text.startswith("MemoryError"):
        return f"MemoryError: the memory limit of {limits.memory_bytes // MIB} MB was exceeded"
    return text


def _told(words: Any) -> str:
    """What the program says of itself: short, and text that can be written anywhere."""
    return shorten(str(words), 500).encode(errors="backslashreplace").decode()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
