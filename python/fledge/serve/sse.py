"""A stream of server-sent events that always says how it ended.

`event_stream` sends what a source yields and holds to four rules: it ends with `[DONE]` after a
finish or an error event (the openai client takes a stream that merely stops for a complete one);
it stops the source as soon as the client leaves; a silent stream gets a comment now and then so
that proxies keep it open. Events that are ready together go
out as one write. Used by the two completion handlers.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fledge.serve.api_errors import ApiError
from fledge.serve.gate import ClientGone, Receive, Send, until_gone
from fledge.serve.settings import Limits

log = logging.getLogger("fledge.serve")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


def encode(value: Any) -> bytes:
    """JSON as bytes, as short as it gets; lone surrogates become U+FFFD's stand-in `?`."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """One event. JSON holds no line break, so one `data:` line is enough."""
    return b"data: " + encode(value) + b"\n\n"


async def event_stream(
    source: AsyncIterator[list[Any]],
    receive: Receive,
    send: Send,
    *,
    limits: Limits,
    headers: list[tuple[bytes, bytes]],
) -> None:
    """Sends the batches of JSON values of `source`; an ApiError of it becomes the last event.

    The first batch is awaited before the status line goes out, so that a refusal (a full queue)
    still has its own status. Raises ClientGone.
    """
    try:
        await until_gone(receive, _pump(source, send, limits, headers))
    finally:
        await source.aclose()  # type: ignore[attr-defined]  # it is an async generator


async def _pump(
    source: AsyncIterator[list[Any]],
    send: Send,
    limits: Limits,
    headers: list[tuple[bytes, bytes]],
) -> None:
    start = {"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]}
    begun = False
    coming = asyncio.ensure_future(anext(source, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=limits.ping_seconds)
            if not begun and (not done or coming.exception() is None):
                begun = True
                await send(start)
            if not done:
                await _write(send, PING)
                continue
            batch = coming.result()
            if batch is None:
                break
            await _write(send, b"".join(map(event, batch)))
            coming = asyncio.ensure_future(anext(source, None))
        await _write(send, DONE, more=False)
    except ApiError as error:
        if not begun:
            raise
        await _write(send, event(error.body()) + DONE, more=False)
    except ClientGone:
        raise
    except Exception as error:
        if not begun:
            raise
        log.error("a stream failed: %s", type(error).__name__)
        log.debug("a stream failed", exc_info=error)
        failed = ApiError(500, "The server failed.", type="server_error", code="internal")
        await _write(send, event(failed.body()) + DONE, more=False)
    finally:
        if not coming.done():
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _write(send: Send, data: bytes, *, more: bool = True) -> None:
    """One write; it waits where the reader is slow, and `protocol` drops one that is too slow."""
    await send({"type": "http.response.body", "body": data, "more_body": more})
