"""What running code gives back: the result type and the error type of every sandbox layer.

They live apart so that the layers (`arithmetic`, `interpreter`, `process`) and
`fledge.engine.tools` share one vocabulary without importing each other. Nothing here runs anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class ToolError(Exception):
    """Code that could not be run to an answer; the message is what the model is shown."""


@dataclass(frozen=True)
class ToolResult:
    """The outcome of one call: `ok`, or an `error` such as "ZeroDivisionError: division by zero".

    `stdout` holds the prints and the value of a last expression, `ms` the wall time in
    milliseconds, `truncated` whether any output was cut. Strings that look like special tokens stay
    in the text as they are: `Tokenizer.encode` reads them as ordinary text.
    """

    ok: bool
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    ms: float = 0.0
    truncated: bool = False
    max_chars: int = 1000

    @property
    def text(self) -> str:
        """What is fed back between output_start and output_end, at most `max_chars` characters."""
        parts = [self.stdout.rstrip("\n"), self.stderr.rstrip("\n"), self.error or ""]
        return shorten("\n".join(part for part in parts if part), self.max_chars)


class Python(Protocol):
    """What runs whole programs: L1 (`interpreter.Interpreter`) or L2 (`process.CPython`)."""

    def run(self, code: str, state: Any = None) -> ToolResult: ...

    def why_unavailable(self) -> str | None: ...

    def close(self) -> None: ...


def shorten(text: str, max_chars: int) -> str:
    """`text`, or its beginning and a mark that it was cut, in at most `max_chars` characters."""
    if len(text) <= max_chars:
        return text
    mark = "..."
    return text[: max(0, max_chars - len(mark))] + mark[:max_chars]
