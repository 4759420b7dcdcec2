"""Log-probabilities of a prompt's own tokens: `echo` with `logprobs`, what lm-eval asks for.

One teacher-forced pass per group of prompts instead of decoding. A group is one bounded piece of
work between two steps of the engine, so that scoring never holds up a conversation for long. The
logits of a few hundred positions exist at a time, never prompt times vocabulary. Called by
`serve.completions_api` through `jobs.Job.call`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

PIECE_TOKENS = 2048  # padded tokens of one piece
LOGIT_ROWS = 256  # positions whose logits exist at the same time


@dataclass
class Scored:
    """One prompt. `logprobs[i]` and `top[i]` are of the token at i given those before it; the first
    has neither. `top` has one entry more than the prompt: for the token that would come next."""

    logprobs: list[float | None]
    top: list[list[tuple[int, float]] | None]


def score_prompts(
    engine: Any, prompts: list[list[int]], top: int
) -> Generator[None, None, list[Scored]]:
    """The scores of all prompts, in pieces: every `next` computes one group of like length.

    An engine that has `score_top(rows, top)` does the work itself; tests bring such an engine.
    """
    compute = getattr(engine, "score_top", None) or (lambda rows, k: score_top(engine, rows, k))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    scored: dict[int, Scored] = {}
    while order:
        longest, count = len(prompts[order[-1]]), 1
        while count < len(order) and (count + 1) * longest <= PIECE_TOKENS:
            count += 1
        group, order = order[-count:], order[:-count]
        scored.update(zip(group, compute([prompts[i] for i in group], top), strict=True))
        yield
    return [scored[i] for i in range(len(prompts))]


@torch.inference_mode()
def score_top(engine: Any, rows: list[list[int]], top: int) -> list[Scored]:
    """`Scored` of every row, in one pass of the engine's runner: with the weights that decode.

    The token's own log-probability and the best ones come from one and the same float32
    log-softmax, so that comparing them for equality (lm-eval's is_greedy) is sound.
    """
    runner = engine.runner
    device = next(engine.model.parameters()).device
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    hidden = runner.hidden_of(ids.to(device))  # [rows, width, D]
    results = []
    for i, row in enumerate(rows):
        result = Scored([None], [None])
        targets = [*row[1:], 0]  # the last position has no token yet
        for first in range(0, len(row), LOGIT_ROWS):
            states = hidden[i, first : min(first + LOGIT_ROWS, len(row))]
            table = runner.head(states).float().log_softmax(dim=-1)  # [positions, V]
            wanted = torch.tensor(targets[first : first + len(table)], device=device)
            own = table.gather(1, wanted[:, None])[:, 0].tolist()
            values, best = table.topk(min(max(top, 1), table.shape[-1]), dim=-1)
            result.logprobs += own
            result.top += [
                list(zip(b, v, strict=True))
                for b, v in zip(best.tolist(), values.tolist(), strict=True)
            ]
        result.logprobs.pop()
        results.append(result)
    return results
