"""`fledge chat` with an engine that is told what to say: for tests that drive a real terminal.

Run as `python terminal_driver.py CONTEXT`. The answer to `slow N` is N words with a pause after
each, so that a test can stop it; everything else is said back. Not a test itself.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fledge import chat, chat_terminal
from fledge.chat import Chat, Settings
from fledge.tokenizer import Tokenizer


class Echo:
    """Says back what the last user message says."""

    def __init__(self, tok: Tokenizer) -> None:
        self.tok = tok

    def stream(self, prompt: list[int], params: Any, tools: Any = None) -> Iterator[int]:
        special = self.tok.special_tokens
        start, end = special["<|user_start|>"], special["<|user_end|>"]
        first = len(prompt) - prompt[::-1].index(start)
        said = self.tok.decode(prompt[first : prompt.index(end, first)])
        word, _, number = said.partition(" ")
        if word == "slow":
            for i in range(int(number)):
                yield from self.tok.encode(f"word{i} ")
                time.sleep(0.05)
        elif word == "tool":
            yield special["<|python_start|>"]
            yield from self.tok.encode("6*7")
            for mark in ("<|python_end|>", "<|output_start|>"):
                yield special[mark]
            yield from self.tok.encode("42")
            yield special["<|output_end|>"]
        else:
            yield from self.tok.encode(f"<{said}>")
        yield self.tok.eos_id


@contextlib.contextmanager
def open_echo(path: Path, settings: Settings, **more: Any) -> Iterator[Chat]:
    """In the place of `fledge.chat.open_chat`."""
    tok = Tokenizer.train(iter(["hello there"]), vocab_size=384)
    yield Chat(Echo(tok), tok, context=int(sys.argv[1]), settings=settings,
               make_params=lambda now: now, write=chat.to_stdout, **more)  # fmt: skip


if __name__ == "__main__":
    chat_terminal.open_chat = open_echo
    sys.exit(chat_terminal.talk(Path(), Settings(max_tokens=64)))
