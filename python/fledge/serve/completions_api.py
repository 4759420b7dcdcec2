"""POST /v1/completions: prompts as text or ids, continued, echoed, scored.

`echo` with `logprobs` is what lm-eval's local-completions reads: for a prompt of N ids the arrays
have N + 1 entries, the first without a value, the last of the one token generated, present even if
it ends the text; and an id prompt is taken as it is, with no bos in front. The prompt's own
log-probabilities come from `scoring`, never from decoding. Called by `serve.app`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fledge.engine.requests import Request as EngineRequest
from fledge.engine.requests import TokenEvent
from fledge.engine.text_stream import TextStream
from fledge.serve.api_errors import bad_value, context_overflow
from fledge.serve.chat_api import usage_of
from fledge.serve.context import Context
from fledge.serve.jobs import Handle, Job
from fledge.serve.models import ServedModel
from fledge.serve.sampling import room_for, sampling_params
from fledge.serve.schema import CompletionRequest
from fledge.serve.scoring import Scored, score_prompts
from fledge.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's
LOWEST = -9999.0  # JSON has no -inf


@dataclass
class TokenLog:
    """The `logprobs` object of a choice as it grows."""

    tokenizer: Tokenizer
    most: int
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(
        self, token: int, logprob: float | None, top: list[tuple[int, float]] | None, offset: int
    ) -> None:
        """One token more; `top` gets the token itself if it is not among them."""
        self.tokens.append(token_text(self.tokenizer, token))
        self.text_offset.append(offset)
        if logprob is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        own = max(logprob, LOWEST)
        self.token_logprobs.append(own)
        table: dict[str, float] = {}
        for other, value in [*(top or [])[: self.most], (token, own)]:
            # two ids may have the same text: the likelier one counts
            text = token_text(self.tokenizer, other)
            table[text] = max(table.get(text, LOWEST), value)
        self.top_logprobs.append(table)

    def since(self, first: int) -> dict[str, Any]:
        """The entries from number `first` on, as the reply holds them."""
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: getattr(self, name)[first:] for name in names}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a key: its text, or its bytes where they are no text by themselves."""
    data = tokenizer.token_bytes(token)
    if not data:
        return tokenizer.decode([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class TextChoice:
    """One choice of one prompt."""

    def __init__(
        self, tokenizer: Tokenizer, stop: list[str], *, logprobs: int | None, echo: str
    ) -> None:
        self.text = echo
        self.log = None if logprobs is None else TokenLog(tokenizer, logprobs)
        self.tokens = 0
        self.finish_reason: str | None = None
        self._stream = TextStream(tokenizer, stop)
        self._offsets = tokenizer.decoder(skip_special=True)
        self._offset = len(echo)

    def push(self, event: TokenEvent) -> str:
        """The text that this token adds."""
        if self.finish_reason is not None:
            return ""
        text = ""
        if event.token >= 0:
            self.tokens += 1
            if self.log is not None:
                self.log.add(event.token, event.logprob, event.top_logprobs, self._offset)
            self._offset += len(self._offsets.push(event.token))
            text = self._stream.push(event.token)
        if self._stream.stopped is None and event.finish_reason is not None:
            text += self._stream.finish()
        if self._stream.stopped is not None:
            self.finish_reason = "stop"
        else:
            self.finish_reason = event.finish_reason
        self.text += text
        return text


class CompletionCall:
    """One request under way."""

    def __init__(self, context: Context, request: CompletionRequest, model: ServedModel, key: str):
        self.request = request
        self.model = model
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.prompts, self.hidden_bos = _prompts(request, model)
        asked = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        if asked == 0 and not request.echo:
            raise bad_value("max_tokens", "max_tokens 0 needs echo.")
        scores = bool(request.echo) and request.logprobs is not None
        greedy = request.temperature == 0 and not (request.logit_bias or request.stops())
        # one token of the likeliest: scoring the prompt gives it already
        self.only_scores = (
            scores and (asked == 0 or (asked == 1 and greedy)) and (request.n or 1) == 1
            and not (request.presence_penalty or request.frequency_penalty)
            and not request.dry_multiplier
            and request.repetition_penalty in (None, 1.0)
        )  # fmt: skip
        self.asked = asked
        n = 1 if asked == 0 else request.n or 1
        echoes = [self._echo(prompt) if request.echo else "" for prompt in self.prompts]
        self.choices = [
            TextChoice(model.tokenizer, request.stops(), logprobs=request.logprobs, echo=echo)
            for echo in echoes
            for _ in range(n)
        ]
        self.n = n
        self.jobs: list[Job] = []
        for prompt in self.prompts:
            if self.only_scores or asked == 0:
                if len(prompt) > model.context:
                    raise context_overflow(model.context, len(prompt), "prompt")
                continue
            params = sampling_params(
                request, model,
                max_tokens=room_for(prompt, model, asked, param="prompt"),
                top_logprobs=request.logprobs,
            )  # fmt: skip
            self.jobs.append(
                Job(EngineRequest(prompt, params), rows=n, key=key, prompt_tokens=len(prompt))
            )
        self.score_job: Job | None = None
        if scores:
            top = max(request.logprobs or 0, 1)
            self.score_job = Job(
                call=lambda engine: score_prompts(engine, self.prompts, top),
                key=key,
                prompt_tokens=sum(map(len, self.prompts)),
            )

    def _echo(self, prompt: list[int]) -> str:
        return self.model.tokenizer.decode(prompt[self.hidden_bos :], skip_special=True)

    def submit(self) -> tuple[list[Handle], Handle | None]:
        """Queues the work: (a handle for each prompt, one for the scores)."""
        jobs = self.jobs if self.score_job is None else [*self.jobs, self.score_job]
        handles = self.model.pool.submit(jobs) if jobs else []
        return (handles, None) if self.score_job is None else (handles[:-1], handles[-1])

    async def chunks(self, handles: list[Handle]) -> AsyncIterator[list[dict[str, Any]]]:
        """The choices as chunks; prompts advance together."""
        head = self._head()
        usage = self.request.include_usage()
        if usage:
            head = {**head, "usage": None}
        if self.request.echo:
            yield [self._chunk(head, i, c.text, None) for i, c in enumerate(self.choices)]
        waits = {asyncio.ensure_future(h.next()): i for i, h in enumerate(handles)}
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                ready: list[dict[str, Any]] = []
                for future in done:
                    prompt = waits.pop(future)
                    ready += self._take(head, prompt, future.result())
                    own = self.choices[prompt * self.n : (prompt + 1) * self.n]
                    if any(choice.finish_reason is None for choice in own):
                        waits[asyncio.ensure_future(handles[prompt].next())] = prompt
                    else:
                        handles[prompt].cancel()
                if ready:
                    yield ready
        finally:
            for future in waits:
                future.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
            for handle in handles:
                handle.cancel()
        if usage:
            yield [{**head, "choices": [], "usage": self._usage()}]

    def _take(self, head: dict[str, Any], prompt: int, events: list[Any]) -> list[dict[str, Any]]:
        """The chunks that a batch of one prompt's tokens becomes, one for each choice in it."""
        texts: dict[int, str] = {}
        logged = {i: len(c.log.tokens) for i, c in enumerate(self.choices) if c.log is not None}
        ended = set()
        for event in events:
            index = prompt * self.n + event.choice
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue
            texts[index] = texts.get(index, "") + choice.push(event)
            if choice.finish_reason is not None:
                ended.add(index)
        chunks = []
        for index, text in texts.items():
            choice = self.choices[index]
            new = choice.log.since(logged[index]) if choice.log is not None else None
            if text or index in ended or (new is not None and new["tokens"]):
                reason = choice.finish_reason if index in ended else None
                chunks.append(self._chunk(head, index, text, new, reason))
        return chunks

    @staticmethod
    def _chunk(
        head: dict[str, Any], index: int, text: str, logprobs: Any, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    async def whole(self, handles: list[Handle], scores: Handle | None) -> dict[str, Any]:
        """The reply as one object."""
        try:
            if scores is not None:
                (scored,) = await scores.next()
                self._take_scores(scored)
            async for _ in self.chunks(handles):
                pass
        finally:
            for handle in [*handles, *([scores] if scores else [])]:
                handle.cancel()
        choices = [
            {
                "index": i,
                "text": choice.text,
                "logprobs": choice.log.since(0) if choice.log is not None else None,
                "finish_reason": choice.finish_reason or "length",
            }
            for i, choice in enumerate(self.choices)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage()}

    def _take_scores(self, scored: list[Scored]) -> None:
        """Puts the prompt's log-probabilities in front, and the next token where that is all."""
        tokenizer = self.model.tokenizer
        for index, choice in enumerate(self.choices):
            result, prompt = scored[index // self.n], self.prompts[index // self.n]
            assert choice.log is not None
            decoder, offset = tokenizer.decoder(skip_special=True), 0
            for i in range(self.hidden_bos, len(prompt)):
                choice.log.add(prompt[i], result.logprobs[i], result.top[i], offset)
                offset += len(decoder.push(prompt[i]))
            if self.only_scores and self.asked == 1:
                best = result.top[len(prompt)] or []
                token, logprob = best[0]
                choice.log.add(token, logprob, best, len(choice.text))
                choice.text += tokenizer.decode([token], skip_special=True)
                choice.tokens = 1
                ends = token in (tokenizer.eos_id, tokenizer.bos_id)
                choice.finish_reason = "stop" if ends else "length"

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.prompts))
        told = [job.cached for job in self.jobs if job.cached is not None]
        generated = sum(choice.tokens for choice in self.choices)
        return usage_of(prompt, generated, sum(told) if told else None)


def _prompts(request: CompletionRequest, model: ServedModel) -> tuple[list[list[int]], int]:
    """(the prompts as ids, how many ids in front of each are not shown: the bos of a text)."""
    given = request.prompt
    tokenizer = model.tokenizer
    if isinstance(given, str):
        given = [given]
    if given and isinstance(given[0], int):
        given = [given]  # type: ignore[list-item]
    if isinstance(given[0], str):
        texts: list[str] = given  # type: ignore[assignment]
        return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts], 1
    prompts: list[list[int]] = given  # type: ignore[assignment]
    limit = tokenizer.vocab_size
    if any(token >= limit for prompt in prompts for token in prompt):
        raise bad_value("prompt", f"A token id is not below {limit}.")
    return prompts, 0
