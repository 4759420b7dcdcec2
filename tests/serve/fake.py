"""An engine without a model: it does what the last user message says, token by token.

    say TEXT          answers TEXT
    count N           answers "1 2 3 ... N"
    python CODE       runs CODE through the request's tools, then says "done"
    call NAME {...}   writes the call of a function
    bytes HEX         answers these bytes, one token each
    crash             raises in the middle of the answer
    (anything else)   is said back

The same protocol as `fledge.engine.Engine`, all of it deterministic. `gate` holds back every step
while it is cleared, so that tests decide when tokens come; nothing here sleeps unless told a delay.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge.engine.requests import Request, TokenEvent
from fledge.serve.context import Context
from fledge.serve.keys import Keys
from fledge.serve.metrics import Metrics
from fledge.serve.models import Models, ServedModel
from fledge.serve.scoring import Scored
from fledge.serve.server import LiveServer
from fledge.serve.settings import Settings
from fledge.serve.worker import Pool
from fledge.tokenizer import Tokenizer


class Crash(Exception):
    """What the engine raises when it is told to."""


@dataclass
class Row:
    """One choice under way: tokens still to come; a callable among them is run for more tokens."""

    request_id: int
    choice: int
    coming: deque[Any]
    left: int


@dataclass
class FakeEngine:
    """See the module."""

    tokenizer: Tokenizer
    slots: int = 8
    delay: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    rows: list[Row] = field(default_factory=list)
    requests: dict[int, Request] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    next_id: int = 0
    most: int = 0

    @property
    def in_flight(self) -> int:
        return len({row.request_id for row in self.rows})

    def add(self, request: Request) -> int:
        self.next_id += 1
        self.requests[self.next_id] = request
        for choice in range(request.params.n):
            script = deque(self._script(request))
            self.rows.append(Row(self.next_id, choice, script, request.params.max_tokens))
        self.most = max(self.most, len(self.rows))
        return self.next_id

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        self.rows = [row for row in self.rows if row.request_id != request_id]

    def cached_tokens(self, request_id: int) -> int:
        """Claims one token of every prompt."""
        return 1

    def step(self) -> list[TokenEvent]:
        self.gate.wait(10)
        if self.delay:
            time.sleep(self.delay)
        events = []
        for row in self.rows:
            item, sampled = row.coming.popleft(), True
            if callable(item):
                item()
                continue
            if isinstance(item, tuple):
                item, sampled = item
            row.left -= sampled
            end = item == self.tokenizer.eos_id
            reason = "stop" if end else "length" if row.left == 0 else None
            top = [(item, -0.25), ((item + 1) % 256, -1.5), ((item + 2) % 256, -3.0)]
            most = self.requests[row.request_id].params.top_logprobs
            events.append(
                TokenEvent(row.request_id, row.choice, item, -0.25, top[:most], sampled, reason)
            )
        ended = {(e.request_id, e.choice) for e in events if e.finish_reason}
        self.rows = [row for row in self.rows if (row.request_id, row.choice) not in ended]
        return events

    def score_top(self, rows: list[list[int]], top: int) -> list[Scored]:
        """Every token has log-probability -1; the next one is always "!"."""
        best = [(self.tokenizer.encode("!")[0], -0.5)]
        return [
            Scored([None, *[-1.0] * (len(row) - 1)], [None, *[best] * len(row)]) for row in rows
        ]

    def _script(self, request: Request) -> list[Any]:
        tok, special = self.tokenizer, self.tokenizer.special_tokens
        text = self._asked(request.prompt)
        word, _, rest = text.partition(" ")
        end = [tok.eos_id]
        if word == "say":
            return tok.encode(rest) + end
        if word == "count":
            return tok.encode(" ".join(str(i + 1) for i in range(int(rest)))) + end
        if word == "bytes":
            return list(bytes.fromhex(rest)) + end
        if word == "call":
            name, _, arguments = rest.partition(" ")
            return [special["<|python_start|>"], *tok.encode(f"{name}({arguments})"),
                    special["<|python_end|>"], *tok.encode("never seen"), *end]  # fmt: skip
        if word == "python":
            return self._run_script(request, rest) + end
        if word == "crash":
            return [*tok.encode("all is well"), self._crash]
        return tok.encode(f"You said: {text}") + end

    def _run_script(self, request: Request, code: str) -> list[Any]:
        tok, special = self.tokenizer, self.tokenizer.special_tokens
        ids = [*tok.encode("so: "), special["<|python_start|>"], *tok.encode(code),
               special["<|python_end|>"]]  # fmt: skip
        if request.tools is not None:
            result = request.tools.run(code, request.tools.new_state())
            ids += [
                (token, False)
                for token in (special["<|output_start|>"], *tok.encode(result.text),
                              special["<|output_end|>"])
            ]  # fmt: skip
        return ids + tok.encode(" done")

    def _asked(self, prompt: list[int]) -> str:
        special = self.tokenizer.special_tokens
        start, end = special["<|user_start|>"], special["<|user_end|>"]
        if start in prompt:
            first = len(prompt) - prompt[::-1].index(start)
            prompt = prompt[first : prompt.index(end, first)]
        return self.tokenizer.decode(prompt, skip_special=True)

    @staticmethod
    def _crash() -> None:
        raise Crash("told to")


@dataclass
class Fake:
    """A live server around fake engines, and what tests need to look at."""

    server: LiveServer
    engines: list[FakeEngine]
    pool: Pool
    gate: threading.Event

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def engine(self) -> FakeEngine:
        """The engine of now; a crash puts a new one in its place."""
        return self.engines[-1]


def fake_server(
    tok: Tokenizer,
    settings: Settings | None = None,
    *,
    keys: Keys | None = None,
    tools: Any = None,
    context: int = 4096,
    slots: int = 8,
    delay: float = 0.0,
    replicas: int = 1,
    build: Callable[[FakeEngine], Any] | None = None,
) -> Fake:
    """A server (not yet entered) of two names, "fake" and "other", on one tokenizer."""
    settings = settings or Settings()
    metrics = Metrics()
    gate = threading.Event()
    gate.set()
    engines: list[FakeEngine] = []

    def make() -> Any:
        engine = FakeEngine(tok, slots=slots, delay=delay, gate=gate)
        engines.append(engine)
        return build(engine) if build else engine

    def make_other() -> Any:
        return FakeEngine(tok, slots=slots, gate=gate)

    servers: list[Any] = []

    def fatal(error: BaseException) -> None:
        servers[0].server.give_up(error)

    def pool_of(name: str, builders: list[Callable[[], Any]]) -> Pool:
        return Pool(name, builders, limits=settings.limits, metrics=metrics, on_fatal=fatal)

    pool = pool_of("fake", [make] * replicas)
    models = Models(
        [
            ServedModel("fake", tok, context, pool, created=1),
            ServedModel("other", tok, context, pool_of("other", [make_other]), created=1),
        ]
    )
    server = LiveServer(Context(models, settings, metrics, tools), keys)
    servers.append(server)
    return Fake(server, engines, pool, gate)


def open_files() -> int:
    """Descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))
