"""Canary attacks: a layer that lets one of them through here, on this machine, is not used.

Each function takes what runs code and gives None, or one sentence that says why the layer is off.
`interpreter` and `process` call them once, before the first program of a model; `layers` (for
`fledge doctor`) calls them too. The attacks are harmless where they succeed: a read of our own
source, a connection to our own port, signal 0 to ourselves. They end in tests/sandbox with the
walls taken away one by one, so that a self-test which cannot fail would be noticed.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from fledge.sandbox import arithmetic
from fledge.sandbox.result import ToolError, ToolResult

Run = Callable[[str], ToolResult]

_CALCULATOR_ATTACKS = (
    "__import__('os').getpid()",
    "open('/etc/passwd')",
    "().__class__.__bases__",
    "'a'.ljust(400000000).count('a')",
    "9**9**9",
    "1<<10**10",
    "[x for x in (1,)]",
)


def check_arithmetic() -> str | None:
    """L0: whatever is not a small sum must be refused."""
    for attack in _CALCULATOR_ATTACKS:
        try:
            arithmetic.evaluate(attack)
        except ToolError:
            continue
        return f"a canary attack came through the calculator: {attack}"
    return None


def check_interpreter(run: Run) -> str | None:
    """L1: files, directories, environment, modules of the machine, memory."""
    path = str(Path(__file__).resolve())
    attacks = (
        f"open({path!r}).read()",
        f"import pathlib\npathlib.Path({path!r}).read_text()",
        "import os\nos.listdir('/')",
        "import os\nos.environ['PATH']",
        "import os\nos.getenv('PATH') or 1/0",
        "import subprocess",
        "import socket",
        "import ctypes",
        "len('a' * 10**10)",
    )
    if run("6 * 7").stdout != "42\n":
        return "the workers of pydantic-monty give wrong answers"
    for attack in attacks:
        if run(attack).ok:
            return f"a canary attack came through Monty: {attack}"
    return None


# Each must raise an exception or give -1. `libc`, `os` and the canaries are set before.
PROCESS_ATTACKS = {
    "reads a file": "os.open(FILE, os.O_RDONLY)",
    "reads a file by libc": "libc.open(FILE.encode(), 0)",
    "sees a file's size": "os.stat(FILE)",
    "lists a folder": "os.listdir('/')",
    "knows its folder": "os.getcwd()",
    "writes a file": "os.open(NEW, os.O_WRONLY | os.O_CREAT)",
    "makes a folder": "os.mkdir(NEW)",
    "removes a file": "os.unlink(FILE)",
    "reads /proc": "os.open('/proc/self/environ', os.O_RDONLY)",
    "has an environment": "dict(os.environ).popitem()",
    "holds a descriptor": "[fd for fd in range(4, 256) if libc.read(fd, 0, 0) == 0][0]",
    "keeps shared memory": "1 if libc.mmap(None, 4096, 3, 0x21, -1, 0) != 2**64 - 1 else -1",
    "makes a file in memory": "os.memfd_create('x')",
    "makes an inet socket": "libc.socket(2, 1, 0)",
    "makes an inet6 socket": "libc.socket(10, 2, 0)",
    "makes a unix socket": "libc.socket(1, 1, 0)",
    "makes a packet socket": "libc.socket(17, 3, 0)",
    "makes a process": "os.fork() or os._exit(0)",
    "makes a process by libc": "libc.fork() or os._exit(0)",
    "makes a thread": "_thread.start_new_thread(int, ())",
    "runs a program": "os.execv('/bin/true', ['true'])",
    "signals the parent": "os.kill(PARENT, 0)",
    "signals the server": "os.kill(os.getppid(), 0)",
    "signals a group": "os.killpg(0, 0)",
    "signals all": "libc.kill(-1, 0)",
    "traces a process": "libc.ptrace(16, PARENT, 0, 0)",
    "opens a process": "os.pidfd_open(PARENT)",
    "leaves its session": "os.setsid()",
    "raises its limits": "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))",
    "uses prctl": "libc.prctl(38, 0, 0, 0, 0)",
    "maps memory to execute": "1 if libc.mmap(None, 4096, 7, 34, -1, 0) != 2**64 - 1 else -1",
    "uses io_uring": "libc.syscall(425, 1, None)",
    "uses bpf": "libc.bpf(0, None, 0) if hasattr(libc, 'bpf') else -1",
    "uses a namespace": "libc.unshare(0x10000000)",
    "takes all memory": "bytearray(MEMORY)",
}

_PROCESS_PROGRAM = """
import _thread, ctypes, os, resource
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_size_t
through = []
for name, attack in ATTACKS.items():
    try:
        if eval(attack) != -1:
            through.append(name)
    except (OSError, ValueError, RuntimeError, MemoryError, KeyError, IndexError):
        pass
print(", ".join(through) or "held")
"""


def _public_file() -> str:
    """A file that every user may read: behind a private folder no attack could show a hole."""
    paths = ("/etc/passwd", "/bin/sh", str(Path(__file__).resolve()))
    return next(path for path in paths if os.path.exists(path))


def check_process(run: Run, *, memory_bytes: int, run_briefly: Run) -> str | None:
    """L2: the attacks above by one program, then a program that never ends.

    `memory_bytes` is what `run` allows; `run_briefly` allows a fraction of a second.
    """
    new = Path(_writable_folder()) / f"fledge-canary-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as port:
        name = f"\0fledge-canary-{secrets.token_hex(8)}"
        port.bind(name)
        port.listen()
        port.setblocking(False)
        setting = {
            "FILE": _public_file(),
            "NEW": str(new),
            "PARENT": os.getpid(),
            "MEMORY": 2 * memory_bytes + (64 << 20),
            "ATTACKS": PROCESS_ATTACKS
            | {"reaches a port": f"__import__('_socket').socket(1).connect({name!r})"},
        }
        lines = "".join(f"{key} = {value!r}\n" for key, value in setting.items())
        result = run(lines + _PROCESS_PROGRAM)
        try:
            port.accept()[0].close()
            return "a canary attack came through: it reached a port"
        except BlockingIOError:
            pass
    if os.path.lexists(new):
        new.rmdir() if new.is_dir() else new.unlink()
        return "a canary attack came through: it left a file"
    if not result.ok:
        return f"its self-test failed: {result.error}"
    if result.stdout != "held\n":
        return f"a canary attack came through: the program {result.stdout.strip()}"
    endless = run_briefly("while True:\n    try:\n        while True: pass\n    except: pass")
    if endless.ok or not (endless.error or "").startswith("TimeoutError"):
        return f"its self-test failed: an endless program ended with {endless.error}"
    return None


def _writable_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # nothing can be written here at all
        return "/"
