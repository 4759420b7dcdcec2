"""One choice of a chat as it grows: token events in, what a client sees out.

`ChatReply` sorts tokens by the part they belong to. Text becomes content, cut at stop strings. A
python part that calls a function of the client becomes a tool call and ends the reply; any other is
run by the engine's own tool, and it and its output are shown as `tool_events`, an extension. Pure
bookkeeping: no asyncio, no HTTP. Used by `serve.chat_api`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fledge.engine.requests import TokenEvent
from fledge.engine.text_stream import TextStream
from fledge.tokenizer import Tokenizer

CALL = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_-]{0,63})\s*\((\s*\{.*\}\s*)\)\s*", re.DOTALL)


@dataclass
class Delta:
    """What one push adds; empty fields add nothing."""

    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    tool_events: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.logprobs or self.tool_events or self.tool_calls
                    or self.finish_reason)  # fmt: skip


class ChatReply:
    """One choice. After a delta with a finish_reason nothing more comes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: list[str],
        functions: frozenset[str] = frozenset(),
        begun: Sequence[int] = (),
        top_logprobs: int | None = None,
        outcome: Callable[[str, str], dict[str, Any]] = lambda _code, _output: {},
    ) -> None:
        """`begun` are ids of the prompt that open the reply; `outcome(code, output)` tells more of
        a run of the engine's own tool (ok, ms)."""
        special = tokenizer.special_tokens
        self._tokenizer = tokenizer
        self._stop = stop
        self._functions = functions
        self._top_logprobs = top_logprobs
        self._outcome = outcome
        self._opens = {special["<|python_start|>"]: "python", special["<|output_start|>"]: "output"}
        self._closes = {special["<|python_end|>"], special["<|output_end|>"]}
        self._special = frozenset(special.values())
        self._kind = "text"
        self._ids: list[int] = []  # of an open python or output part
        self._stream = TextStream(tokenizer, stop)
        self._code = ""
        self._events = 0
        self.text = ""
        self.tool_events: list[dict[str, Any]] = []
        self.tool_calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        self.tokens = 0
        self.finish_reason: str | None = None
        for token in begun:
            self._place(token, Delta())

    def push(self, event: TokenEvent) -> Delta:
        """What this token adds."""
        delta = Delta()
        if self.finish_reason is not None:
            return delta
        if event.token >= 0:
            self.tokens += 1
            self._place(event.token, delta, event)
        if self._stream.stopped is not None:
            delta.finish_reason = "stop"
        elif self.tool_calls:
            delta.finish_reason = "tool_calls"
        elif event.finish_reason is not None:
            self._show(self._stream.finish(), delta)
            self._close_part(delta, complete=False)
            delta.finish_reason = event.finish_reason
        self.finish_reason = delta.finish_reason
        return delta

    def _place(self, token: int, delta: Delta, event: TokenEvent | None = None) -> None:
        kind = self._opens.get(token)
        if kind is not None or token in self._closes:
            self._show(self._stream.finish(), delta)
            self._close_part(delta)
            if self._stream.stopped is None:
                self._stream = TextStream(self._tokenizer, self._stop)
            self._kind = kind or "text"
            return
        if self._kind != "text":
            self._ids.append(token)
            return
        if event is not None and token not in self._special and self._top_logprobs is not None:
            entry = self._entry(event)
            self.logprobs.append(entry)
            delta.logprobs.append(entry)
        self._show(self._stream.push(token), delta)

    def _show(self, text: str, delta: Delta) -> None:
        self.text += text
        delta.text += text

    def _close_part(self, delta: Delta, *, complete: bool = True) -> None:
        """Shows the open python or output part; one that was cut off is no call."""
        kind, ids = self._kind, self._ids
        self._kind, self._ids = "text", []
        if kind == "text":
            return
        text = self._tokenizer.decode(ids)
        if kind == "python":
            self._code = text
            call = self._called(text) if complete else None
            if call is not None:
                self.tool_calls.append(call)
                delta.tool_calls.append(call)
                return
            event = {"index": self._events, "type": "python", "at": len(self.text), "code": text}
        else:
            event = {"index": self._events, "type": "output", "output": text,
                     **self._outcome(self._code, text)}  # fmt: skip
            self._events += 1
        self.tool_events.append(event)
        delta.tool_events.append(event)

    def _called(self, code: str) -> dict[str, Any] | None:
        """The call of a function of the client that `code` is, in OpenAI's shape."""

        match = CALL.fullmatch(code)
        if match is not None and match.group(1) in self._functions:
            name, arguments = match.group(1), match.group(2).strip()
        elif "python" in self._functions:
            name, arguments = "python", json.dumps({"code": code}, ensure_ascii=False)
        else:
            return None
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def _entry(self, event: TokenEvent) -> dict[str, Any]:
        """A token in the shape of `logprobs.content`."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            data = self._tokenizer.token_bytes(token)
            return {
                "token": data.decode("utf-8", "replace") or self._tokenizer.decode([token]),
                "logprob": max(logprob, -9999.0),
                "bytes": list(data) or None,
            }

        most = self._top_logprobs or 0
        top = [one(*pair) for pair in event.top_logprobs[:most]]
        return {**one(event.token, event.logprob), "top_logprobs": top}
