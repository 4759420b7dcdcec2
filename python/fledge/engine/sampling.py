"""Choosing the next token of every row of a batch, each row by its own parameters.

A draw depends only on (seed, choice, position) and on the row's own logits: one uniform number per
row comes from a counter-based generator and is put through the inverse of the row's cumulative
distribution, so batch-mates never change a sample (docs/decisions/020). Rows that want the same
kind of truncation share the kernels; which kind is a function of the row's parameters alone.
Where the Rust module is there, it draws (`engine.native.Draws`); what stands here is its readable
twin, and the way of other devices. Used by `engine.scheduler`. Never changes the logits that it is
given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

import torch
from torch import Tensor

from fledge.engine.native import Draws
from fledge.engine.requests import SamplingParams

_MASK = (1 << 64) - 1
BLOCK = 64  # logits that `best` looks at as one
DRY_BASE = 1.75  # its author's (llama.cpp: common/common.h)
DRY_ALLOWED = 3  # tokens said again for nothing; its author has 2, and tokens at which runs end
DRY_LONGEST = 24  # 0.8 x 1.75^21 is 100,000: nothing survives that
FIRST_CANDIDATES = 256  # how many of the best tokens top_p and min_p look at before sorting all


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its three keys.

    SplitMix64's finaliser (Steele, Lea and Flood 2014) over the mixed keys.
    """
    x = (seed * 0x9E3779B97F4A7C15 + choice * 0xBF58476D1CE4E5B9 + position) & _MASK
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) / (1 << 53)


def adjust(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    special: Set[int] = frozenset(),
) -> Tensor:
    """One row's logits [V] after penalties, bias and the allowed-token mask; a new tensor.

    special: ids that are no text. A repetition ends at them, and never costs them anything.
    """
    logits = logits.float().clone()
    vocab, device = len(logits), logits.device
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *generated}), device=device)
        values, factor = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / factor, values * factor)
    if (params.presence_penalty or params.frequency_penalty) and generated:
        counts = Counter(generated)
        ids = torch.tensor(list(counts), device=device)
        number = torch.tensor(list(counts.values()), device=device, dtype=logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * number
    repeats = repeats_to_come(_own_text(generated, special)) if params.dry_multiplier else {}
    if repeats:
        runs = torch.tensor([run - DRY_ALLOWED for run in repeats.values()], device=device)
        logits[[*repeats]] -= params.dry_multiplier * DRY_BASE**runs
    if params.logit_bias:
        pairs = [(t, b) for t, b in params.logit_bias.items() if 0 <= t < vocab]
        if pairs:
            ids = torch.tensor([t for t, _ in pairs], device=device)
            logits[ids] += torch.tensor([b for _, b in pairs], device=device)
    allowed = params.allowed_tokens
    if callable(allowed):
        allowed = allowed([*generated])
    if allowed is not None:
        kept = torch.tensor([t for t in allowed if 0 <= t < vocab], device=device)
        masked = torch.full_like(logits, float("-inf"))
        if len(kept):  # a mask that allows nothing is the mask's mistake: the row ends as it can
            masked[kept] = logits[kept]
            logits = masked
    return logits


def _own_text(generated: Sequence[int], special: Set[int]) -> Sequence[int]:
    """What the row wrote since the last special token: a tool's answer may be said again."""
    start = next((i for i in range(len(generated), 0, -1) if generated[i - 1] in special), 0)
    return generated[start:]


def repeats_to_come(generated: Sequence[int]) -> dict[int, int]:
    """Tokens that would go on with something said before -> how many tokens were said again.

    The longest run that ends the text and stood in it before, followed by that token; runs shorter
    than DRY_ALLOWED are left out, longer ones than DRY_LONGEST count as that.
    """
    found: dict[int, int] = {}
    last = len(generated) - 1
    for i in range(last):
        if generated[i] != generated[last]:
            continue
        run = 1
        while run < DRY_LONGEST and run <= i and generated[i - run] == generated[last - run]:
            run += 1
        if run >= DRY_ALLOWED:
            token = generated[i + 1]
            found[token] = max(run, found.get(token, 0))
    return found


def sample(
    logits: Tensor, uniforms: Tensor, params: SamplingParams | Sequence[SamplingParams]
) -> Tensor:
    """Token ids [rows] from adjusted logits [rows, V] and one uniform number per row [rows].

    `params` is one for all rows, or one per row. Ties of the greedy choice go to the smaller id.
    """
    rows = logits.shape[0]
    table = [params] * rows if isinstance(params, SamplingParams) else list(params)
    kinds: dict[tuple[str, int], list[int]] = {}
    for i, p in enumerate(table):
        kinds.setdefault(_kind(p, logits.shape[-1]), []).append(i)
    if ("nucleus", 0) not in kinds and (draws := Draws.of(logits)) is not None:
        return torch.tensor(draws.tokens(uniforms.tolist(), table))
    if len(kinds) == 1:
        return _sample_kind(logits, uniforms, table, next(iter(kinds)))
    picked = torch.empty(rows, dtype=torch.long, device=logits.device)
    for kind, members in kinds.items():
        index = torch.tensor(members, device=logits.device)
        subset = [table[i] for i in members]
        picked[index] = _sample_kind(logits[index], uniforms[index], subset, kind)
    return picked


def _kind(p: SamplingParams, vocab: int) -> tuple[str, int]:
    """Which kernel a row needs, by its own parameters alone."""
    if p.temperature == 0:
        return "greedy", 0
    if p.top_k is not None and p.top_k < vocab:
        return "best", p.top_k
    if (p.top_p is not None and p.top_p < 1) or p.min_p:
        return "nucleus", 0
    return "all", 0


def _sample_kind(
    logits: Tensor, uniforms: Tensor, params: list[SamplingParams], kind: tuple[str, int]
) -> Tensor:
    name, top_k = kind
    if name != "nucleus" and (draws := Draws.of(logits)) is not None:
        return torch.tensor(draws.tokens(uniforms.tolist(), params))
    if name == "greedy":
        return logits.argmax(dim=-1)
    column = [p.temperature for p in params]
    temperature = torch.tensor(column, device=logits.device)[:, None]
    if name == "best":  # the order does not depend on the temperature
        values, ids = best(logits, top_k)
        shares = _truncate((values.float() / temperature).softmax(dim=-1), params)
        return ids.gather(1, _invert(shares, uniforms)[:, None])[:, 0]
    # a division by 1 changes nothing and costs a pass over all logits
    scaled = logits.float() if set(column) == {1.0} else logits.float() / temperature
    if name == "all":
        return _invert(scaled.softmax(dim=-1), uniforms)
    return _sample_nucleus(scaled, uniforms, params)


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of logits [rows, V] and their ids, from the best down.

    They lie in the `count` blocks with the largest maxima, so only those are searched: one fast
    pass over all logits instead of a slow one.
    """
    rows, vocab = logits.shape
    blocks = vocab // BLOCK
    if vocab % BLOCK or count * 4 > blocks:
        return logits.topk(count, dim=-1)
    lines = logits.view(rows, blocks, BLOCK)
    chosen = lines.amax(dim=-1).topk(count, dim=-1, sorted=False).indices  # [rows, count]
    candidates = lines.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
    values, place = candidates.topk(count, dim=-1)
    ids = chosen.gather(1, place // BLOCK) * BLOCK + place % BLOCK
    return values, ids


def _sample_nucleus(scaled: Tensor, uniforms: Tensor, params: list[SamplingParams]) -> Tensor:
    """top_p and min_p without top_k: the best FIRST_CANDIDATES usually hold the whole nucleus."""
    normaliser = scaled.logsumexp(dim=-1, keepdim=True)
    values, ids = best(scaled, min(FIRST_CANDIDATES, scaled.shape[-1]))
    shares = (values - normaliser).exp()
    floor = torch.tensor([p.min_p or 0.0 for p in params], device=scaled.device)
    mass = torch.tensor([p.top_p or 1.0 for p in params], device=scaled.device)
    whole = (shares.sum(-1) > mass) | (shares[:, -1] < floor * shares[:, 0])
    if bool(whole.all()) or values.shape[-1] == scaled.shape[-1]:
        shares = _truncate(shares, params)
        return ids.gather(1, _invert(shares, uniforms)[:, None])[:, 0]
    picked = torch.empty(len(params), dtype=torch.long, device=scaled.device)
    for is_whole in (True, False):
        index = (whole == is_whole).nonzero()[:, 0]
        if not len(index):
            continue
        subset = [params[i] for i in index.tolist()]
        if is_whole:
            part, order = shares[index], ids[index]
        else:
            part, order = (scaled[index] - normaliser[index]).exp().sort(dim=-1, descending=True)
        part = _truncate(part, subset)
        picked[index] = order.gather(1, _invert(part, uniforms[index])[:, None])[:, 0]
    return picked


def _truncate(shares: Tensor, params: list[SamplingParams]) -> Tensor:
    """top_p, then min_p, on shares [rows, candidates] sorted from the best down.

    top_p keeps the smallest set whose mass reaches it (Holtzman et al., arXiv 1904.09751): every
    candidate before which the mass is still below. min_p drops what is less than that share of
    the best candidate (Nguyen et al., arXiv 2407.01082).
    """
    if any(p.top_p is not None and p.top_p < 1 for p in params):
        mass = torch.tensor([p.top_p or 1.0 for p in params], device=shares.device)[:, None]
        before = shares.cumsum(dim=-1) - shares
        dropped = (before >= mass) & (mass < 1)
        dropped[:, 0] = False
        shares = shares.masked_fill(dropped, 0.0)
    if any(p.min_p for p in params):
        floor = torch.tensor([p.min_p or 0.0 for p in params], device=shares.device)[:, None]
        shares = shares.masked_fill(shares < floor * shares[:, :1], 0.0)
    return shares


def _invert(shares: Tensor, uniforms: Tensor) -> Tensor:
    """Index [rows] where the cumulative sum of shares [rows, n] passes uniform * total.

    In float64, so that the tail keeps its mass. Of a whole vocabulary the sums of blocks are made
    first, and then only those inside the block that was hit: a quarter of the time of a draw.
    """
    rows, size = shares.shape
    targets = uniforms.double()
    if size % BLOCK or size < BLOCK * BLOCK:
        return _passes(shares.double().cumsum(dim=-1), targets)[0]
    blocks = shares.view(rows, size // BLOCK, BLOCK)
    block, rest = _passes(blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1), targets)
    inside = blocks[torch.arange(rows, device=shares.device), block].double().cumsum(dim=-1)
    # as a share of the block, so that rounding cannot lead out of it
    place, _ = _passes(inside, rest / inside[:, -1])
    return block * BLOCK + place


def _passes(cumulative: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Index [rows] where a cumulative sum [rows, n] passes target x total, and by how much the
    sum before it is passed."""
    # rounding must not reach the total: behind it stand only candidates of share 0
    sought = targets[:, None].clamp(max=1 - 2**-52) * (cumulative[:, -1:] * (1 - 2**-52))
    picked = torch.searchsorted(cumulative, sought, right=True)[:, 0]
    picked = picked.clamp_(max=cumulative.shape[-1] - 1)
    before = cumulative.gather(1, (picked - 1).clamp(min=0)[:, None])[:, 0] * (picked > 0)
    return picked, sought[:, 0] - before
