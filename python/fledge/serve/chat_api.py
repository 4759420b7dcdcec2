"""POST /v1/chat/completions: a conversation in, one or more replies out, whole or as a stream.

The handler builds the prompt and a job, and turns the engine's tokens into OpenAI's objects through
`reply.ChatReply`. Cancelling is part of every way out: a client that leaves, a stop string, a tool
call of the client. Called by `serve.app`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fledge.engine.requests import Request as EngineRequest
from fledge.serve.api_errors import bad_value
from fledge.serve.context import Context
from fledge.serve.jobs import Handle, Job
from fledge.serve.models import ServedModel
from fledge.serve.prompts import PYTHON_START, declared, forced_start, foreign_ids, native_ids
from fledge.serve.reply import ChatReply, Delta
from fledge.serve.sampling import room_for, sampling_params
from fledge.serve.schema import ChatRequest
from fledge.serve.tool_runs import RequestTools


class ChatCall:
    """One request under way."""

    def __init__(
        self,
        context: Context,
        request: ChatRequest,
        model: ServedModel,
        prompt: list[int],
        key: str,
        dropped: int | None = None,
    ) -> None:
        """`dropped`: messages that were left out of the prompt, None where none could be."""
        self.dropped = dropped
        self.request = request
        self.model = model
        self.prompt = prompt
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        functions = frozenset(tool.function.name for tool in declared(request))
        asked = request.max_completion_tokens
        asked = request.max_tokens if asked is None else asked
        if asked == 0:
            raise bad_value("max_completion_tokens", "max_completion_tokens is at least 1.")
        runs_python = (
            context.settings.python_tool
            and request.python_tool is not False
            and request.tool_choice != "none"
        )
        special = model.tokenizer.special_tokens
        banned = () if runs_python or functions else (special[PYTHON_START],)
        params = sampling_params(
            request,
            model,
            max_tokens=room_for(prompt, model, asked, param="messages"),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            banned=banned,
        )
        self.tools: Any = None
        if (runs_python or functions) and context.tools is not None:
            self.tools = RequestTools(context.tools, functions, context.metrics)
        goes_on = request.continue_final_message
        begun = [] if goes_on else forced_start(request, model.tokenizer)
        self.replies = [
            ChatReply(
                model.tokenizer,
                stop=request.stops(),
                functions=functions,
                begun=begun,
                top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
                **({"outcome": self.tools.outcome} if self.tools else {}),
            )
            for _ in range(params.n)
        ]
        self.job = Job(
            request=EngineRequest(prompt, params, self.tools),
            rows=params.n,
            key=key,
            prompt_tokens=len(prompt),
        )

    async def deltas(self, handle: Handle) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What every batch of tokens adds, by choice, until all choices have finished."""
        try:
            while any(reply.finish_reason is None for reply in self.replies):
                batch: dict[int, Delta] = {}
                for event in await handle.next():
                    delta = self.replies[event.choice].push(event)
                    if delta:
                        known = batch.get(event.choice)
                        batch[event.choice] = delta if known is None else _joined(known, delta)
                if batch:
                    yield list(batch.items())
        finally:
            handle.cancel()

    async def whole(self, handle: Handle) -> dict[str, Any]:
        """The reply as one object."""
        async for _ in self.deltas(handle):
            pass
        choices = [
            {
                "index": i,
                "message": _message(reply),
                "logprobs": {"content": reply.logprobs, "refusal": None}
                if self.request.logprobs
                else None,
                "finish_reason": reply.finish_reason,
            }
            for i, reply in enumerate(self.replies)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    async def chunks(self, handle: Handle) -> AsyncIterator[list[dict[str, Any]]]:
        """The reply as chunks, those that are ready together in one list."""
        usage = self.request.include_usage()
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if usage else {})}

        def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            return {**head, "choices": [{**choice, **more}]}

        first = True
        deltas = self.deltas(handle)
        try:
            async for batch in deltas:
                ready = []
                if first:
                    first = False
                    opening = {"role": "assistant", "content": "", "refusal": None}
                    ready += [chunk(i, dict(opening)) for i in range(len(self.replies))]
                for index, delta in batch:
                    ready += [chunk(index, part, **more) for part, more in _parts_of(delta)]
                yield ready
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]  # an async generator
        if usage:
            yield [{**head, "choices": [], "usage": self._usage()}]

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        generated = sum(reply.tokens for reply in self.replies)
        usage = usage_of(len(self.prompt), generated, self.job.cached)
        return usage if self.dropped is None else {**usage, "dropped_messages": self.dropped}


def usage_of(prompt: int, generated: int, cached: int | None) -> dict[str, Any]:
    """The usage object; how much was cached only where the engine tells."""
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return usage


async def start_chat(
    context: Context, request: ChatRequest, key: str, *, in_thread: bool
) -> tuple[ChatCall, Handle]:
    """The call, checked and queued; ApiError where it cannot be. Long texts are tokenized in a
    thread, so that the streams of others go on."""
    model = context.models.get(request.model)
    model.pool.check_room(request.n or 1)
    dropped = None
    if model.foreign is not None:
        prompt = await foreign_ids(request, model.tokenizer, model.foreign)
    elif in_thread:
        work = (native_ids, request, model.tokenizer, model.context)
        prompt, dropped = await asyncio.to_thread(*work)
    else:
        prompt, dropped = native_ids(request, model.tokenizer, model.context)
    call = ChatCall(context, request, model, prompt, key, dropped)
    (handle,) = model.pool.submit([call.job])
    return call, handle


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.text + second.text,
        first.logprobs + second.logprobs,
        first.tool_events + second.tool_events,
        first.tool_calls + second.tool_calls,
        second.finish_reason or first.finish_reason,
    )


def _parts_of(delta: Delta) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(delta object, further fields of its choice) of every chunk that a Delta becomes."""
    parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
    if delta.text or delta.logprobs:
        logprobs = {"content": delta.logprobs, "refusal": None} if delta.logprobs else None
        parts.append(({"content": delta.text}, {"logprobs": logprobs}))
    if delta.tool_events:
        parts.append(({"tool_events": delta.tool_events}, {}))
    for i, call in enumerate(delta.tool_calls):
        function = call["function"]
        opening = {**call, "function": {"name": function["name"], "arguments": ""}}
        rest = {"function": {"arguments": function["arguments"]}}
        parts.append(({"tool_calls": [{"index": i, **opening}]}, {}))
        parts.append(({"tool_calls": [{"index": i, **rest}]}, {}))
    if delta.finish_reason is not None:
        parts.append(({}, {"finish_reason": delta.finish_reason}))
    return parts


def _message(reply: ChatReply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    if reply.tool_calls:
        message["content"] = reply.text or None
        message["tool_calls"] = reply.tool_calls
    if reply.tool_events:
        message["tool_events"] = reply.tool_events
    return message
