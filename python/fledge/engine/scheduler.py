"""Continuous batching: which row reads which tokens in the next step, and what comes of it.

Every row is a sequence (prompt and answer) of which the first `cached` tokens have been read. A
step collects finished tools, admits waiting requests into free slots, reads one chunk of unread
prompts (`prefill`), and then one token of every row that has just one to read (`decode`). A row
that has read its last token gets the next one: sampled, or forced by a tool that ran meanwhile in
a thread pool. Used by `engine.Engine` only; one scheduler lives as long as its engine.
"""

from __future__ import annotations

import concurrent.futures
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.engine.native import Draws
from fledge.engine.pool import MIN_SHARE, SlotPool
from fledge.engine.requests import Request, SamplingParams, TokenEvent
from fledge.engine.runner import Runner
from fledge.engine.sampling import adjust, sample, uniform
from fledge.engine.tool_runner import ToolRunner
from fledge.engine.tools import ToolState
from fledge.model.kv_cache import Piece, Segment

REMEMBERED = 4096  # requests of which it is known how much of the prompt was reused
DETERMINISTIC_SHARE = 512  # tokens
TOOL_WAIT_SECONDS = 0.01  # a step with nothing to compute waits this long for a tool


@dataclass(eq=False)
class Row:
    """One choice of one request, from its admission on."""

    group: Group
    choice: int
    stop_ids: frozenset[int]
    slot: int = -1
    segments: tuple[Segment, ...] = ()
    cached: int = 0
    ids: list[int] = field(default_factory=list)
    sampled_count: int = 0
    finish_reason: str | None = None
    tool_state: ToolState | None = None
    tool: Future[list[int]] | None = None  # a tool that is running
    unread: list[int] = field(default_factory=list)  # tokens of the sequence not yet in the cache

    @property
    def request_id(self) -> int:
        return self.group.request_id

    @property
    def request(self) -> Request:
        return self.group.request

    @property
    def prompt(self) -> list[int]:
        return self.group.request.prompt

    @property
    def params(self) -> SamplingParams:
        return self.group.request.params

    @property
    def needs_table(self) -> bool:
        """Whether the log-probability of the drawn token alone is not enough."""
        p = self.params
        tempered = p.logprobs_at_temperature and p.temperature not in (0.0, 1.0)
        return bool(p.top_logprobs) or tempered

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)


@dataclass(eq=False)
class Group:
    """The choices of one request: the first reads the prompt, the others begin behind it."""

    request_id: int
    request: Request
    waiting: deque[int]  # choices that have no slot yet
    leader: Row | None = None
    segments: tuple[Segment, ...] = ()
    logits: Tensor | None = None  # [V] after the prompt, kept until all choices have begun
    holds: bool = False


class Scheduler:
    """Rows in flight, waiting requests, and the step."""

    def __init__(
        self,
        runner: Runner,
        *,
        slots: int,
        context: int,
        stop_ids: frozenset[int],
        tools: ToolRunner,
        chunk_tokens: int,
        deterministic: bool,
        prefix_reuse: bool,
        special: frozenset[int] = frozenset(),
        poison: bool = False,
    ) -> None:
        self.runner = runner
        self.pool = SlotPool(slots, reuse=prefix_reuse and not deterministic)
        self.context = context
        self.stop_ids = stop_ids
        self.special = special
        self.tools = tools
        self.chunk_tokens = chunk_tokens
        self.deterministic = deterministic
        self.poison = poison
        # deterministic rows read a shared prompt one by one, so a copy costs less up to here
        self.share_from = DETERMINISTIC_SHARE if deterministic else MIN_SHARE
        self.groups: deque[Group] = deque()
        self.rows: list[Row] = []
        self.cancelled: list[TokenEvent] = []
        self.cached_tokens: OrderedDict[int, int] = OrderedDict()  # of the newest requests
        self._scratch = torch.empty(0)

    @property
    def busy(self) -> bool:
        return bool(self.groups or self.rows or self.cancelled)

    @property
    def requests(self) -> set[int]:
        """The ids of the requests in flight."""
        return {g.request_id for g in self.groups} | {r.request_id for r in self.rows}

    def add(self, request_id: int, request: Request) -> None:
        self.groups.append(Group(request_id, request, deque(range(request.params.n))))

    def cancel(self, request_id: int) -> None:
        """Frees the rows of a request now; the next step tells of each of its choices."""
        choices = [r.choice for r in self.rows if r.request_id == request_id]
        for group in [g for g in self.groups if g.request_id == request_id]:
            choices += group.waiting
            group.waiting.clear()
            self._close_group(group)
        for row in [r for r in self.rows if r.request_id == request_id]:
            row.finish_reason = "cancelled"
        self._reap()
        self.cancelled += [
            TokenEvent(request_id, choice, -1, 0.0, [], sampled=False, finish_reason="cancelled")
            for choice in sorted(choices)
        ]

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """One step of everything in flight."""
        events, self.cancelled = self.cancelled, []
        events += self._collect_tools()
        self._reap()
        events += self._admit()
        self._reap()
        decoding = [r for r in self.rows if r.tool is None and len(r.unread) == 1 and r.ids]
        events += self._prefill()
        events += self._decode(decoding)
        self._reap()
        return events

    # -- admission -------------------------------------------------------------------------------

    def _admit(self) -> list[TokenEvent]:
        """Gives free slots to waiting choices, first come, first served."""
        events: list[TokenEvent] = []
        for group in [*self.groups]:
            if group.leader is None and not self._admit_leader(group):
                break
            if group.logits is not None:
                events += self._admit_followers(group)
        return events

    def _admit_leader(self, group: Group) -> bool:
        prompt = group.request.prompt
        grant = self.pool.acquire(prompt)
        if grant is None:
            return False
        row = self._new_row(group, group.waiting.popleft())
        row.slot, row.segments, row.cached = grant.slot, grant.segments, grant.cached
        row.unread = prompt[grant.cached :]
        if self.poison:
            self.runner.cache.poison(grant.slot, start=grant.cached)
        group.leader = row
        self.rows.append(row)
        self.cached_tokens[group.request_id] = grant.cached
        if len(self.cached_tokens) > REMEMBERED:
            self.cached_tokens.popitem(last=False)
        if not group.waiting:
            self.groups.remove(group)
        return True

    def _admit_followers(self, group: Group) -> list[TokenEvent]:
        """Choices that begin behind a prompt that was read for the first choice."""
        assert group.logits is not None
        prompt, begun = group.request.prompt, []
        share = len(prompt) >= self.share_from
        while group.waiting:
            segments = group.segments if share else ()
            grant = self.pool.acquire_behind(segments, prompt)
            if grant is None and group.leader is not None:
                # every slot is held, maybe by prompts that are kept for choices like this one
                grant = self.pool.take_back(group.leader.slot, segments, prompt)
            if grant is None:
                break
            row = self._new_row(group, group.waiting.popleft())
            row.slot, row.segments, row.cached = grant.slot, grant.segments, len(prompt)
            taken_back = any(s.slot == grant.slot for s in group.segments)
            if self.poison:
                self.runner.cache.poison(grant.slot, start=len(prompt) if taken_back else 0)
            if not share and not taken_back:
                for segment in group.segments:
                    self.runner.cache.copy(segment.slot, grant.slot, segment.start, segment.end)
            self.rows.append(row)
            begun.append(row)
        if not begun:
            return []
        logits = group.logits.expand(len(begun), -1)
        if not group.waiting:
            self._close_group(group)
        return self._add(begun, logits)

    def _close_group(self, group: Group) -> None:
        if group.holds:
            self.pool.drop(group.segments)
        group.holds, group.logits = False, None
        if group in self.groups:
            self.groups.remove(group)

    def _new_row(self, group: Group, choice: int) -> Row:
        params = group.request.params
        own = frozenset() if params.ignore_eos else self.stop_ids
        return Row(group, choice, own | frozenset(params.stop_token_ids))

    # -- the two passes --------------------------------------------------------------------------

    def _prefill(self) -> list[TokenEvent]:
        """Reads up to `chunk_tokens` unread tokens of prompts and tool outputs.

        Deterministic: a piece ends where a multiple of the chunk ends in its own sequence, and
        only whole pieces share a pass, so that no other row has a say in how a prompt is cut.
        """
        room, pieces, parts, rows = self.chunk_tokens, [], [], []
        for row in self.rows:
            if row.tool is not None or not row.unread or (len(row.unread) == 1 and row.ids):
                continue
            if self.deterministic:
                count = min(len(row.unread), self.chunk_tokens - row.cached % self.chunk_tokens)
                if count > room:
                    break
            else:
                count = min(len(row.unread), room)
            pieces.append(Piece(row.slot, row.cached, count, row.segments))
            parts.append(row.unread[:count])
            rows.append(row)
            room -= count
            if room == 0:
                break
        if not pieces:
            return []
        total = self.chunk_tokens if self.deterministic else None
        ends = [i for i, row in enumerate(rows) if pieces[i].count == len(row.unread)]
        logits = self.runner.prefill(parts, pieces, ends, total)
        for row, piece in zip(rows, pieces, strict=True):
            self._has_read(row, piece.count)
        done = [rows[i] for i in ends]
        self._share_prompts(done, logits)
        return self._add(done, logits) if done else []

    def _share_prompts(self, rows: list[Row], logits: Tensor) -> None:
        """Prompts that further choices wait for become segments; their logits are kept."""
        for leader in rows:
            group = leader.group
            if group.leader is leader and group.waiting and group.logits is None:
                length = len(leader.prompt)
                group.logits = logits[rows.index(leader)].clone()
                if length >= self.share_from:
                    leader.segments = self.pool.share_own_prefix(leader.slot, length)
                group.segments = self.pool.segments_of(leader.slot, length)
                self.pool.hold(group.segments)
                group.holds = True

    def _decode(self, rows: list[Row]) -> list[TokenEvent]:
        """One token for every row that has one to read."""
        if not rows:
            return []
        tokens = [row.unread[0] for row in rows]
        pieces = [Piece(row.slot, row.cached, 1, row.segments) for row in rows]
        logits = self.runner.decode(tokens, pieces)
        for row in rows:
            self._has_read(row, 1)
        return self._add(rows, logits)

    def _has_read(self, row: Row, count: int) -> None:
        self.pool.slots[row.slot].tokens += row.unread[:count]
        row.cached += count
        del row.unread[:count]

    # -- what comes of it ------------------------------------------------------------------------

    def _add(self, rows: list[Row], logits: Tensor) -> list[TokenEvent]:
        """Gives every row its next token from its logits [rows, V]."""
        keys = [(r.params.seed, r.choice, len(r.ids)) for r in rows]
        draws = torch.tensor([uniform(*key) for key in keys], dtype=torch.float64)
        adjusted = logits
        if not all(r.params.plain for r in rows):
            adjusted = torch.stack(
                [
                    line.float()
                    if r.params.plain
                    else adjust(line, r.params, r.prompt, r.ids, self.special)
                    for r, line in zip(rows, logits, strict=True)
                ]
            )
        picked = sample(adjusted, draws.to(logits.device), [r.params for r in rows])
        picked = picked.tolist()
        logprobs, best = self._all_logprobs(rows, logits, picked)
        events = []
        for i, (row, token, logprob) in enumerate(zip(rows, picked, logprobs, strict=True)):
            row.ids.append(token)
            row.unread.append(token)
            row.sampled_count += 1
            if token in row.stop_ids:
                row.finish_reason = "stop"
            elif row.length >= self.context or row.sampled_count >= row.params.max_tokens:
                row.finish_reason = "length"
            else:
                self._maybe_call_tool(row, token)
            events.append(
                TokenEvent(
                    row.request_id,
                    row.choice,
                    token,
                    logprob if row.params.logprobs else 0.0,
                    best.get(i, []),
                    sampled=True,
                    finish_reason=row.finish_reason,
                )
            )
        return events

    def _all_logprobs(
        self, rows: list[Row], logits: Tensor, picked: list[int]
    ) -> tuple[list[float], dict[int, list[tuple[int, float]]]]:
        """Log-probabilities of the picked tokens, and the best of rows that want them.

        They are of the model itself, in float32. A row that needs a table of all tokens gets one,
        whatever the others need, so that its numbers do not depend on them.
        """
        logprobs, best = [0.0] * len(rows), {}
        direct, tabled = [], []
        draws = Draws.of(logits)
        for i, row in enumerate(rows):
            if row.params.logprobs:
                (tabled if draws is None or row.needs_table else direct).append(i)
        if direct:
            if len(direct) < len(rows):
                draws = Draws(logits[direct])
            assert draws is not None
            for i, value in zip(direct, draws.logprobs([picked[i] for i in direct]), strict=True):
                logprobs[i] = value
        if tabled:
            some = [rows[i] for i in tabled]
            table = self._log_softmax(logits if len(some) == len(rows) else logits[tabled])
            values = self._logprobs(some, table, torch.tensor([picked[i] for i in tabled]))
            for i, value in zip(tabled, values, strict=True):
                logprobs[i] = value
            best = {tabled[i]: found for i, found in self._top_logprobs(some, table).items()}
        return logprobs, best

    def _log_softmax(self, logits: Tensor) -> Tensor:
        """[rows, V], in memory that is kept: fresh pages cost more than the sums."""
        if self._scratch.numel() < logits.numel() or self._scratch.device != logits.device:
            self._scratch = torch.empty(logits.numel(), device=logits.device)
        out = self._scratch[: logits.numel()].view(logits.shape)
        return torch.log_softmax(logits.float(), dim=-1, out=out)

    @staticmethod
    def _logprobs(rows: list[Row], table: Tensor, picked: Tensor) -> list[float]:
        """Of the picked tokens: the model's own, or at the temperature where that was asked for."""
        logprobs = table.gather(1, picked.to(table.device)[:, None])[:, 0]
        for i, row in enumerate(rows):
            if row.params.logprobs_at_temperature and row.params.temperature not in (0.0, 1.0):
                line = (table[i] / row.params.temperature).log_softmax(dim=-1)
                logprobs[i] = line[picked[i]]
        return logprobs.tolist()

    @staticmethod
    def _top_logprobs(rows: list[Row], table: Tensor) -> dict[int, list[tuple[int, float]]]:
        wanted = {i: r.params.top_logprobs for i, r in enumerate(rows) if r.params.top_logprobs}
        found: dict[int, list[tuple[int, float]]] = {}
        for i, count in wanted.items():
            values, ids = table[i].topk(min(count, table.shape[-1]))
            found[i] = [*zip(ids.tolist(), values.tolist(), strict=True)]
        return found

    def _maybe_call_tool(self, row: Row, token: int) -> None:
        tools = row.request.tools
        if tools is None:
            return
        code = self.tools.code(row.ids, token)
        if code is not None:
            row.tool_state = row.tool_state or tools.new_state()
            row.tool = self.tools.submit(tools, code, row.tool_state)

    def _collect_tools(self) -> list[TokenEvent]:
        """Outputs of finished tools become tokens to be read.

        Deterministic: every tool is waited for, so the answers come in the order of the rows and
        the schedule does not depend on how long a tool took.
        """
        waiting = [row for row in self.rows if row.tool is not None]
        if not waiting:
            return []
        if not self.deterministic and len(waiting) == len(self.rows) and not self.groups:
            concurrent.futures.wait(
                [row.tool for row in waiting if row.tool is not None],
                timeout=TOOL_WAIT_SECONDS,
                return_when=concurrent.futures.FIRST_COMPLETED,
            )
        events = []
        for row in waiting:
            assert row.tool is not None
            if self.deterministic or row.tool.done():
                forced, row.tool = row.tool.result(), None
                forced = forced[: self.context - row.length]
                row.ids += forced
                row.unread += forced
                if row.length >= self.context:
                    row.finish_reason = "length"
                for i, token in enumerate(forced):
                    reason = row.finish_reason if i == len(forced) - 1 else None
                    events.append(
                        TokenEvent(
                            row.request_id,
                            row.choice,
                            token,
                            0.0,
                            [],
                            sampled=False,
                            finish_reason=reason,
                        )
                    )
        return events

    def _reap(self) -> None:
        """Frees the slots of rows that are done."""
        if any(row.finish_reason for row in self.rows):
            for row in self.rows:
                if row.finish_reason:
                    self.pool.release(row.slot)
            self.rows = [row for row in self.rows if not row.finish_reason]


def pad_right(rows: Iterable[list[int]]) -> tuple[Tensor, Tensor]:
    """ids [rows, longest], zeros after each row's end, and the place of each row's last token."""
    rows = [*rows]
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row in rows])
