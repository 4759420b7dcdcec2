"""The chat format: conversations to text and to ids with a loss mask.

    <|bos|><|system_start|>...<|system_end|><|user_start|>...<|user_end|>
    <|assistant_start|>text<|python_start|>code<|python_end|>
        <|output_start|>result<|output_end|>text<|assistant_end|>           (no line breaks)

A conversation is a dict with "messages" of roles system (or developer), user, assistant and tool.
Content is a string or a list of parts {"type": text | python | output, "text": str}. OpenAI's
assistant(tool_calls), tool, assistant messages become one assistant turn, ended once: a call is a
python part, for the tool `python` its code and for any other tool `NAME(<JSON object>)`; a tool
message is an output part.

Loss mask: 1 where the model must learn to produce the token, which is assistant text, python parts
with both their markers, and <|assistant_end|>; 0 for everything else, outputs too. Message text is
always ordinary text: it cannot forge a special token. `chat_template.jinja` is this file for other
programs (give it tool arguments as dicts, as transformers asks); `reply.py` is the way back. The
data loader, stages, the server and the evaluations call this; it never truncates silently.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fledge.errors import UserError
from fledge.tokenizer.bpe import BOS, Tokenizer

Message = Mapping[str, Any]
Conversation = Mapping[str, Any]


class Segment(NamedTuple):
    """A stretch of a rendered conversation: one special token, or text between two of them."""

    text: str
    special: bool
    trained: bool


def render(tok: Tokenizer, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Ids and loss mask (1 = trained on) of a whole conversation, bos included."""
    return _encode(tok, _segments(conversation["messages"], prompt=False))


def render_prompt(
    tok: Tokenizer, messages: Sequence[Message], *, continue_final: bool = False
) -> list[int]:
    """Ids after which the assistant's reply is generated.

    They end with <|assistant_start|>, or inside the open turn where the last message is a tool's
    result: the assistant goes on after it. With `continue_final` the last message is an unfinished
    one of the assistant, and its turn stays open too.
    """
    if continue_final and (not messages or messages[-1].get("role") != "assistant"):
        raise UserError(
            "there is no answer to continue",
            "the last message is not the assistant's",
            "end with the assistant's unfinished message",
        )
    return _encode(tok, _segments(messages, prompt=True, continue_final=continue_final))[0]


def render_text(conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
    """The conversation as a string: what chat_template.jinja renders."""
    segments = _segments(conversation["messages"], prompt=add_generation_prompt)
    return "".join(segment.text for segment in segments)


def window(
    conversation: Conversation,
    tok: Tokenizer,
    max_tokens: int,
    *,
    keep: Literal["start", "end"] = "start",
) -> dict[str, Any] | None:
    """The conversation with only its first or last exchanges, at most `max_tokens` ids long.

    An exchange is a user message and all that follows it up to the next; it is kept whole or not at
    all. Leading system messages stay. Training keeps the start, a chat the end (and leaves room
    for the reply). None if not even one exchange fits.
    """
    system, exchanges = _exchanges(conversation["messages"])
    length = _length(tok, system)
    kept: list[list[Message]] = []
    for exchange in exchanges if keep == "start" else reversed(exchanges):
        length += _length(tok, exchange) - 1  # bos is counted already
        if length > max_tokens:
            break
        kept.append(exchange)
    if not kept:
        return None
    if keep == "end":
        kept.reverse()
    return {**conversation, "messages": [*system, *(m for exchange in kept for m in exchange)]}


def prompt_room(context: int, asked: int | None) -> int:
    """Tokens that a conversation may take where its oldest exchanges may be left out of `window`.

    The rule of the terminal chat and of the server's truncation "auto": the answer gets as many
    tokens as were asked for, but never more than a third of the context; the rest is for what was
    said, less one for the marker that opens the answer.
    """
    third = context // 3
    return context - (third if asked is None else min(asked, third)) - 1


def _encode(tok: Tokenizer, segments: Iterator[Segment]) -> tuple[list[int], list[int]]:
    special = tok.special_tokens
    ids: list[int] = []
    mask: list[int] = []
    for segment in segments:
        new = [special[segment.text]] if segment.special else tok.encode(segment.text)
        ids += new
        mask += [int(segment.trained)] * len(new)
    return ids, mask


def _segments(
    messages: Sequence[Message], *, prompt: bool, continue_final: bool = False
) -> Iterator[Segment]:
    """The conversation as segments; neighbouring text of one part type is already joined."""
    yield Segment(BOS, True, False)
    for i, message in enumerate(messages):
        role = _role(message, i)
        if role in ("assistant", "tool"):
            if not _continues(messages, i):
                yield Segment("<|assistant_start|>", True, False)
            yield from _assistant_segments(message, i)
            final = i + 1 == len(messages)
            following = not final and _continues(messages, i + 1)
            stays_open = prompt and final and (role == "tool" or continue_final)
            if not following and not stays_open:
                yield Segment("<|assistant_end|>", True, True)
        else:
            yield Segment(f"<|{role}_start|>", True, False)
            text = "".join(text for _, text in _parts(message, i))
            if text:
                yield Segment(text, False, False)
            yield Segment(f"<|{role}_end|>", True, False)
    is_open = continue_final or (messages and _role(messages[-1], len(messages) - 1) == "tool")
    if prompt and not is_open:
        yield Segment("<|assistant_start|>", True, False)


def _role(message: Message, index: int) -> str:
    role = message.get("role")
    if role == "developer":
        return "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise UserError(
            f"message {index} has the role {role!r}",
            "a message is by system, developer, user, assistant or tool",
            "correct the role",
        )
    return role


def _continues(messages: Sequence[Message], index: int) -> bool:
    """True if message `index` goes on with the assistant turn of the message before it."""
    role = messages[index].get("role")
    if index == 0 or role not in ("assistant", "tool"):
        return False
    before = messages[index - 1]
    if role == "tool":
        return before.get("role") in ("assistant", "tool")
    return before.get("role") == "tool" or bool(before.get("tool_calls"))


def _assistant_segments(message: Message, index: int) -> Iterator[Segment]:
    if message["role"] == "tool":
        text = "".join(text for _, text in _parts(message, index))
        parts = [("output", text)]
    else:
        parts = _parts(message, index)
        parts += [("python", _call_text(call)) for call in message.get("tool_calls") or []]
    for kind, text in _joined(parts):
        trained = kind != "output"
        if kind != "text":
            yield Segment(f"<|{kind}_start|>", True, trained)
        if text:
            yield Segment(text, False, trained)
        if kind != "text":
            yield Segment(f"<|{kind}_end|>", True, trained)


def _joined(parts: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Neighbouring text parts as one, because they are tokenized as one string."""
    text = ""
    for kind, piece in parts:
        if kind == "text":
            text += piece
            continue
        if text:
            yield "text", text
        text = ""
        yield kind, piece
    if text:
        yield "text", text


def _parts(message: Message, index: int) -> list[tuple[str, str]]:
    """The content of a message as (type, text) pairs; any role but assistant has text only."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [("text", content)]
    parts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        known = ("text", "python", "output") if message["role"] == "assistant" else ("text",)
        if kind not in known or not isinstance(text, str):
            raise UserError(
                f"message {index} of role {message['role']!r} has a part of type {kind!r}",
                f"its parts are {' | '.join(known)}, each with a string `text`",
                "send text; images and sound are not understood",
            )
        parts.append((kind, text))
    return parts


def _call_text(call: Mapping[str, Any]) -> str:
    """What the assistant writes to make this call (OpenAI's shape)."""
    function = call.get("function") or call
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return f"{function['name']}({arguments})"  # as the model wrote it
    if function["name"] == "python" and isinstance(arguments, dict) and "code" in arguments:
        return str(arguments["code"])
    return f"{function['name']}({json.dumps(arguments, ensure_ascii=False)})"


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Leading system messages, then groups that each begin with a user message."""
    first = 0
    while first < len(messages) and messages[first].get("role") in ("system", "developer"):
        first += 1
    groups: list[list[Message]] = []
    for message in messages[first:]:
        if not groups or message.get("role") == "user":
            groups.append([])
        groups[-1].append(message)
    return list(messages[:first]), groups


def _length(tok: Tokenizer, messages: list[Message]) -> int:
    """Ids of messages with bos; special tokens keep exchanges apart, so lengths add up."""
    return len(render(tok, {"messages": messages})[0])
