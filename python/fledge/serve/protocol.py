"""uvicorn's HTTP/1.1 connection with the time limits that it lacks.

uvicorn waits for ever for the rest of a request's headers, for a peer that reads nothing of a
reply, and for the rest of a body that was already refused. Each of these holds a socket at no cost
to the peer. This subclass puts a timer on each, bounds the number of connections, and gives the
refusals that uvicorn itself sends our error shape. Handed to `uvicorn.Config(http=...)` by
`serve.server`; it touches nothing else of the protocol.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fledge.serve.api_errors import ApiError
from fledge.serve.settings import Limits


class TimedH11(H11Protocol):
    """One connection; `limits` is set on a subclass by `protocol_class`."""

    limits = Limits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(
                ApiError(503, "Too many connections.", type="server_error", code="too_many")
            )
            return
        self._start("header", self.limits.header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        # idle: the headers of a request have begun and not ended
        if self.conn.their_state is h11.IDLE:
            if self.conn.our_state is h11.IDLE and "header" not in self._timers:
                self._start("header", self.limits.header_seconds)
        else:
            self._stop("header")

    def pause_writing(self) -> None:
        self._start("stall", self.limits.stall_seconds)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stop("stall")
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # a reply went out before the body had come: read the rest away, but not for ever
        if self.conn.their_state is h11.SEND_BODY:
            self._start("rest", self.limits.header_seconds)
        else:
            self._stop("rest")
        if self.transport.is_closing():
            self._start("close", self.limits.stall_seconds)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start("close", self.limits.header_seconds)  # what was not read by then is lost

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "This is not valid HTTP.", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        body = error.encoded()
        head = (
            f"HTTP/1.1 {error.status} {'Bad Request' if error.status == 400 else 'Unavailable'}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(head.encode() + body)
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # what follows on this connection cannot be read
            cycle.message_event.set()
        self._start("close", self.limits.header_seconds)
        self.transport.close()

    def _start(self, name: str, seconds: float) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, self._end, name)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def _end(self, name: str) -> None:
        self._timers.pop(name, None)
        self.transport.abort()


def protocol_class(limits: Limits) -> type[TimedH11]:
    """`TimedH11` with these limits; uvicorn makes the objects itself."""
    return type("BoundH11", (TimedH11,), {"limits": limits})
