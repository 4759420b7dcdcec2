"""Chat templates of foreign folders, rendered where they can do no harm.

A folder's chat_template.jinja is a program that somebody else wrote. Jinja's immutable sandbox
keeps it from Python's insides; time and memory it does not bound, and `{% for i in range(99999) %}`
four deep is legal. So a template that is not fledge's own renders in a child process with limits
on processor time and memory, which is killed when it takes too long and started again when it is
next needed. Message text cannot forge special tokens: where it holds one's spelling, a mark is put
inside before rendering and taken out after the text was split. Used by `serve.prompts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import sys
from typing import Any

from fledge.errors import UserError
from fledge.serve.api_errors import ApiError
from fledge.serve.settings import Limits
from fledge.tokenizer import Tokenizer

MEMORY_BYTES = 512 << 20
START_SECONDS = 30.0  # to import Jinja on a busy machine


class ForeignTemplate:
    """One template and the child process that renders it; one rendering at a time."""

    def __init__(self, source: str, tokenizer: Tokenizer, limits: Limits) -> None:
        if len(source) > limits.template_chars:
            raise UserError(
                "the chat template is too large",
                f"it has {len(source)} characters; {limits.template_chars} are allowed",
                "take the model's own chat_template.jinja",
            )
        self._source = source
        self._tokenizer = tokenizer
        self._limits = limits
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        special = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    async def ids(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        """The ids of the prompt; ApiError where the template refuses or breaks its limits."""
        mark = f"\ue000{secrets.token_hex(8)}\ue000"
        text = await self._render(
            {
                "messages": _marked(messages, self._special, mark),
                "tools": _marked(tools, self._special, mark),
                "bos_token": "<|bos|>",
                "eos_token": "<|assistant_end|>",
            }
        )
        ids: list[int] = []
        position = 0
        for match in self._special.finditer(text):
            ids += self._tokenizer.encode(text[position : match.start()].replace(mark, ""))
            ids.append(self._tokenizer.special_tokens[match.group()])
            position = match.end()
        return ids + self._tokenizer.encode(text[position:].replace(mark, ""))

    async def close(self) -> None:
        """Ends the child."""
        async with self._lock:
            await self._kill()

    async def _render(self, variables: dict[str, Any]) -> str:
        async with self._lock:
            try:
                child = self._child or await self._start()
                assert child.stdin is not None and child.stdout is not None
                async with asyncio.timeout(self._limits.template_seconds):
                    child.stdin.write(json.dumps(variables).encode() + b"\n")
                    await child.stdin.drain()
                    line = await child.stdout.readline()
            except (TimeoutError, ValueError, OSError, asyncio.CancelledError) as error:
                await self._kill()
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise _refused("it took too long or wrote too much") from None
            if not line:
                await self._kill()
                raise _refused("it used too much time or memory")
        answer = json.loads(line)
        if "text" not in answer:
            raise _refused(str(answer.get("error"))[:300])
        return answer["text"]

    async def _start(self) -> asyncio.subprocess.Process:
        self._child = child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fledge.serve.template_child",
            str(MEMORY_BYTES), str(self._limits.template_chars),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=8 * self._limits.template_chars + (64 << 10),
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(self._source).encode() + b"\n")
        ready = b""
        try:
            async with asyncio.timeout(START_SECONDS):
                ready = await child.stdout.readline()
        finally:  # a caller that leaves now leaves nothing behind
            if not ready:
                await self._kill()
        if not ready:
            raise _refused("its process did not start")
        return child

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def _marked(value: Any, special: re.Pattern[str], mark: str) -> Any:
    """`value` with `mark` inside every special token's spelling in its texts."""
    if isinstance(value, str):
        return special.sub(lambda m: m.group()[0] + mark + m.group()[1:], value)
    if isinstance(value, list):
        return [_marked(item, special, mark) for item in value]
    if isinstance(value, dict):
        return {key: _marked(item, special, mark) for key, item in value.items()}
    return value


def _refused(why: str) -> ApiError:
    return ApiError(
        400,
        f"This model's chat template could not render the messages: {why}",
        param="messages",
        code="chat_template_failed",
    )
