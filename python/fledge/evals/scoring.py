"""The two primitives of evaluation: how likely given tokens are, and what the model says.

`loglikelihood` scores continuations in batches of like length in which shared beginnings (few-shot
text, the question before its choices) are read once; `generate` is the engine's greedy reply. Every
task, CORE and the lm-eval adapter are thin layers on these. The log-softmax is float32 and only
positions that are scored meet the output head. `loglikelihood_one_by_one` is the slow readable
twin. Called by `core_exam`, `examine` and `harness`; it knows no task and grades nothing.

Sums of products depend on the shape of a batch in their last bits, so results agree to 1e-5 under
any batching; with `deterministic` every row is a forward pass of its own and they agree bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fledge.engine import Engine, SamplingParams
from fledge.engine.engine import Completion
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals import tries
from fledge.model import Transformer

BATCH_NODES = 4096  # padded tokens of one forward pass
BATCH_ROWS = 1024
HEAD_ROWS = 2048  # positions whose logits exist at one time


@dataclass(frozen=True)
class Request:
    """Token ids, scored from `start` (at least 1) to the end, each given all before it."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Likelihood:
    """Of every scored token: its natural-log probability, and whether it is the likeliest one."""

    logprobs: list[float]
    greedy: list[bool]

    @property
    def total(self) -> float:
        return float(np.sum(np.asarray(self.logprobs, np.float64)))

    @property
    def mean(self) -> float:
        return self.total / len(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        return all(self.greedy)


def loglikelihood(
    engine: Engine,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    deterministic: bool = False,
    share_prefixes: bool = True,
    advance: Callable[[int], None] | None = None,
) -> list[Likelihood]:
    """The likelihoods of the requests, in their order.

    `batch_size` bounds the rows of a forward pass (None: as many as BATCH_NODES tokens hold);
    `advance` is called with the number of requests done. Raises UserError for a request that is
    empty, scores nothing or is longer than the context: cutting is the caller's rule.
    """
    _check(engine, requests)
    sequences = [request.ids[:-1] for request in requests]  # the last token is only a target
    rows = tries.fold(sequences) if share_prefixes else tries.chains(sequences)
    found: list[Likelihood | None] = [None] * len(requests)
    size = 1 if deterministic else batch_size or BATCH_ROWS
    for batch in tries.batches(rows, max_rows=size, max_nodes=BATCH_NODES):
        for member, likelihood in _score(engine.model, batch, requests):
            found[member] = likelihood
        if advance is not None:
            advance(sum(len(row.members) for row in batch))
    return [likelihood for likelihood in found if likelihood is not None]


def loglikelihood_one_by_one(engine: Engine, requests: Sequence[Request]) -> list[Likelihood]:
    """The readable twin of `loglikelihood`: one request per forward pass, all logits."""
    _check(engine, requests)
    found = []
    with torch.inference_mode():
        for request in requests:
            ids = torch.tensor([request.ids], device=engine.model.cos.device)
            logprobs = engine.model(ids)[0].float().log_softmax(dim=-1)
            places = range(request.start - 1, len(request.ids) - 1)
            found.append(
                Likelihood(
                    [float(logprobs[p, request.ids[p + 1]]) for p in places],
                    [int(logprobs[p].argmax()) == request.ids[p + 1] for p in places],
                )
            )
    return found


def generate(
    engine: Engine,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    tools: Tools | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[Completion]]:
    """`samples` replies to every prompt, greedy unless a temperature is given."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, n=samples)
    return engine.generate(prompts, params, tools)


def _check(engine: Engine, requests: Sequence[Request]) -> None:
    limit = engine.model.config.max_position_embeddings
    for request in requests:
        if not 1 <= request.start < len(request.ids):
            raise UserError(
                "a text has nothing to score",
                f"scoring begins at token {request.start} of {len(request.ids)}",
                "give at least one token of context and one to score",
            )
        # the last token is never read, so one more than the context fits
        if len(request.ids) > limit + 1:
            raise UserError(
                f"a text to score has {len(request.ids)} tokens",
                f"the model reads at most {limit}",
                "shorten it, or score a model with a longer context",
            )


class TreeView:
    """Stands where a cache's view would: a row is a trie, and a node sees its ancestors alone.

    positions [B, N]; `seen` [B, N, N] is True where a node (second) sees another (third). Nothing
    is cached. Attention either hands all of it over (`attend`) or writes to and reads from a cache
    (`write`, `read`, `mask`), which here is what it has just written.
    """

    fresh = False
    rows = None

    def __init__(self, positions: Tensor, seen: Tensor) -> None:
        self.positions = positions
        self.length = positions.shape[1]
        self.cache = self
        self._seen = seen[:, None]

    def mask(self) -> Tensor:
        """[B, 1, N, N] which nodes see which."""
        return self._seen

    def write(
        self, layer: int, rows: Tensor | None, positions: Tensor, k: Tensor, v: Tensor
    ) -> None:
        self._last = k, v

    def read(self, layer: int, rows: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        return self._last

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The attention output [B, N, H, K] of q [B, H, N, K] and k, v [B, H_kv, N, K]."""
        seen = self._seen
        if window is not None:
            apart = self.positions[:, None, :, None] - self.positions[:, None, None, :]
            seen = seen & (apart < window)
        grouped = q.shape[1] != k.shape[1]
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
        return y.transpose(1, 2)


@torch.inference_mode()
def _score(
    model: Transformer, batch: list[tries.Trie], requests: Sequence[Request]
) -> Iterator[tuple[int, Likelihood]]:
    """(member, likelihood) of every sequence in a batch of rows."""
    device = model.cos.device
    width = max(len(row) for row in batch)
    ids = np.zeros((len(batch), width), np.int64)
    for i, row in enumerate(batch):
        ids[i, : len(row)] = row.ids
    view: Any = None
    if not batch[0].is_chain:
        positions = np.zeros_like(ids)
        for i, row in enumerate(batch):
            positions[i, : len(row)] = row.depth
        seen = np.stack([row.mask(width) for row in batch])
        view = TreeView(torch.from_numpy(positions).to(device), torch.from_numpy(seen).to(device))
    hidden = model.hidden(torch.from_numpy(ids).to(device), view).flatten(0, 1)  # [B * N, D]
    places: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    members: list[int] = []
    for i, row in enumerate(batch):
        for member, path in zip(row.members, row.paths, strict=True):
            request = requests[member]
            places.append(i * width + path[request.start - 1 :])
            targets.append(np.asarray(request.ids[request.start :]))
            members.append(member)
    logprobs, greedy = _targets(model, hidden, np.concatenate(places), np.concatenate(targets))
    at = 0
    for member, part in zip(members, places, strict=True):
        end = at + len(part)
        yield member, Likelihood(logprobs[at:end].tolist(), greedy[at:end].tolist())
        at = end


def _targets(
    model: Transformer, hidden: Tensor, places: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each target after its place, and whether it is the likeliest token."""
    device = hidden.device
    unique, which = np.unique(places, return_inverse=True)  # choices share their last place
    order = np.argsort(which, kind="stable")
    which, wanted = which[order], targets[order]
    logprobs = np.empty(len(places), np.float64)
    greedy = np.empty(len(places), bool)
    for start in range(0, len(unique), HEAD_ROWS):
        rows = torch.from_numpy(unique[start : start + HEAD_ROWS]).to(device)
        logits = model.lm_head(hidden[rows]).float()  # [rows, V]
        norm, best = logits.logsumexp(dim=-1), logits.argmax(dim=-1)
        low, high = np.searchsorted(which, [start, start + len(rows)])
        at = torch.from_numpy(which[low:high] - start).to(device)
        token = torch.from_numpy(wanted[low:high]).to(device)
        logprobs[order[low:high]] = (logits[at, token] - norm[at]).double().cpu().numpy()
        greedy[order[low:high]] = (best[at] == token).cpu().numpy()
    return logprobs, greedy
