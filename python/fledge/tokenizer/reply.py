"""What a model wrote, as parts: text, python calls and tool output.

The inverse of `tokenizer.chat.render` for one assistant turn. Used by the engine's callers
(evaluation, rewards, chat), which must tell the answer apart from the tool trace. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fledge.tokenizer.bpe import Tokenizer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def split_parts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, str]]:
    """Parts {type, text} of the ids of an assistant turn, empty ones left out.

    An unclosed block keeps its type up to the end; ids after <|assistant_end|> are ignored.
    """
    special = tokenizer.special_tokens
    opens = {special["<|python_start|>"]: "python", special["<|output_start|>"]: "output"}
    closes = {special["<|python_end|>"], special["<|output_end|>"]}
    ends = {special["<|assistant_end|>"], special["<|bos|>"]}
    parts: list[dict[str, str]] = []
    kind, run = "text", []

    def close() -> None:
        text = tokenizer.decode(run)
        if text:
            parts.append({"type": kind, "text": text})
        run.clear()

    for token in ids:
        if token in ends:
            break
        if token in opens or token in closes:
            close()
            kind = opens.get(token, "text")
        else:
            run.append(token)
    close()
    return parts


def answer_text(parts: list[dict[str, str]]) -> str:
    """The text after the last tool output: what the assistant finally says."""
    last_output = max((i for i, p in enumerate(parts) if p["type"] == "output"), default=-1)
    return "".join(p["text"] for p in parts[last_output + 1 :] if p["type"] == "text").strip()


def last_number(text: str) -> str | None:
    """The last number in a text without thousands separators, or None."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None
