"""Errors that a client sees: one class, one JSON shape, the status that OpenAI's clients expect.

Every refusal and failure of the server, whatever raised it, leaves as
`{"error": {"message", "type", "param", "code"}}`. The openai client retries 408, 409, 429 and 5xx
and honours `retry-after`, so a status is a promise: 429 and 503 are worth another try later, 400 is
not. LiteLLM tells kinds apart by words: the context error must hold "This model's maximum context
length is", and no other message may say "rate limit". Nothing here quotes a prompt.
"""

from __future__ import annotations

import json
from typing import Any

INVALID = "invalid_request_error"


class ApiError(Exception):
    """What a client is told. `retry_after` in seconds becomes a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after)))

    def body(self) -> dict[str, Any]:
        """The JSON object of a reply or of an error event in a stream."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def encoded(self) -> bytes:
        """`body` as bytes; ASCII, so that no odd character of a request can spoil it."""
        return json.dumps(self.body()).encode()


def bad_value(param: str | None, message: str, *, code: str = "invalid_value") -> ApiError:
    """400: a field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> ApiError:
    """400: a field that OpenAI knows and this server does not serve."""
    return ApiError(400, message, param=param, code="unsupported_parameter")


def context_overflow(limit: int, tokens: int, param: str) -> ApiError:
    """400: the prompt does not fit."""
    return ApiError(
        400,
        f"This model's maximum context length is {limit} tokens. However, your prompt has "
        f"{tokens} tokens. Please shorten it.",
        param=param,
        code="context_length_exceeded",
    )


def no_such_model(name: str, known: list[str]) -> ApiError:
    """404: no model of that name."""
    return ApiError(
        404,
        f"The model {name[:200]!r} does not exist here. The models are: {', '.join(known)}.",
        param="model",
        code="model_not_found",
    )


def busy(message: str, retry_after: float) -> ApiError:
    """503: the queue is full, or the wait in it was too long."""
    return ApiError(
        503, message, type="server_error", code="server_overloaded", retry_after=retry_after
    )


def key_busy(limit: int) -> ApiError:
    """429: this key has too many requests in flight."""
    return ApiError(
        429,
        f"This API key already has {limit} requests in flight, which is its limit. "
        "Wait for one of them to end.",
        type="requests",
        code="too_many_requests",
        retry_after=1,
    )


def unavailable(message: str, code: str, *, retry_after: float = 5) -> ApiError:
    """503: loading, rebuilding after a crash, or shutting down."""
    return ApiError(503, message, type="server_error", code=code, retry_after=retry_after)


def engine_failed() -> ApiError:
    """500: the engine broke down under this request; it is being rebuilt."""
    return ApiError(
        500,
        "The engine failed while it worked on this request. It is being started again.",
        type="server_error",
        code="engine_failure",
    )


def too_slow(seconds: float) -> ApiError:
    """408: a request ran past its deadline."""
    return ApiError(
        408,
        f"The request ran longer than the {seconds:g} seconds that this server allows.",
        type="server_error",
        code="request_timeout",
        headers={"x-should-retry": "false"},  # it would only run as long again
    )
