"""From a chat request to the ids that the model continues.

fledge's own chat format renders natively, so that text stays text; a foreign template goes through
`templates`. The tools that a client declares are told to the model as system text, one line each in
the call form that the chat format knows, `NAME(<JSON object>)`. A tool_choice that demands a call
becomes the beginning of one. Called by `serve.chat_api`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fledge.errors import UserError
from fledge.serve.api_errors import bad_value, unsupported
from fledge.serve.schema import ChatRequest, Message, NamedChoice, ToolDeclaration
from fledge.serve.templates import ForeignTemplate
from fledge.tokenizer import Tokenizer
from fledge.tokenizer.chat import prompt_room, render_prompt, window

PYTHON_START = "<|python_start|>"


def native_ids(
    request: ChatRequest, tokenizer: Tokenizer, context: int
) -> tuple[list[int], int | None]:
    """(prompt in fledge's own format, messages left out of it or None where nobody asked).

    The prompt ends with the beginning of a call that tool_choice demands. `context` is how many
    tokens the model reads; it matters to truncation "auto" only.
    """
    messages = [_plain(message) for message in request.messages]
    goes_on = bool(request.continue_final_message)
    try:
        messages = _with_tools(messages, declared(request))
        kept = messages
        if request.truncation == "auto":
            asked = request.max_completion_tokens or request.max_tokens
            room = prompt_room(context, asked)
            fitting = window({"messages": messages}, tokenizer, room, keep="end")
            kept = messages if fitting is None else fitting["messages"]
        ids = render_prompt(tokenizer, kept, continue_final=goes_on)
    except UserError as error:
        raise bad_value("messages", f"{error.what}: {error.why}.") from None
    dropped = len(messages) - len(kept) if request.truncation == "auto" else None
    return ids + ([] if goes_on else forced_start(request, tokenizer)), dropped


async def foreign_ids(
    request: ChatRequest, tokenizer: Tokenizer, template: ForeignTemplate
) -> list[int]:
    """The same through a template of somebody else, which neither cuts nor goes on."""
    if request.continue_final_message:
        raise unsupported(
            "continue_final_message", "This model has a chat template that cannot go on."
        )
    messages = [_plain(message) for message in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in declared(request)]
    return await template.ids(messages, tools or None) + forced_start(request, tokenizer)


def declared(request: ChatRequest) -> list[ToolDeclaration]:
    """The client's tools that the model may call."""
    return [] if request.tool_choice == "none" else list(request.tools or [])


def forced_start(request: ChatRequest, tokenizer: Tokenizer) -> list[int]:
    """The ids with which a demanded call begins; none where the model is free."""
    choice, tools = request.tool_choice, declared(request)
    if choice in (None, "auto") or not tools or PYTHON_START not in tokenizer.special_tokens:
        return []
    start = [tokenizer.special_tokens[PYTHON_START]]
    name = choice.function.name if isinstance(choice, NamedChoice) else None
    if name is None and len(tools) == 1:
        name = tools[0].function.name
    # the name alone: the bracket and the brace behind it are one token where training made it so
    return start if name in (None, "python") else start + tokenizer.encode(name)


def tool_text(tools: Sequence[ToolDeclaration]) -> str:
    """What the system message says of the tools."""
    lines = ["You can call these functions by writing NAME(<JSON object>) as code:"]
    for tool in tools:
        function = tool.function
        about = " ".join((function.description or "").split())
        schema = json.dumps(function.parameters or {}, ensure_ascii=False)
        lines.append(
            f"- {function.name}: {about} {schema}" if about else f"- {function.name} {schema}"
        )
    return "\n".join(lines)


def _with_tools(
    messages: list[dict[str, Any]], tools: list[ToolDeclaration]
) -> list[dict[str, Any]]:
    others = [tool for tool in tools if tool.function.name != "python"]
    if not others:
        return messages
    text = tool_text(others)
    if messages[0]["role"] in ("system", "developer"):
        first = messages[0]
        content = first["content"]
        joined = content if isinstance(content, str) else "".join(p["text"] for p in content)
        return [{**first, "content": f"{joined}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _plain(message: Message) -> dict[str, Any]:
    """The message as `tokenizer.chat` takes it; a refusal is text that the assistant said."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = [
            {"type": "text" if part.type == "refusal" else part.type,
             "text": part.text if part.text is not None else part.refusal or ""}
            for part in message.content
        ]  # fmt: skip
    return plain
