"""Several processes of one command on this machine, by torchrun's contract.

`ranks` starts them, hands signals on, and reaps them: as soon as one has ended badly the others are
ended too, since they would wait for it. Called by `fledge run --nproc N`. On more than one machine
torchrun does this: the processes themselves see no difference. It knows nothing of training.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from fledge.errors import EXIT_DONE, EXIT_INTERRUPTED

GRACE_SECONDS = 10.0
"""What the other ranks get to end by themselves after one has ended badly."""
POLL_SECONDS = 0.05
TOLD_BYTES = 4000  # of the last words of a rank that nobody listens to
MOST_PROCESSES = 256
"""More than any one machine has GPUs or groups of cores for."""


def ranks(command: list[str], size: int, *, grace_seconds: float = GRACE_SECONDS) -> int:
    """The exit code of `size` processes: 0 if all ended well, else of the first that did not."""
    threads = str(max(1, _cores() // size))
    meet = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    with contextlib.ExitStack() as stack:
        errors: list[IO[bytes]] = [
            stack.enter_context(tempfile.TemporaryFile()) for _ in range(size)
        ]
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=None if rank == 0 else errors[rank],
                preexec_fn=_dies_with(os.getpid()),
            )
            for rank in range(size)
        ]
        stack.enter_context(_signals_to(processes))
        try:
            if _wait(processes):
                return EXIT_DONE
            return _verdict(_end(processes, grace_seconds), errors)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _wait(processes: list[subprocess.Popen[Any]]) -> bool:
    """Until all have ended well, or one has not."""
    while True:
        codes = [process.poll() for process in processes]
        if any(code not in (None, EXIT_DONE) for code in codes):
            return False
        if all(code == EXIT_DONE for code in codes):
            return True
        time.sleep(POLL_SECONDS)


def _end(processes: list[subprocess.Popen[Any]], grace_seconds: float) -> list[int | None]:
    """Gives the others time to end by themselves (they save, or notice), then ends them.

    Returns the codes of those that ended by themselves.
    """
    deadline = time.monotonic() + grace_seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    codes = [process.poll() for process in processes]
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
    return codes


def _verdict(codes: list[int | None], errors: list[IO[bytes]]) -> int:
    """The code to return, and a word on a rank that ended badly where rank 0 says nothing of it.

    The cause is sought: a killed rank, then one with an error; those that only noticed say 75.
    """
    found = [(code, rank) for rank, code in enumerate(codes) if code]  # None: ended by us
    code, first = min(found)
    if code < 0:
        print(
            f"rank {first} was killed (signal {-code}), and the others with it; run the same "
            "command again to go on from the last checkpoint",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    if first:
        errors[first].seek(0)
        told = errors[first].read()[-TOLD_BYTES:].decode(errors="replace").strip()
        print(f"rank {first} ended with code {code}:\n{told}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _signals_to(processes: list[subprocess.Popen[Any]]) -> Iterator[None]:
    """SIGTERM and SIGUSR1 go on to the ranks.

    Ctrl-C reaches them from the terminal by itself: handed on it would come twice, which ends a run
    without saving.
    """

    def hand_on(number: int, frame: object) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    old: dict[Any, Any] = {}
    for name in ("SIGTERM", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number is not None:
            old[number] = signal.signal(number, hand_on)
    old[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Run in a new process: it is killed when its parent ends, however that ends (Linux)."""
    if sys.platform != "linux":
        return None
    library, set_death_signal = ctypes.CDLL(None), 1  # prctl.h

    def arrange() -> None:
        library.prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between
            os.kill(os.getpid(), signal.SIGKILL)

    return arrange


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
