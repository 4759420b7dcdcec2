"""Attention in parts equals attention over the whole; a cache view equals a full pass."""

import itertools

import pytest
import torch

from fledge.model import ModelConfig
from fledge.model.attention import naive_attend
from fledge.model.kv_cache import CacheView, KVCache, Piece, Segment
from fledge.model.partial_attention import attend_partial, merge_partials, naive_partial


def whole(q, k, v, offset, window, scale=None):
    """The readable twin: one softmax over every key that a query may see."""
    query = torch.arange(q.shape[2])[:, None] + offset
    key = torch.arange(k.shape[2])
    mask = (key <= query) & (key > query - (window or 10**9))
    factor = 1.0 if scale is None else scale * q.shape[-1] ** 0.5
    return naive_attend(q * factor, k, v, mask).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 9])
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("cuts", [[], [4], [3, 9], [1, 2, 10]])
@pytest.mark.parametrize("tokens", [1, 3])
def test_parts_merged_are_the_whole(tokens, cuts, scale, window):
    generator = torch.Generator().manual_seed(0)
    length = 13
    q = torch.randn(2, 4, tokens, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, length, 8, generator=generator)
    offset = length - tokens
    borders = [0, *cuts, length]
    parts = []
    for start, end in itertools.pairwise(borders):
        if window is not None and offset - window + 1 >= end:
            continue  # no query sees anything of it
        part = k[:, :, start:end], v[:, :, start:end]
        parts.append(attend_partial(q, *part, offset - start, window=window, scale=scale))
    expected = whole(q, k, v, offset, window, scale)
    torch.testing.assert_close(merge_partials(parts), expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_equals_its_readable_twin():
    q, k, v = (torch.randn(1, h, 6, 8) for h in (4, 2, 2))
    for got, expected in zip(
        attend_partial(q, k, v, 0), naive_partial(q, k, v, mask=None, causal=True), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_a_view_over_shared_segments_equals_one_sequence(window):
    """A sequence in three slots, read in pieces, beside another one; all other places are NaN."""
    config = ModelConfig(32, 16, 1, 4, 2, 8, 16, 64)
    cache = KVCache(config, 4, 64)
    for slot in range(4):
        cache.poison(slot, start=0)
    q, k, v = (torch.randn(1, h, 20, 8) for h in (4, 2, 2))
    other = [torch.randn(1, h, 5, 8) for h in (4, 2, 2)]
    steps = [
        (Piece(2, 0, 7), 0),
        (Piece(0, 7, 5, (Segment(2, 0, 7),)), 7),
        (Piece(3, 12, 1, (Segment(2, 0, 7), Segment(0, 7, 12))), 12),
        (Piece(3, 13, 7, (Segment(2, 0, 7), Segment(0, 7, 12))), 13),
    ]
    outputs = []
    for piece, start in steps:
        rows = slice(start, start + piece.count)
        pieces = [piece, Piece(1, 0, 5)] if start == 0 else [piece]
        total = 15 if start == 0 else None
        mine = [x[:, :, rows] for x in (q, k, v)]
        if start == 0:
            padding = [torch.zeros(1, x.shape[1], 3, 8) for x in mine]
            mine = [torch.cat(xs, dim=2) for xs in zip(mine, other, padding, strict=True)]
        view = CacheView(cache, pieces, total)
        outputs.append(view.attend(0, *mine, window=window)[:, : piece.count])
    expected = whole(q, k, v, 0, window)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_the_token_before_is_found_across_slots():
    config = ModelConfig(32, 16, 1, 4, 2, 8, 16, 64)
    cache = KVCache(config, 3, 64)
    first = CacheView(cache, [Piece(0, 0, 3), Piece(1, 0, 1)], 6)
    ids = torch.tensor([[5, 6, 7, 9, 0, 0]])
    assert first.previous_ids(ids).tolist() == [[0, 5, 6, 0, 0, 0]]
    behind = (Segment(0, 0, 3),)
    second = CacheView(cache, [Piece(2, 3, 2, behind), Piece(1, 1, 1)])
    assert second.previous_ids(torch.tensor([[8, 4, 3]])).tolist() == [[7, 8, 9]]
    third = CacheView(cache, [Piece(2, 5, 1, behind)])
    assert third.previous_ids(torch.tensor([[1]])).tolist() == [[4]]
