"""The OpenAPI document of the server, made from the pydantic models that it really parses with.

Off by default; `fledge serve --openapi` shows it at /openapi.json. The tests drive schemathesis
with it.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

import fledge
from fledge.serve.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from fledge.serve.settings import Limits

POSTS = {
    "/v1/chat/completions": ("A reply to a conversation.", ChatRequest),
    "/v1/completions": ("The continuation of a prompt.", CompletionRequest),
    "/tokenize": ("Text to token ids.", TokenizeRequest),
    "/detokenize": ("Token ids to text.", DetokenizeRequest),
}
GETS = {
    "/v1/models": "The models served here.",
    "/tokenizer_info": "The special tokens and the chat template.",
    "/health": "Whether every model would answer now.",
    "/livez": "Whether the process answers at all.",
    "/metrics": "Figures for Prometheus.",
    "/version": "The version of fledge.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(limits: Limits) -> dict[str, Any]:
    """The document as a dict."""
    kinds = [(model, "validation") for _, model in POSTS.values()]
    _, table = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = {**table["$defs"], "Error": ERROR}
    failures = {
        code: {
            "description": about,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for code, about in (
            ("400", "A field is wrong, or the prompt does not fit."),
            ("401", "No valid API key."),
            ("403", "Host or Origin not allowed."),
            ("404", "No such model or path."),
            ("405", "Another method is needed."),
            ("408", "Too slow."),
            ("413", f"The body has more than {limits.body_bytes} bytes."),
            ("415", "The body is not JSON."),
            ("429", "This API key has too many requests in flight."),
            ("500", "The engine failed."),
            ("503", "Loading, full or shutting down."),
        )
    }
    paths: dict[str, Any] = {}
    for path, (about, model) in POSTS.items():
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        paths[path] = {
            "post": {
                "summary": about,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                },
                "responses": {"200": {"description": about}, **failures},
            }
        }
    for path, about in GETS.items():
        paths[path] = {"get": {"summary": about, "responses": {"200": {"description": about},
                                                             **failures}}}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "fledge", "version": fledge.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
