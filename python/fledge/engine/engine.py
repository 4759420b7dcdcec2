"""The inference engine: prompts in, completions with log-probabilities out.

`Engine` serves the terminal chat, evaluation and reinforcement with the same batched code. It holds
the live model, so after an optimizer step the next call already uses the new weights. Prompts and
completions are token ids; text is the caller's business (tools excepted: their code and output are
decoded and encoded here). Never trains, never reads or writes a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fledge.engine.sampling import SamplingParams
from fledge.engine.scheduler import Scheduler, Sequence, ToolHook, pad_right
from fledge.engine.tools import Tools, ToolState
from fledge.errors import UserError
from fledge.model import Transformer
from fledge.tokenizer import Tokenizer

DEFAULT_SLOTS = 128
SCORE_TOKENS = 4096  # padded tokens in one scoring pass


@dataclass(frozen=True)
class Completion:
    """One continuation: ids, their log-probabilities, which were sampled (not forced by a tool)."""

    ids: list[int]
    logprobs: list[float]
    sampled_mask: list[bool]
    finish_reason: str  # "stop" or "length"


class Engine:
    """Batched generation and scoring over one model and one tokenizer."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, slots: int = DEFAULT_SLOTS):
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots
        special = tokenizer.special_tokens
        self.stop_ids = frozenset({special["<|assistant_end|>"], special["<|bos|>"]})

    @classmethod
    def from_folder(cls, folder: str | Path) -> Engine:
        """The engine of a checkpoint folder that holds model and tokenizer."""
        return cls(Transformer.load(folder), Tokenizer.load(folder))

    def weights_changed(self) -> None:
        """To be called after an optimizer step; nothing is cached across calls yet."""

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, tools: Tools | None = None
    ) -> list[list[Completion]]:
        """`params.n` completions of every prompt, in the order of the prompts."""
        rows = [
            Sequence(prompt, index, choice)
            for index, prompt in enumerate(prompts)
            for choice in range(params.n)
        ]
        for _ in self._run(rows, params, tools):
            pass
        done: list[list[Completion]] = [[] for _ in prompts]
        for row in rows:
            assert row.finish_reason is not None
            done[row.index].append(
                Completion(row.ids, row.logprobs, row.sampled, row.finish_reason)
            )
        return done

    def stream(
        self, prompt: list[int], params: SamplingParams, tools: Tools | None = None
    ) -> Iterator[int]:
        """The tokens of one completion as they come, forced ones and the end token included."""
        for row in self._run([Sequence(prompt, 0, 0)], params, tools):
            yield row.ids[-1]

    @torch.inference_mode()
    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Log-probability of every token given those before it; the first of a row gets 0.0."""
        result: list[list[float]] = [[] for _ in rows]
        for group, ids, last in self._batches(rows):
            losses = self.model.token_losses(ids[:, :-1], ids[:, 1:])
            for i, end, row_losses in zip(group, last.tolist(), losses.tolist(), strict=True):
                result[i] = [0.0] + [-x for x in row_losses[:end]]
        return result

    @torch.inference_mode()
    def next_logprobs(self, prompts: list[list[int]], candidates: list[int]) -> list[list[float]]:
        """Log-probabilities of `candidates` as the token right after each prompt."""
        result: list[list[float]] = [[] for _ in prompts]
        for group, ids, last in self._batches(prompts):
            logits = self.model.lm_head(self.model.hidden(ids)[torch.arange(len(group)), last])
            table = logits.float().log_softmax(dim=-1)[:, candidates]
            for i, row in zip(group, table.tolist(), strict=True):
                result[i] = row
        return result

    def _batches(self, rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(indices, padded ids, places of the last tokens) of groups of like length, longest first,
        at most SCORE_TOKENS padded tokens each."""
        self._check(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            count = max(1, SCORE_TOKENS // len(rows[order[0]]))
            group, order = order[:count], order[count:]
            ids, last = pad_right([rows[i] for i in group])
            yield group, ids.to(self.model.cos.device), last

    def _run(
        self, rows: list[Sequence], params: SamplingParams, tools: Tools | None
    ) -> Iterator[Sequence]:
        """The rows, each time one of them has a new token."""
        self._check([row.prompt for row in rows])
        return Scheduler(
            self.model,
            params,
            rows,
            slots=self.slots,
            stop_ids=self.stop_ids,
            tool_hook=None if tools is None else self._tool_hook(tools),
        ).run()

    def _tool_hook(self, tools: Tools) -> ToolHook:
        """Runs a row's python block when it closes; its output comes back as forced tokens."""
        special = self.tokenizer.special_tokens
        start, end = special["<|python_start|>"], special["<|python_end|>"]
        states: dict[tuple[int, int], ToolState] = {}

        def hook(row: Sequence, token: int) -> list[int]:
            if token != end or start not in row.ids:
                return []
            begin = len(row.ids) - 1 - row.ids[::-1].index(start)
            code = self.tokenizer.decode(row.ids[begin + 1 : -1])
            key = (row.index, row.choice)
            if key not in states:
                states[key] = tools.new_state()
            result = tools.run(code, states[key])
            output = self.tokenizer.encode(result.text)
            return [special["<|output_start|>"], *output, special["<|output_end|>"]]

        return hook

    def _check(self, prompts: list[list[int]]) -> None:
        limit = self.model.config.max_position_embeddings
        for prompt in prompts:
            if not prompt:
                raise UserError("a prompt is empty", "there is nothing to continue", "add text")
            if len(prompt) >= limit:
                raise UserError(
                    f"a prompt has {len(prompt)} tokens",
                    f"the model reads at most {limit} tokens, prompt and answer together",
                    "shorten the prompt, or raise model.max_seq_len and train again",
                )
