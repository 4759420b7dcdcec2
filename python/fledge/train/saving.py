"""Checkpoints written behind the training loop's back: one at a time, errors where they matter.

On a GPU a checkpoint is first copied to the host; writing it, hashing it and waiting for the disk
needs no GPU, so a thread does that while the next steps are computed. `Saver` is that thread; what
it writes is the caller's business, and stays atomic: a kill leaves the previous checkpoint. Called
by `stages.training`; it knows neither runs nor models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Saver:
    """Does a piece of work at once or, with `behind`, in a thread while the caller goes on."""

    def __init__(self, *, behind: bool) -> None:
        self.behind = behind
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Begins the work after what was submitted before has ended; raises what that raised."""
        self.wait()
        if not self.behind:
            work()
            return
        # a daemon: the second Ctrl-C ends the process at once, and a half checkpoint is no harm
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again by `wait`, where somebody can act on it
            self._error = error


@torch.no_grad()
def host_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory of the host that training cannot change any more."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
