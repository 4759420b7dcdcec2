"""Runs the application under uvicorn, and ends it in good order.

On SIGTERM or Ctrl-C the server drains: /health turns 503, new work is refused, what is under way
may finish within the grace period, what does not gets an error event; then the process leaves with
code 0. A second signal leaves at once. An engine that failed for good ends the server with an
error. Called by the `serve` verb; the tests run `LiveServer` in a thread of their own.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from fledge.engine.tools import Tools
from fledge.errors import FledgeError, UserError
from fledge.serve import api_errors
from fledge.serve.app import create_app
from fledge.serve.context import Context
from fledge.serve.keys import Keys
from fledge.serve.metrics import Metrics
from fledge.serve.models import Models, served_models
from fledge.serve.protocol import protocol_class
from fledge.serve.settings import Settings

log = logging.getLogger("fledge.serve")

KEEP_ALIVE_SECONDS = 20
BACKLOG = 1024
LOOK_SECONDS = 0.05  # while draining


class DrainingServer(uvicorn.Server):
    """uvicorn whose signals begin a drain instead of an exit."""

    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self.context = context
        self.fatal: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remembers the loop, for signals and engine threads."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first drains, the second leaves."""
        if self._loop is None or self.context.draining:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begins the end; to be called in the event loop."""
        if not self.context.draining:
            self.context.draining = True
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        context = self.context
        grace = context.settings.limits.grace_seconds
        log.info("draining: %d requests in flight", sum(context.in_flight.values()))
        until = time.monotonic() + grace
        while context.in_flight and time.monotonic() < until:
            await asyncio.sleep(LOOK_SECONDS)
        if context.in_flight:
            log.warning("%d requests did not end in time", sum(context.in_flight.values()))
            over = api_errors.unavailable("The server was shut down.", "shutting_down")
            for model in context.models:
                model.pool.abort(over)
            until = time.monotonic() + 2
            while context.in_flight and time.monotonic() < until:
                await asyncio.sleep(LOOK_SECONDS)
        self.should_exit = True

    def give_up(self, error: BaseException) -> None:
        """An engine failed for good; to be called in the event loop."""
        self.fatal = error
        self.context.draining = True
        self.should_exit = True


def build_server(
    context: Context, keys: Keys, *, host: str, port: int, quiet: bool = True
) -> DrainingServer:
    """The server, not yet running."""
    config = uvicorn.Config(
        create_app(context, keys),
        host=host,
        port=port,
        http=protocol_class(context.settings.limits),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="critical" if quiet else "info",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=3,
        backlog=BACKLOG,
    )
    return DrainingServer(config, context)


def make_context(
    words: Sequence[str], settings: Settings, *, replicas: int = 1
) -> tuple[Context, list[DrainingServer]]:
    """The context of real models. The list is for the server that hears of fatal failures."""
    metrics = Metrics()
    servers: list[DrainingServer] = []

    def fatal(error: BaseException) -> None:
        for server in servers:
            server.give_up(error)

    models = served_models(
        words, limits=settings.limits, metrics=metrics, on_fatal=fatal, replicas=replicas
    )
    tools = Tools() if settings.python_tool else None
    return Context(Models(models), settings, metrics, tools), servers


def check_exposure(host: str, keys: Keys, *, insecure: bool) -> None:
    """UserError where a server without keys would be open to other machines."""
    if host in ("localhost", "127.0.0.1", "::1") or len(keys) or insecure:
        return
    raise UserError(
        f"a server on {host} would be open to everybody who can reach this machine",
        "no API keys are set",
        "give --api-keys FILE, or --insecure-no-keys if that is what you want",
    )


def serve(
    words: Sequence[str],
    settings: Settings,
    keys: Keys,
    *,
    port: int,
    insecure: bool = False,
    replicas: int = 1,
) -> int:
    """Serves until a signal; returns the exit code."""
    check_exposure(settings.host, keys, insecure=insecure)
    context, servers = make_context(words, settings, replicas=replicas)
    listener = bind(settings.host, port)
    server = build_server(context, keys, host=settings.host, port=port)
    servers.append(server)
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    names = ", ".join(model.name for model in context.models)
    print(f"serving {names} at http://{shown}:{listener.getsockname()[1]}", file=sys.stderr)
    server.run(sockets=[listener])
    if isinstance(server.fatal, FledgeError):
        raise server.fatal
    return 2 if server.fatal is not None else 0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; UserError where the address cannot be had."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(info[0], socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(info[4])
        listener.listen(BACKLOG)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}",
            str(error.strerror or error),
            "choose another --port (0 = any free one), or stop what uses it",
        ) from None
    listener.setblocking(False)
    return listener


class LiveServer:
    """A server in a thread of this process: for tests, lessons and benchmarks."""

    def __init__(self, context: Context, keys: Keys | None = None) -> None:
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.context = context
        self.server = build_server(context, keys or Keys(), host="127.0.0.1", port=self.port)
        self._thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True
        )

    def __enter__(self) -> LiveServer:
        self._thread.start()
        until = time.monotonic() + 60
        while not (self.server.started and self._ready()):
            if time.monotonic() > until or not self._thread.is_alive():
                raise RuntimeError(f"the server did not start: {self.server.fatal}")
            time.sleep(0.01)
        return self

    def _ready(self) -> bool:
        return all(model.pool.state() == "ready" for model in self.context.models)

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(30)
        if self._thread.is_alive():
            raise RuntimeError("the server did not stop")
