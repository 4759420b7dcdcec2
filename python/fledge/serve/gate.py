"""What every request passes before a handler sees it, and every reply on its way out.

An ASGI layer around the application: a request id, the Host and Origin checks, the API key, the
body read up to its limit within its time, one error shape for whatever goes wrong, security
headers, the count for /metrics, and one log line without any text of a client. Handlers find the
body in `scope["fledge.body"]` and the key's name in `scope["fledge.key"]`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fledge.serve.api_errors import ApiError
from fledge.serve.keys import Keys
from fledge.serve.metrics import Metrics
from fledge.serve.settings import Settings

log = logging.getLogger("fledge.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = {"/health", "/livez", "/version"}
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", CSP.encode()),
]


class ClientGone(Exception):
    """The client closed its connection before the reply."""


class Gate:
    """The outermost layer."""

    def __init__(self, app: App, *, settings: Settings, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        request_id = f"req_{secrets.token_hex(12)}"
        scope["fledge.request_id"] = request_id
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                headers += [pair for pair in SECURITY_HEADERS if pair[0] not in present]
                headers.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._admit(scope)
            scope["fledge.body"] = await self._body(scope, receive)
            await self._app(scope, receive, send_on)
        except ClientGone:
            status = status or 499
        except ApiError as error:
            if status == 0:
                await send_error(send_on, error)
        except Exception as error:
            log.error("request %s failed: %s", request_id, type(error).__name__)
            log.debug("request %s", request_id, exc_info=error)
            if status == 0:
                failed = ApiError(
                    500, "The server failed on this request.", type="server_error", code="internal"
                )
                await send_error(send_on, failed)
        finally:
            path = scope.get("fledge.route", "other")
            self._metrics.add("fledge:http_requests", (("path", path), ("status", str(status))))
            ms = (time.monotonic() - began) * 1e3
            log.info("%s %s %s %d %.1f ms", request_id, scope["method"], path, status, ms)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        self._check_host(headers)
        self._check_origin(headers)
        path = scope["path"]
        if not self._keys:
            scope["fledge.key"] = ""
            return
        if path in OPEN_PATHS or (scope["method"] in ("GET", "HEAD") and _is_page(path)):
            scope["fledge.key"] = ""
            return
        kind, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        name = self._keys.name_of(secret.strip()) if kind.lower() == "bearer" else None
        if name is None:
            given = "Incorrect API key provided." if secret else "You did not provide an API key."
            raise ApiError(
                401,
                f"{given} Send it as the header `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        scope["fledge.key"] = name

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Only names that no stranger's DNS can point at this machine (DNS rebinding)."""
        allowed = self._settings.allowed_hosts
        if "*" in allowed:
            return
        name = host_name(headers.get(b"host", b"").decode("latin-1"))
        if name in ("localhost", self._settings.host.lower()) or name in allowed:
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ApiError(
                403,
                "This server does not answer under that host name. Start it with "
                "--allowed-host NAME if it should.",
                code="host_not_allowed",
            ) from None

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """No page of another site may make this server work; there is no CORS."""
        origin = headers.get(b"origin")
        if origin is None or "*" in self._settings.allowed_hosts:
            return
        host = headers.get(b"host", b"")
        if origin.partition(b"://")[2].lower() != host.lower():
            raise ApiError(
                403, "Pages of other sites may not use this server.", code="origin_not_allowed"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, within its limits of size and time."""
        limits = self._settings.limits
        too_large = ApiError(
            413,
            f"The body is larger than {limits.body_bytes} bytes.",
            code="request_too_large",
        )
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limits.body_bytes:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limits.body_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not come within {limits.body_seconds:g} seconds.",
                code="body_timeout",
                headers={"connection": "close"},
            ) from None


def _is_page(path: str) -> bool:
    return path == "/" or path.startswith("/web/")


def host_name(header: str) -> str:
    """The host of a Host header, without its port, in lower case."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


async def send_error(send: Send, error: ApiError) -> None:
    """A whole reply that tells `error`."""
    body = error.encoded()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((k.encode(), v.encode("latin-1", "replace")) for k, v in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def until_gone(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`, unless the client leaves first: then it is cancelled, ClientGone."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for future in (task, watch):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
