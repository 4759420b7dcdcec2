"""The fork server of L2: a small Python that is exec'd once and forks one locked child per run.

Started by `fledge.sandbox.process` with an empty environment, no descriptors and a socket. For each
request it forks; the child takes its pipes, locks itself down (`lockdown.lock`) and only then reads
a program as Python. The server waits, kills at the deadline or on request, and says how it ended.

The program and its output travel through pipes between the front end and the child. The server
holds neither, so that no child can find another's in the memory that it was forked with. It is
single-threaded, writes nothing to disk and ends when its socket or its parent does.

Messages are JSON, one per packet of a SOCK_SEQPACKET socket, whose boundaries the kernel keeps:

    to the server     {"run": 7, "seconds": 2.0, "memory_bytes": N} + 4 descriptors   {"kill": 7}
    from the server   {"landlock": 7, "uid": 65534} or {"unavailable": WHY} once, then
                      {"run": 7, "status": 0 or -SIGNAL, "timed_out": false} or {"run", "refused"}
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import gc
import importlib
import io
import json
import os
import random
import select
import signal
import socket
import sys
import time
import types
from os import _exit, write
from typing import Any, NoReturn

from fledge.sandbox import lockdown
from fledge.sandbox.interpreter import format_result

CONTROL = 3
MAX_MESSAGE = 4096
MAX_ERROR_CHARS = 500
UNKNOWN_BASE = 128 << 20  # address space before the program, where /proc does not say

# What programs import most. After the lock-down no file can be opened, so what is not here (or
# built into Python) is a ModuleNotFoundError.
PRELOAD = """
abc array ast base64 binascii bisect calendar cmath collections collections.abc contextlib copy
copyreg csv ctypes dataclasses datetime decimal difflib enum errno fractions functools gc graphlib
hashlib heapq hmac html inspect io itertools json keyword linecache locale math numbers operator
pickle pprint queue random re reprlib secrets signal stat statistics string stringprep struct
textwrap threading time timeit token tokenize traceback types typing unicodedata unittest
urllib.parse uuid warnings weakref zlib _strptime
"""
ENCODINGS = "ascii latin-1 utf-8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 cp1252 hex rot13"


def main(parent: int) -> None:
    """Serves runs on the descriptor CONTROL until the front end (process `parent`) is gone."""
    control = socket.socket(fileno=CONTROL)
    try:
        alive = os.pidfd_open(parent)
        if os.getppid() != parent:
            return
        if lockdown.landlock_abi() < 1:
            raise OSError("the kernel has no Landlock (Linux 5.13), or it is switched off")
        prepared = lockdown.prepare()
        _preload()
        base = _address_space()
        uid = lockdown.harden_server()
    except (OSError, ValueError, AttributeError) as problem:  # setrlimit; a call that libc lacks
        _send(control, {"unavailable": str(problem)})
        return
    _send(control, {"landlock": lockdown.landlock_abi(), "uid": uid})
    while True:
        ready = _readable([CONTROL, alive], None)
        if alive in ready:
            return
        message, fds = _receive(control)
        if message is None:
            return
        if "run" in message:
            _send(control, _one_run(message, fds, prepared, base, [CONTROL, alive]))


def _one_run(
    message: dict[str, Any], fds: list[int], prepared: lockdown.Lock, base: int, watch: list[int]
) -> dict[str, Any]:
    """Forks, waits for the child's end and says what it was."""
    server = os.getpid()
    refused, pid = None, -1
    try:
        pid = os.fork()
    except OSError as problem:
        refused = f"no process could be made: {problem}"
    if pid == 0:
        _child(message, fds, prepared, base, server)
    for fd in fds:
        os.close(fd)
    if refused is not None:
        return {"run": message["run"], "refused": refused}
    child = os.pidfd_open(pid)
    ready = _readable([child, *watch], message["seconds"])
    os.close(child)
    # before it is reaped, so that the number is still its own
    for kill, number in ((os.killpg, pid), (os.kill, pid)):
        with contextlib.suppress(OSError):
            kill(number, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return {
        "run": message["run"],
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": not ready,
    }


def _child(
    message: dict[str, Any], fds: list[int], prepared: lockdown.Lock, base: int, server: int
) -> NoReturn:
    """The locked process: reads the program, runs it, writes one JSON object, ends."""
    status = 1
    try:
        code, out, err, result = fds
        program = bytearray()
        while part := os.read(code, 1 << 16):
            program += part
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(result, lockdown.LAST_FD)
        sys.stdin = io.TextIOWrapper(io.BytesIO())
        sys.stdout, sys.stderr = _text_stream(1), _text_stream(2)
        random.seed(0)  # the same random numbers in every run
        gc.enable()
        lockdown.lock(
            prepared,
            memory_bytes=base + message["memory_bytes"],
            cpu_seconds=int(message["seconds"]) + 2,
            parent=server,
        )
        error = run_program(program.decode())
        write(lockdown.LAST_FD, _as_json({"error": error}))
        status = 0
    except (OSError, ValueError) as problem:  # setrlimit raises ValueError too
        write(lockdown.LAST_FD, _as_json({"refused": str(problem)}))
    finally:
        _exit(status)


_as_json_text = json.JSONEncoder().encode  # a program may replace json.dumps


def _as_json(value: dict[str, Any]) -> bytes:
    return _as_json_text(value).encode()


def run_program(source: str) -> str | None:
    """Runs `source` as __main__ and prints a last expression's value; the error, or None."""
    error = None
    try:
        tree = ast.parse(source, "<program>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        scope = sys.modules["__main__"].__dict__
        exec(compile(tree, "<program>", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<program>", "eval"), scope)
            if value is not None:
                print(format_result(value, 1 << 16))
    except BaseException as problem:  # SystemExit and KeyboardInterrupt too
        error = describe(problem)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException as problem:
            error = error or describe(problem)
    return error


def describe(problem: BaseException) -> str:
    """`ZeroDivisionError: division by zero`, as L1 writes it."""
    name = type(problem).__name__
    try:
        text = str(problem)
    except BaseException:  # the program's own __str__
        return name
    return (f"{name}: {text}" if text else name)[:MAX_ERROR_CHARS]


def _text_stream(fd: int) -> io.TextIOWrapper:
    raw = io.FileIO(fd, "w", closefd=False)
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def _preload() -> None:
    for name in PRELOAD.split():
        with contextlib.suppress(ImportError):  # a Python that was built without it
            importlib.import_module(name)
    for name in ENCODINGS.split():
        codecs.lookup(name)
    os.environ.clear()  # Python itself sets LC_CTYPE
    sys.modules["__main__"] = types.ModuleType("__main__")  # where programs live
    sys.argv[:] = [""]
    sys.path[:] = []
    sys.path_importer_cache.clear()
    time.strptime("2000", "%Y")
    gc.collect()
    gc.freeze()  # what was loaded stays out of the children's collections, and shared
    gc.disable()


def _address_space() -> int:
    """The bytes of address space that this process has now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (16 << 20)
    except OSError:
        return UNKNOWN_BASE


def _readable(fds: list[int], seconds: float | None) -> set[int]:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if seconds is None else max(0.0, seconds) * 1e3)}


def _receive(control: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its descriptors; None at the end."""
    data, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 4)
    return (json.loads(data) if data else None), fds


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the front end is gone; the next wait says so
        control.send(_as_json(message))
