"""Continuous batching: which sequence sits in which cache slot, and one step for all of them.

`Scheduler.run` keeps up to `slots` sequences in flight: waiting prompts are prefilled in groups of
like length as slots fall free; every decode step feeds each row its next token, which is either
sampled or forced (a tool's output). A row that closes a python block pauses for the tool's result
and then reads it as forced tokens. Used by `engine.Engine` only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fledge.engine.sampling import SamplingParams, sample, uniform
from fledge.model import Transformer
from fledge.model.attention import CacheView
from fledge.model.kv_cache import KVCache

PREFILL_TOKENS = 8192  # padded prompt tokens in one prefill pass: bounds its memory


@dataclass
class Sequence:
    """One sample of one prompt, waiting, running or finished."""

    prompt: list[int]
    index: int  # which prompt
    choice: int  # which sample of that prompt
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    finish_reason: str | None = None

    def room(self, limit: int) -> int:
        return limit - len(self.prompt) - len(self.ids)


def pad_right(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids [rows, longest], zeros after each row's end, and the place of each row's last token."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row in rows])


ToolHook = Callable[[Sequence, int], list[int]]  # (row, token just added) -> tokens to force


class Scheduler:
    """Runs many sequences through one model; `on_token` sees every new token of every row."""

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        *,
        slots: int,
        stop_ids: frozenset[int],
        tool_hook: ToolHook | None,
    ) -> None:
        self.model = model
        self.params = params
        self.slots = slots
        self.stop_ids = stop_ids
        self.tool_hook = tool_hook
        self.max_len = model.config.max_position_embeddings

    @torch.inference_mode()
    def run(self, waiting: list[Sequence]) -> Iterator[Sequence]:
        """Yields a row each time one of its tokens was added; rows end with a finish_reason."""
        # longest first: rows of like length share a prefill without much padding
        queue = deque(sorted(waiting, key=lambda s: -len(s.prompt)))
        longest = max(len(s.prompt) for s in waiting)
        # room for tool output beyond max_tokens is bounded by the context
        length = min(self.max_len, longest + 2 * self.params.max_tokens)
        cache = self.model.new_cache(min(self.slots, len(waiting)), length)
        active: list[Sequence | None] = [None] * cache.slots
        while queue or any(active):
            free = [slot for slot, row in enumerate(active) if row is None]
            if queue and (len(free) * 4 >= len(active) or not any(active)):
                yield from self._admit(cache, active, free, queue, length)
                continue
            if not queue and len(free) * 2 > len(active):
                kept = [slot for slot, row in enumerate(active) if row is not None]
                cache.keep(torch.tensor(kept))
                active = [active[slot] for slot in kept]
            yield from self._decode(cache, active, length)

    def _admit(
        self,
        cache: KVCache,
        active: list[Sequence | None],
        free: list[int],
        queue: deque[Sequence],
        length: int,
    ) -> Iterator[Sequence]:
        """Prefills a group of waiting prompts into free slots and adds their first tokens.

        Samples of one prompt stand side by side in the queue: the prompt is read once and its keys
        and values are copied into the slots of the others.
        """
        group: list[tuple[int, Sequence]] = []
        leaders: list[int] = []  # places in `group` whose prompt is read
        of_leader: list[int] = []  # for each place, which leader has its prompt
        width = len(queue[0].prompt)
        while queue and len(group) < len(free):
            shared = bool(group) and group[-1][1].index == queue[0].index
            if not shared and leaders and (len(leaders) + 1) * width > PREFILL_TOKENS:
                break
            if not shared:
                leaders.append(len(group))
            of_leader.append(len(leaders) - 1)
            group.append((free[len(group)], queue.popleft()))
        ids, last = pad_right([group[place][1].prompt for place in leaders])
        rows = torch.tensor([group[place][0] for place in leaders])
        positions = torch.arange(width).expand(len(leaders), width)
        device = self.model.cos.device
        view = CacheView(cache, rows.to(device), positions.to(device), width, fresh=True)
        hidden = self.model.hidden(ids.to(device), view)
        logits = self.model.lm_head(hidden[torch.arange(len(leaders)), last])
        for place, (slot, row) in enumerate(group):
            leader = leaders[of_leader[place]]
            if place != leader:
                cache.copy_slot(group[leader][0], slot, len(row.prompt))
            active[slot] = row
        yield from self._add([row for _, row in group], logits[of_leader], length)
        self._release(active)

    def _decode(
        self, cache: KVCache, active: list[Sequence | None], length: int
    ) -> Iterator[Sequence]:
        """One step of every slot; free slots compute along and are ignored."""
        device = self.model.cos.device
        ids = torch.zeros(len(active), 1, dtype=torch.long)
        positions = torch.zeros(len(active), 1, dtype=torch.long)
        for slot, row in enumerate(active):
            if row is not None:
                ids[slot, 0] = row.ids[-1]
                positions[slot, 0] = len(row.prompt) + len(row.ids) - 1
        seen = int(positions.max()) + 1
        view = CacheView(cache, None, positions.to(device), seen, fresh=False)
        hidden = self.model.hidden(ids.to(device), view)[:, 0]
        live = [slot for slot, row in enumerate(active) if row is not None]
        logits = self.model.lm_head(hidden if len(live) == len(active) else hidden[live])
        yield from self._add([active[slot] for slot in live], logits, length)  # type: ignore[misc]
        self._release(active)

    def _add(self, rows: list[Sequence], logits: Tensor, length: int) -> Iterator[Sequence]:
        """Gives every row its next token from its logits [rows, V], forced or sampled."""
        draws = torch.tensor(
            [uniform(self.params.seed, r.choice, len(r.ids)) for r in rows],
            dtype=torch.float64,
        )
        picked = sample(logits, draws.to(logits.device), self.params)
        for i, row in enumerate(rows):
            if row.forced:
                picked[i] = row.forced[0]
        # log-probabilities are of the untempered model, in float32
        logprobs = logits.float().log_softmax(dim=-1).gather(1, picked[:, None])[:, 0]
        for row, token, logprob in zip(rows, picked.tolist(), logprobs.tolist(), strict=True):
            forced = bool(row.forced)
            if forced:
                row.forced.popleft()
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.sampled.append(not forced)
            if not forced and token in self.stop_ids:
                row.finish_reason = "stop"
            elif row.room(length) <= 0 or sum(row.sampled) >= self.params.max_tokens:
                row.finish_reason = "length"
            elif self.tool_hook is not None and not forced:
                row.forced.extend(self.tool_hook(row, token))
            yield row

    @staticmethod
    def _release(active: list[Sequence | None]) -> None:
        for slot, row in enumerate(active):
            if row is not None and row.finish_reason is not None:
                active[slot] = None
