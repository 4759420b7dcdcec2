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


def pad_right(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """ids [rows, longest], zeros after each row's end, and the place of each row's last token."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row in rows])


ToolHook = Callable[[Sequence, int], list[int]]  # (row, token just added) -> tokens to force


class Scheduler:
    """Runs many sequences through one model; one scheduler serves one call."""

    def __init__(
        self,
        model: Transformer,
        params: SamplingParams,
        waiting: list[Sequence],
        *,
        slots: int,
        stop_ids: frozenset[int],
        tool_hook: ToolHook | None,
    ) -> None:
        self.model = model
        self.params = params
        self.stop_ids = stop_ids
        self.tool_hook = tool_hook
        # longest first: rows of like length share a prefill without much padding
        self.queue = deque(sorted(waiting, key=lambda s: -len(s.prompt)))
        # room for tool output beyond max_tokens is bounded by the context
        longest = max((len(s.prompt) for s in waiting), default=0)
        self.length = min(
            model.config.max_position_embeddings, longest + 2 * self.params.max_tokens
        )
        self.cache = model.new_cache(min(slots, len(waiting)), self.length)
        self.active: list[Sequence | None] = [None] * self.cache.slots

    @torch.inference_mode()
    def run(self) -> Iterator[Sequence]:
        """Yields a row each time one of its tokens was added; rows end with a finish_reason."""
        while self.queue or any(self.active):
            free = [slot for slot, row in enumerate(self.active) if row is None]
            if self.queue and (len(free) * 4 >= len(self.active) or not any(self.active)):
                yield from self._admit(free)
            else:
                if not self.queue and len(free) * 2 > len(self.active):
                    kept = [slot for slot, row in enumerate(self.active) if row is not None]
                    self.cache.keep(torch.tensor(kept))
                    self.active = [self.active[slot] for slot in kept]
                yield from self._decode()
            self.active = [None if row and row.finish_reason else row for row in self.active]

    def _admit(self, free: list[int]) -> Iterator[Sequence]:
        """Prefills a group of waiting prompts into free slots and adds their first tokens.

        Samples of one prompt stand side by side in the queue: the prompt is read once and its keys
        and values are copied into the slots of the others.
        """
        group: list[tuple[int, Sequence]] = []
        leaders: list[int] = []  # places in `group` whose prompt is read
        of_leader: list[int] = []  # for each place, which leader has its prompt
        width = len(self.queue[0].prompt)
        while self.queue and len(group) < len(free):
            shared = bool(group) and group[-1][1].index == self.queue[0].index
            if not shared and leaders and (len(leaders) + 1) * width > PREFILL_TOKENS:
                break
            if not shared:
                leaders.append(len(group))
            of_leader.append(len(leaders) - 1)
            group.append((free[len(group)], self.queue.popleft()))
        ids, last = pad_right([group[place][1].prompt for place in leaders])
        rows = torch.tensor([group[place][0] for place in leaders])
        positions = torch.arange(width).expand(len(leaders), width)
        device = self.model.cos.device
        view = CacheView(self.cache, rows.to(device), positions.to(device), width, fresh=True)
        hidden = self.model.hidden(ids.to(device), view)
        logits = self.model.lm_head(hidden[torch.arange(len(leaders)), last])
        for place, (slot, row) in enumerate(group):
            leader = leaders[of_leader[place]]
            if place != leader:
                self.cache.copy_slot(group[leader][0], slot, len(row.prompt))
            self.active[slot] = row
        yield from self._add([row for _, row in group], logits[of_leader])

    def _decode(self) -> Iterator[Sequence]:
        """One step of every slot; free slots compute along and are ignored."""
        device, slots = self.model.cos.device, len(self.active)
        ids = torch.zeros(slots, 1, dtype=torch.long)
        positions = torch.zeros(slots, 1, dtype=torch.long)
        live = {slot: row for slot, row in enumerate(self.active) if row is not None}
        for slot, row in live.items():
            ids[slot, 0] = row.ids[-1]
            positions[slot, 0] = len(row.prompt) + len(row.ids) - 1
        seen = int(positions.max()) + 1
        view = CacheView(self.cache, None, positions.to(device), seen, fresh=False)
        hidden = self.model.hidden(ids.to(device), view)[:, 0]
        logits = self.model.lm_head(hidden if len(live) == slots else hidden[[*live]])
        yield from self._add([*live.values()], logits)

    def _add(self, rows: list[Sequence], logits: Tensor) -> Iterator[Sequence]:
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
            elif (
                len(row.prompt) + len(row.ids) >= self.length
                or sum(row.sampled) >= self.params.max_tokens
            ):
                row.finish_reason = "length"
            elif self.tool_hook is not None and not forced:
                row.forced.extend(self.tool_hook(row, token))
            yield row
