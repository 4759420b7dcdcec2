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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fledge.engine import Engine, SamplingParams
from fledge.engine.engine import Completion
from fledge.engine.runner import Runner
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals import tries
from fledge.model.attention import attend_in_blocks

BATCH_NODES = 4096  # padded tokens of one forward pass
BATCH_ROWS = 1024
HEAD_ROWS = 2048  # positions whose logits exist at one time
CACHED_ROWS, CACHED_LOGITS = 128, 2**20  # the same on a CPU: at least, and what its cache holds


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
    runner = _runner(engine)
    for batch in tries.batches(rows, max_rows=size, max_nodes=BATCH_NODES):
        for member, likelihood in _score(runner, batch, requests):
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
    dry_multiplier: float = 0.0,
) -> list[list[Completion]]:
    """`samples` replies to every prompt, greedy unless a temperature is given."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        n=samples,
        dry_multiplier=dry_multiplier,
    )
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
    """How tokens in rows of tries see each other: an `AttentionView` without a cache.

    A node stands at the position of its depth and sees its ancestors and itself.
    """

    def __init__(self, batch: list[tries.Trie], width: int, device: torch.device) -> None:
        places = np.zeros((len(batch), width), np.int64)
        parents = np.zeros_like(places)
        for i, row in enumerate(batch):
            places[i, : len(row)] = row.depth
            for path in row.paths:
                parents[i, path[1:]] = path[:-1]
        seen = np.stack([row.mask(width) for row in batch])
        self.positions = torch.from_numpy(places).to(device)  # [B, N]
        self._parents = torch.from_numpy(parents).to(device)
        self.mask = torch.from_numpy(seen).to(device)[:, None]  # [B, 1, N, N]: who sees whom

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
        """Attention output [B, N, H, K] of q [B, H, N, K] over k, v [B, H_kv, N, K]."""
        seen = self.mask
        if window is not None:
            depth = self.positions[:, None]
            seen = seen & (depth[..., :, None] - depth[..., None, :] < window)
        if q.device.type == "cpu":  # a node's parents stand before it
            return attend_in_blocks(q, k, v, seen, scale=scale)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y.transpose(1, 2)

    def previous_ids(self, ids: Tensor) -> Tensor:
        """The token before each of ids [B, N]; 0 where there is none."""
        return torch.where(self.positions > 0, ids.gather(1, self._parents), 0)


def _runner(engine: Engine) -> Runner:
    """The engine's passes: the fastest that its weights have here; of another maker's model, and
    where the engine has rounded the weights, the module's own."""
    if getattr(engine, "weights", None) == "float32":
        return engine.runner
    return Runner(engine.model, deterministic=False)


@torch.inference_mode()
def _score(
    runner: Runner, batch: list[tries.Trie], requests: Sequence[Request]
) -> Iterator[tuple[int, Likelihood]]:
    """(member, likelihood) of every sequence in a batch of rows."""
    device = runner.model.cos.device
    width = max(len(row) for row in batch)
    ids = np.zeros((len(batch), width), np.int64)
    for i, row in enumerate(batch):
        ids[i, : len(row)] = row.ids
    view = None if batch[0].is_chain else TreeView(batch, width, device)
    places: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    members: list[int] = []
    for i, row in enumerate(batch):
        for member, path in zip(row.members, row.paths, strict=True):
            request = requests[member]
            places.append(i * width + path[request.start - 1 :])
            targets.append(np.asarray(request.ids[request.start :]))
            members.append(member)
    # choices share their last place
    unique, which = np.unique(np.concatenate(places), return_inverse=True)
    asked = torch.from_numpy(unique).to(device)
    states = runner.states_at(torch.from_numpy(ids).to(device), view, asked)  # [U, D]
    logprobs, greedy = _targets(runner, states, which, np.concatenate(targets))
    at = 0
    for member, part in zip(members, places, strict=True):
        end = at + len(part)
        yield member, Likelihood(logprobs[at:end].tolist(), greedy[at:end].tolist())
        at = end


def _targets(
    runner: Runner, states: Tensor, which: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each target after the state that `which` names, and whether it is the
    likeliest token there."""
    device = states.device
    order = np.argsort(which, kind="stable")
    which, wanted = which[order], targets[order]
    logprobs = np.empty(len(which), np.float64)
    greedy = np.empty(len(which), bool)
    start, size = 0, CACHED_ROWS if device.type == "cpu" else HEAD_ROWS
    while start < len(states):
        rows = states[start : start + size]
        logits = runner.head(rows).float()  # [rows, V]
        best = logits.argmax(dim=-1)
        low, high = np.searchsorted(which, [start, start + len(rows)])
        at = torch.from_numpy(which[low:high] - start).to(device)
        token = torch.from_numpy(wanted[low:high]).to(device)
        # log_softmax is one kernel; logsumexp is several passes over memory, 8 times as slow
        found = logits.log_softmax(dim=-1)[at, token]
        logprobs[order[low:high]] = found.double().cpu().numpy()
        greedy[order[low:high]] = (best[at] == token).cpu().numpy()
        start += len(rows)
        if device.type == "cpu":
            size = max(CACHED_ROWS, CACHED_LOGITS // logits.shape[1])
    return logprobs, greedy
