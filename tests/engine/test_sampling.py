"""Draws follow the exact distribution of their row's parameters, whatever the other rows want."""

import math
import random

import pytest
import torch

from fledge.engine import native, sampling
from fledge.engine.native import Draws
from fledge.engine.requests import SamplingParams
from fledge.engine.sampling import adjust, best, repeats_to_come, sample, uniform
from fledge.errors import UserError

DRAWS = 40000


@pytest.fixture(autouse=True, params=["rust", "torch"])
def way(request, monkeypatch) -> str:
    """Everything is drawn by the Rust module, and again by its readable twin."""
    if request.param == "torch":
        monkeypatch.setattr(native, "can_step", lambda weights: False)
    elif not native.can_step("float32"):
        pytest.skip("the Rust module is not built, or this processor is too plain")
    return request.param


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.9, -3.0, 0.25])


def naive_shares(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """The readable twin: the exact distribution, token by token."""
    shares = (logits.double() / p.temperature).softmax(-1)
    order = sorted(range(len(shares)), key=lambda i: (-shares[i], i))
    kept = order[: p.top_k] if p.top_k else order
    total = sum(float(shares[i]) for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if p.top_p is not None and mass >= p.top_p * total and nucleus:
            break
        nucleus.append(i)
        mass += float(shares[i])
    if p.min_p:
        nucleus = [i for i in nucleus if shares[i] >= p.min_p * shares[order[0]]]
    result = torch.zeros_like(shares)
    result[nucleus] = shares[nucleus]
    return result / result.sum()


CASES = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.4),
    SamplingParams(temperature=2.5, top_k=4),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=0.6),
    SamplingParams(temperature=1.0, top_p=0.001),
    SamplingParams(temperature=1.0, min_p=0.3),
    SamplingParams(temperature=1.3, top_k=7, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=0.7, top_p=0.95, min_p=0.1),
]


def draws(params: list[SamplingParams]) -> torch.Tensor:
    """[DRAWS, cases]: every case in one batch of rows, a new position each time."""
    keys = [uniform(p.seed + i, i, d) for d in range(DRAWS) for i, p in enumerate(params)]
    logits = LOGITS.repeat(DRAWS * len(params), 1)
    picked = sample(logits, torch.tensor(keys, dtype=torch.float64), params * DRAWS)
    return picked.view(DRAWS, len(params))


def test_draws_fit_the_exact_distribution_of_their_row():
    picked = draws(CASES)
    for column, params in enumerate(CASES):
        expected = naive_shares(LOGITS, params) * DRAWS
        counts = torch.bincount(picked[:, column], minlength=len(LOGITS)).double()
        assert (counts[expected == 0] == 0).all(), params
        alive = expected > 0
        chi_square = float(((counts - expected)[alive] ** 2 / expected[alive]).sum())
        freedom = int(alive.sum()) - 1
        if freedom == 0:
            continue  # one token only: and no other came: checked above
        # Wilson and Hilferty's approximation of the 0.01 % point
        limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
        assert chi_square < limit, params


@pytest.mark.parametrize("params", CASES)
def test_a_row_draws_the_same_alone_and_among_others(params):
    logits = torch.randn(12, 700, generator=torch.Generator().manual_seed(0)) * 3
    uniforms = torch.tensor([uniform(5, i, 9) for i in range(12)], dtype=torch.float64)
    mixed = [CASES[i % len(CASES)] for i in range(12)]
    for row in range(12):
        table = [*mixed[:row], params, *mixed[row + 1 :]]
        together = sample(logits, uniforms, table)[row]
        alone = sample(logits[row : row + 1], uniforms[row : row + 1], params)[0]
        assert together == alone


def test_a_wide_nucleus_needs_more_than_the_first_candidates():
    params = SamplingParams(temperature=1.0, top_p=0.9)
    logits, draws = torch.zeros(1, 4000), torch.tensor([0.999], dtype=torch.float64)
    assert 0 <= int(sample(logits, draws, params)) < 4000
    seen = {
        int(sample(logits, torch.tensor([u / 500], dtype=torch.float64), params))
        for u in range(500)
    }
    assert len(seen) == 500  # many more than FIRST_CANDIDATES, which is 256


def test_the_last_uniform_number_never_draws_what_was_cut():
    params = SamplingParams(temperature=1.0, top_p=0.3)
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for seed in range(50):
        logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(seed))
        picked = int(sample(logits, last, params))
        assert naive_shares(logits[0], params)[picked] > 0


def test_penalties_and_bias_equal_their_definitions():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5])
    repeat = adjust(logits, SamplingParams(repetition_penalty=2.0), [0], [1, 1])
    assert repeat.tolist() == [0.5, -2.0, 2.0, 0.5]
    presence = adjust(logits, SamplingParams(presence_penalty=0.5), [0], [1, 1, 3])
    assert presence.tolist() == [1.0, -1.5, 2.0, 0.0]
    frequency = adjust(logits, SamplingParams(frequency_penalty=0.5), [0], [1, 1, 3])
    assert frequency.tolist() == [1.0, -2.0, 2.0, 0.0]
    bias = adjust(logits, SamplingParams(logit_bias={0: 3.0, 99: 1.0, -1: 1.0}), [], [])
    assert bias.tolist() == [4.0, -1.0, 2.0, 0.5]
    assert logits.tolist() == [1.0, -1.0, 2.0, 0.5]


def naive_repeats(ids: list[int]) -> dict[int, int]:
    """Every token, and the longest end of the text that stood before it somewhere."""
    found = {}
    for token in range(5):
        runs = [
            n
            for n in range(3, len(ids))
            if any(ids[i : i + n + 1] == [*ids[-n:], token] for i in range(len(ids) - n))
        ]
        if runs:
            found[token] = max(runs)
    return found


def test_going_on_with_what_was_said_costs_more_the_longer_it_is():
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randrange(3) for _ in range(draw.randrange(1, 20))]
        assert repeats_to_come(ids) == naive_repeats(ids), ids
    logits = torch.zeros(5)
    dry, said = SamplingParams(dry_multiplier=0.8), [1, 2, 3, 3, 4, 1, 2, 3, 3]
    assert adjust(logits, dry, [], said).tolist() == pytest.approx([0, 0, 0, 0, -0.8 * 1.75])
    assert (
        adjust(logits, dry, said, [1, 2, 3]).tolist() == [0] * 5
    )  # the prompt's may be said again
    # 9 ends a tool's answer: what it said may be said again, and 9 itself costs nothing
    assert adjust(logits, dry, [], [1, 2, 3, 4, 9, 1, 2, 3], {9}).tolist() == [0] * 5
    wide = torch.zeros(10)
    assert adjust(wide, dry, [], [1, 2, 3, 9, 1, 2, 3], {9})[9] == 0


def test_a_circle_is_left():
    """A row that would say 1 2 1 2 ... for ever says something else."""
    circle, said = torch.tensor([0.0, 5.0, 5.0, 4.0]), [1, 2]
    for _ in range(12):
        logits = circle.clone()
        logits[said[-1]] = 0.0
        params = SamplingParams(dry_multiplier=0.8)
        said.append(int(adjust(logits, params, [], said).argmax()))
    assert 3 in said[:12]
    assert repeats_to_come([1] * 100) == {1: 24}


def test_only_allowed_tokens_come():
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5]])
    for allowed in ([1, 3], lambda ids: [1, 3] if ids == [7] else None):
        row = adjust(logits[0], SamplingParams(allowed_tokens=allowed), [], [7])
        assert row.argmax() == 3 and row[[0, 2]].tolist() == [float("-inf")] * 2
    free = adjust(logits[0], SamplingParams(allowed_tokens=lambda ids: None), [], [])
    assert free.tolist() == logits[0].tolist()


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"dry_multiplier": -0.1},
        {"n": 0},
        {"top_logprobs": -1},
        {"top_logprobs": 1, "logprobs": False},
        {"logit_bias": {1: float("nan")}},
    ],
)
def test_impossible_parameters_are_refused_in_words(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams(**bad)


@pytest.mark.parametrize(("vocab", "count"), [(384, 1), (64 * 512, 50), (64 * 40, 9), (100, 7)])
def test_the_best_by_blocks_are_the_best(vocab, count):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(1))
    for got, expected in zip(best(logits, count), logits.topk(count), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [100, 4096, 32768])
def test_a_draw_by_blocks_is_the_draw_by_one_sum(size):
    """Of a whole vocabulary the sums are made in two levels; the same index comes out."""
    generator = torch.Generator().manual_seed(0)
    different = 0
    for spread in (0.1, 1.0, 5.0, 20.0):
        shares = (spread * torch.randn(64, size, generator=generator)).softmax(-1)
        shares[:, ::3] = 0.0
        uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
        uniforms[:4] = torch.tensor([0.0, 1 - 2**-53, 2**-60, 0.5])
        picked = sampling._invert(shares, uniforms)
        assert (shares.gather(1, picked[:, None]) > 0).all()
        cumulative = shares.double().cumsum(-1)
        sought = uniforms[:, None] * (cumulative[:, -1:] * (1 - 2**-52))
        different += int((torch.searchsorted(cumulative, sought, right=True)[:, 0] != picked).sum())
    assert different <= 4, "only where a uniform number falls on an edge to the last bit"


def test_rust_and_torch_draw_the_same_tokens(monkeypatch):
    """Not where the number lies within rounding of a border: a few of ten thousand at most."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(500, 4096, generator=generator)
    uniforms = torch.rand(500, dtype=torch.float64, generator=generator)
    rules = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.6, top_k=50),
        SamplingParams(temperature=1.3, top_k=4095, min_p=0.01),
        SamplingParams(temperature=1.0, top_k=20, top_p=0.7),
        SamplingParams(temperature=1.0, top_p=0.7),
    ]
    params = [rules[i % len(rules)] for i in range(500)]
    assert Draws.of(logits) is not None or not native.can_step("float32")
    got = sample(logits, uniforms, params)
    monkeypatch.setattr(native, "can_step", lambda weights: False)
    assert (got != sample(logits, uniforms, params)).sum() <= 1


def test_log_probabilities_of_one_token_are_those_of_the_table():
    if (draws := Draws.of(10 * torch.randn(40, 1000))) is None:
        pytest.skip("of the Rust module alone; it is not used here")
    logits = torch.from_numpy(draws._logits)
    tokens = torch.randint(0, 1000, (40,))
    expected = logits.double().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
    got = torch.tensor(draws.logprobs(tokens.tolist()), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_draws_of_something_else_are_refused(way):
    if way == "torch":
        pytest.skip("of the Rust module alone; it is not used here")
    draws = Draws(torch.zeros(2, 5))
    params = [SamplingParams()] * 2
    for call in (
        lambda: draws.tokens([0.5], params),
        lambda: draws.tokens([0.5], params[:1]),
        lambda: draws.logprobs([1]),
        lambda: draws.logprobs([1, 5]),
        lambda: Draws(torch.zeros(5)).logprobs([1] * 5),
        lambda: Draws(torch.zeros(1, 0)).logprobs([0]),
    ):
        with pytest.raises(ValueError):
            call()
    assert Draws.of(torch.zeros(2, 5, dtype=torch.bfloat16)) is None
