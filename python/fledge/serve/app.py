"""The ASGI application: paths to handlers, and the life of the engine pools.

Plain ASGI without a framework (docs/decisions/030): a table of routes is all the routing there is,
and every reply, errors included, is ours. `create_app` puts `gate.Gate` around it. Run by
`serve.server` under uvicorn; tests run it in the same way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import fledge
from fledge.config import TRAINED_STAGES
from fledge.errors import UserError
from fledge.run import Run
from fledge.serve import openapi, pages, training
from fledge.serve.api_errors import ApiError, bad_value
from fledge.serve.chat_api import start_chat
from fledge.serve.completions_api import CompletionCall
from fledge.serve.context import Context
from fledge.serve.gate import App as AsgiApp
from fledge.serve.gate import Gate, Receive, Scope, Send, until_gone
from fledge.serve.keys import Keys
from fledge.serve.models import ServedModel
from fledge.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from fledge.serve.sse import encode, event_stream

LARGE_BODY = 64 << 10  # from here on text is tokenized in a thread, so that streams go on
NOT_SERVED = {
    "/v1/responses": "the Responses interface; use /v1/chat/completions",
    "/v1/embeddings": "embeddings",
    "/v1/moderations": "moderations: there is no classifier here yet",
    "/v1/images/generations": "images",
    "/v1/audio/speech": "sound",
}

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


def create_app(context: Context, keys: Keys) -> AsgiApp:
    """The whole application of a server."""
    return Gate(App(context), settings=context.settings, keys=keys, metrics=context.metrics)


class App:
    """Dispatches by path and method."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/chat/completions": ("POST", self.chat_completions),
            "/v1/completions": ("POST", self.completions),
            "/v1/models": ("GET", self.models),
            "/tokenizer_info": ("GET", self.tokenizer_info),
            "/tokenize": ("POST", self.tokenize),
            "/detokenize": ("POST", self.detokenize),
            "/health": ("GET", self.health),
            "/livez": ("GET", self.livez),
            "/metrics": ("GET", self.metrics),
            "/version": ("GET", self.version),
            "/": ("GET", self.page),
        }
        if context.settings.openapi:
            self._routes["/openapi.json"] = ("GET", self.openapi)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise ApiError(404, "Only HTTP is served.")
        route, methods, handler = self._find(scope["path"])
        scope["fledge.route"] = route
        if handler is None:
            raise self._unknown(scope)
        if scope["method"] not in methods:
            raise ApiError(
                405,
                f"{scope['path'][:200]} takes {' or '.join(methods)}, not {scope['method'][:20]}.",
                code="method_not_allowed",
                headers={"allow": ", ".join(methods)},
            )
        if methods == ("POST",):
            _require_json(scope)
        await handler(scope, receive, send)

    def _find(self, path: str) -> tuple[str, tuple[str, ...], Handler | None]:
        if path in self._routes:
            method, handler = self._routes[path]
            return path, (method, "HEAD") if method == "GET" else (method,), handler
        if path.startswith("/v1/models/"):
            return "/v1/models/{id}", ("GET", "HEAD"), self.one_model
        if path.startswith("/runs/"):
            return "/runs/{name}", ("GET", "HEAD"), self.run_progress
        if path.startswith("/web/") and pages.known(path):
            return "/web/", ("GET", "HEAD"), self.page
        return "other", (), None

    @staticmethod
    def _unknown(scope: Scope) -> ApiError:
        path = scope["path"][:200]
        what = NOT_SERVED.get(path.rstrip("/"))
        told = f"This server does not serve {what}." if what else f"There is no {path!r} here."
        return ApiError(404, told, code="unknown_url")

    # -- completions -------------------------------------------------------------------------

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        context = self.context
        request, ignored = parse(scope["fledge.body"], ChatRequest, context.settings.limits)
        with context.place(scope["fledge.key"]):
            large = len(scope["fledge.body"]) > LARGE_BODY
            starting = start_chat(context, request, scope["fledge.key"], in_thread=large)
            call, handle = await until_gone(receive, starting)
            if request.stream:
                source = call.chunks(handle)
                await self._stream(source, receive, send, ignored)
            else:
                reply = await until_gone(receive, call.whole(handle))
                await send_json(send, reply, headers=_ignored_header(ignored))

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        context = self.context
        request, ignored = parse(scope["fledge.body"], CompletionRequest, context.settings.limits)
        with context.place(scope["fledge.key"]):
            model = context.models.get(request.model)
            model.pool.check_room(request.n or 1)
            make = (CompletionCall, context, request, model, scope["fledge.key"])
            large = len(scope["fledge.body"]) > LARGE_BODY
            call = await asyncio.to_thread(*make) if large else CompletionCall(*make[1:])
            handles, scores = call.submit()
            if request.stream:
                await self._stream(call.chunks(handles), receive, send, ignored)
            else:
                reply = await until_gone(receive, call.whole(handles, scores))
                await send_json(send, reply, headers=_ignored_header(ignored))

    async def _stream(self, source: Any, receive: Receive, send: Send, ignored: list[str]) -> None:
        limits = self.context.settings.limits
        headers = _ignored_header(ignored)
        await event_stream(source, receive, send, limits=limits, headers=headers)

    # -- models and tokens -------------------------------------------------------------------

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models."""
        data = [_model_object(model) for model in self.context.models]
        await send_json(send, {"object": "list", "data": data})

    async def one_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models/{id}."""
        name = scope["path"].removeprefix("/v1/models/")
        await send_json(send, _model_object(self.context.models.get(name)))

    async def tokenizer_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /tokenizer_info: what lm-eval's remote tokenizer reads."""
        model = self._named_in_query(scope)
        tokenizer = model.tokenizer
        info = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.decode([tokenizer.bos_id]),
            "eos_token": tokenizer.decode([tokenizer.eos_id]),
            "pad_token": tokenizer.decode([tokenizer.pad_id]),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": model.context,
            "chat_template": model.template,
        }
        await send_json(send, info)

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /tokenize: text to ids. The text of a special token becomes that token here."""
        limits = self.context.settings.limits
        request, _ = parse(scope["fledge.body"], TokenizeRequest, limits)
        model = self.context.models.get(request.model)

        def work() -> list[int]:
            ids = model.tokenizer.encode(request.prompt, allow_special=True)
            return [model.tokenizer.bos_id, *ids] if request.add_special_tokens else ids

        ids = await asyncio.to_thread(work) if len(request.prompt) > LARGE_BODY else work()
        reply = {"tokens": ids, "count": len(ids), "max_model_len": model.context}
        await send_json(send, reply)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /detokenize: ids to text."""
        limits = self.context.settings.limits
        request, _ = parse(scope["fledge.body"], DetokenizeRequest, limits)
        model = self.context.models.get(request.model)
        if any(token >= model.tokenizer.vocab_size for token in request.tokens):
            raise bad_value("tokens", f"A token id is not below {model.tokenizer.vocab_size}.")
        await send_json(send, {"prompt": model.tokenizer.decode(request.tokens)})

    # -- runs --------------------------------------------------------------------------------

    async def run_progress(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /runs/MODEL and /runs/MODEL/STAGE: how far the run of a served model is."""
        name, _, stage = scope["path"].removeprefix("/runs/").partition("/")
        runs: dict[str, Run] = {m.name: m.run for m in self.context.models if m.run is not None}
        if name not in runs or (stage and stage not in TRAINED_STAGES):
            raise ApiError(404, "No served model has such a run or stage.", code="unknown_run")
        run = runs[name]
        try:
            if stage:
                found = await asyncio.to_thread(training.detail, run, stage)
            else:
                found = await asyncio.to_thread(training.overview, run)
            await send_json(send, found)
        except UserError as error:  # a record that is broken, or of another version
            raise ApiError(
                500, f"{error.what}: {error.why}.", type="server_error", code="run_unreadable"
            ) from None

    def _named_in_query(self, scope: Scope) -> ServedModel:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        return self.context.models.get(query.get("model", [None])[0])

    # -- the server itself -------------------------------------------------------------------

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /health: 200 only where every model would answer now."""
        context = self.context
        states = {model.name: model.pool.state() for model in context.models}
        ready = all(state == "ready" for state in states.values())
        status = "draining" if context.draining else "ok" if ready else "unavailable"
        body = {
            "status": status,
            "models": states,
            "running": sum(model.pool.running for model in context.models),
            "waiting": sum(model.pool.waiting for model in context.models),
        }
        await send_json(send, body, status=200 if status == "ok" else 503)

    async def livez(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /livez: the event loop turns."""
        await send_json(send, {"status": "alive"})

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /metrics in Prometheus' text format."""
        body = self.context.metrics.text().encode()
        await send_bytes(send, body, "text/plain; version=0.0.4; charset=utf-8")

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /version."""
        await send_json(send, {"version": fledge.__version__})

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /openapi.json, where the operator wants it shown."""
        await send_json(send, openapi.document(self.context.settings.limits))

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET / and /web/...: the page."""
        body, kind = pages.content(scope["path"])
        await send_bytes(send, body, kind, headers=[(b"cache-control", b"no-cache")])

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                for model in self.context.models:
                    model.pool.start()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                for model in self.context.models:
                    await asyncio.to_thread(model.pool.stop)
                    if model.foreign is not None:
                        await model.foreign.close()
                if self.context.tools is not None:
                    self.context.tools.close()
                await send({"type": "lifespan.shutdown.complete"})
                return


async def send_json(
    send: Send, value: Any, *, status: int = 200, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    """A whole reply of one JSON value."""
    body = encode(value)
    await send_bytes(send, body, "application/json", status=status, headers=headers)


async def send_bytes(
    send: Send,
    body: bytes,
    kind: str,
    *,
    status: int = 200,
    headers: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """A whole reply."""
    lines = [
        (b"content-type", kind.encode()),
        (b"content-length", str(len(body)).encode()),
        *(headers or []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body})


def _require_json(scope: Scope) -> None:
    """A page of another site cannot send this type without asking first (CORS preflight)."""
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise ApiError(
            415,
            "Send JSON with the header `Content-Type: application/json`.",
            code="unsupported_media_type",
        )


def _ignored_header(names: list[str]) -> list[tuple[bytes, bytes]]:
    known = [name for name in names if name.isascii() and name.isidentifier()]
    return [(b"x-ignored-parameters", ",".join(known)[:512].encode())] if known else []


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created or int(time.time()),
        "owned_by": "fledge",
        "max_model_len": model.context,
        "fledge": {**model.card, "state": model.pool.state()},
    }
