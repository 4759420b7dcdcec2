"""What goes to an engine thread and what comes back: jobs, and the event loop's handle on one.

`Job` carries a request of the engine (or a call that runs between two steps) with what the pool
remembers of it; `Handle` is where a handler waits for its token events. Made by the completion
handlers, moved by `serve.worker`; nothing here starts a thread.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from fledge.serve.api_errors import ApiError


class EngineLike(Protocol):
    """What of `fledge.engine.Engine` a thread needs; tests use a small stand-in."""

    @property
    def in_flight(self) -> int: ...

    def add(self, request: Any) -> int: ...

    def step(self) -> list[Any]: ...

    def cancel(self, request_id: int) -> None: ...


@dataclass(eq=False)
class Job:
    """Work for an engine: a request of it, or `call`, which runs between two steps.

    `call(engine)` is a generator function: each `next` is one bounded piece of work, its return
    value is the result. It serves scoring, which has no tokens to stream.
    """

    request: Any = None
    call: Callable[[Any], Any] | None = None
    rows: int = 1
    key: str = ""
    prompt_tokens: int = 0
    cached: int | None = None  # prompt tokens that were not read again, if the engine tells
    arrived: float = 0.0
    started: float | None = None  # when the engine took it
    first: float | None = None  # when its first token came
    last: float | None = None
    generated: int = 0
    live: int = 0  # choices that still run
    cancelled: bool = False
    deliver: Callable[[Any], None] = lambda _: None


class Handle:
    """The event loop's end of a job: batches of token events, then the end or an error."""

    def __init__(self, job: Job, cancel: Callable[[Job], None]) -> None:
        self._job = job
        self._cancel = cancel
        self._batches: collections.deque[Any] = collections.deque()
        self._ready = asyncio.Event()
        job.deliver = self._put

    def _put(self, batch: Any) -> None:
        self._batches.append(batch)
        self._ready.set()

    async def next(self) -> list[Any]:
        """All events that came since the last call, at least one; raises ApiError."""
        while not self._batches:
            self._ready.clear()
            await self._ready.wait()
        events: list[Any] = []
        while self._batches:
            batch = self._batches[0]
            if isinstance(batch, ApiError):
                if events:
                    break
                raise batch
            events += batch
            self._batches.popleft()
        return events

    def cancel(self) -> None:
        """Takes the job out of the queue or the engine; harmless when it has ended."""
        self._cancel(self._job)
