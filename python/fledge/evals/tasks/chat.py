"""Chat: replies to opening messages that no stage trained on, graded on form, not on truth.

A reply passes if it says something, does not merely repeat the question, and does not circle: at
most a tenth of its 4-word runs occur twice. This catches the ways in which small chat models break
down; whether a reply is right or helpful it cannot tell. Items come from the chat files' held-out
1 % (`data.conversations.held_out_chats`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fledge.evals.tasks.base import Item

MAX_REPEATED = 0.1
MAX_PROMPT_CHARS = 600


class Chat:
    """Held-out opening messages of the chat files; short ones, so that they fit a small context."""

    name = "chat"
    kind: Literal["generate", "choice"] = "generate"
    chance = 0.0
    max_new_tokens = 128

    def __init__(self, conversations: Sequence[Mapping[str, Any]]) -> None:
        self._conversations = conversations

    def items(self) -> list[Item]:
        """{"id", "messages": the opening, "answer": what the file's assistant said}."""
        found = []
        for i, conversation in enumerate(self._conversations):
            first, reply = conversation["messages"][:2]
            if first["role"] == "user" and len(first["content"]) <= MAX_PROMPT_CHARS:
                found.append(
                    {"id": f"chat/{i}", "messages": [first], "answer": str(reply["content"])}
                )
        return found

    def grade(self, item: Item, text: str) -> bool:
        """Whether the reply has the form of an answer."""
        said = text.strip().lower()
        asked = str(item["messages"][-1]["content"]).strip().lower()
        return bool(said) and said != asked and repeated_share(said) <= MAX_REPEATED


def repeated_share(text: str, n: int = 4) -> float:
    """The share of runs of `n` words that occurred before in the text; 0 for a short text."""
    words = text.split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
