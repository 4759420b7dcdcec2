"""Runs the python parts of answers in threads, so that a slow tool stops nobody else's row.

The scheduler hands in the code of a closed python part and collects the tokens of the output.
Used by `engine.scheduler`; what a tool is and may do is the business of `engine.tools`.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from fledge.engine.tools import Tools, ToolState

TOOL_THREADS = 4


@dataclass(frozen=True)
class ToolTokens:
    """The special tokens around code and output, and the tokenizer's two functions."""

    python_start: int
    python_end: int
    output_start: int
    output_end: int


class ToolRunner:
    """Runs python parts in threads, so that a slow tool stops nobody else's row."""

    def __init__(
        self,
        tokens: ToolTokens,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.tokens = tokens
        self._encode = encode
        self._decode = decode
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None

    def code(self, ids: list[int], token: int) -> str | None:
        """The code of the python part that `token`, the last of `ids`, closes; else None."""
        if token != self.tokens.python_end:
            return None
        for begin in range(len(ids) - 2, -1, -1):
            if ids[begin] == self.tokens.python_start:
                return self._decode(ids[begin + 1 : -1])
        return None

    def submit(self, tools: Tools, code: str, state: ToolState) -> Future[list[int]]:
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(
                TOOL_THREADS, thread_name_prefix="fledge-tool"
            )

        def work() -> list[int]:
            text = tools.run(code, state).text
            return [self.tokens.output_start, *self._encode(text), self.tokens.output_end]

        return self._executor.submit(work)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
