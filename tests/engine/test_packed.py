"""The packed passes equal the module they were packed from; int8 is close."""

import dataclasses

import pytest
import torch
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge.engine import Engine, SamplingParams, linears
from fledge.engine.attention_plan import DecodePlan, _attend_by_products
from fledge.engine.linears import Int8Linear, PlainLinear, pack, pack_swiglu
from fledge.engine.packed import PackedRunner
from fledge.engine.runner import Runner
from fledge.errors import UserError
from fledge.evals import tries
from fledge.evals.scoring import TreeView
from fledge.model import Transformer
from fledge.model.attention import attend_in_blocks, naive_attend
from fledge.model.kv_cache import Piece, Segment
from fledge.products import has_onednn

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(TOKENIZER.vocab_size)

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")


def runners(**options) -> list[Runner]:
    made = [Runner(MODEL, deterministic=False), PackedRunner(MODEL, deterministic=False, **options)]
    for runner in made:
        runner.cache = MODEL.new_cache(6, 128)
        for slot in range(6):
            runner.cache.poison(slot, start=0)
    return made


@torch.inference_mode()
def test_packed_passes_equal_the_module():
    """Prompts in pieces, rows that share segments, rows of other lengths: the same logits."""
    shared = (Segment(0, 0, 40),)
    prompt = [*range(40)]
    decoding = [
        Piece(0, 40, 1),
        Piece(1, 40, 1, shared),
        Piece(2, 40, 1, shared),
        Piece(3, 9, 1),
        Piece(5, 45, 1, (*shared, Segment(4, 40, 45))),
    ]
    got = []
    for runner in runners():
        logits = [
            runner.prefill([prompt[:30], [7] * 9], [Piece(0, 0, 30), Piece(3, 0, 9)], [1], 64)
        ]
        logits.append(runner.prefill([prompt[30:]], [Piece(0, 30, 10)], [0], None))
        logits.append(runner.prefill([[3, 4, 5, 6, 7]], [Piece(4, 40, 5, shared)], [0], None))
        logits.append(runner.decode([1, 2, 3, 4, 5], decoding).clone())
        further = [Piece(p.slot, p.start + 1, 1, p.segments) for p in decoding]
        logits.append(runner.decode([9, 8, 7, 6, 5], further))
        got.append(torch.cat(logits))
    assert got[0].isfinite().all()
    torch.testing.assert_close(got[1], got[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_scores_equal_the_module():
    ids = torch.randint(0, 300, (3, 50), generator=torch.Generator().manual_seed(0))
    plain, packed = (r.token_logprobs(ids[:, :-1], ids[:, 1:]) for r in runners())
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("count", [1, 9, 70])
@torch.inference_mode()
def test_states_at_places_equal_the_module(count, tree, layers):
    """Few places: the last layer for them alone; many: whole. A row of which none is asked."""
    generator = torch.Generator().manual_seed(count)
    config = dataclasses.replace(MODEL.config, num_hidden_layers=layers)
    model = Transformer(config, seed=0)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(0, 300, (3, 40), generator=generator)
    view = None
    if tree:
        sequences = [[*range(20), i, *range(60, 60 + i)] for i in range(8)]
        rows = tries.fold(sequences)
        assert len(rows) == 1 and not rows[0].is_chain
        width = len(rows[0])
        ids = torch.tensor([rows[0].ids, rows[0].ids[::-1]])
        view = TreeView([rows[0], rows[0]], width, torch.device("cpu"))
    last = ids.numel() if count > 60 else ids.shape[1] + 5
    places = torch.randperm(last, generator=generator)[:count].sort().values
    plain, packed = (
        runner(model, deterministic=False).states_at(ids, view, places)
        for runner in (Runner, PackedRunner)
    )
    assert len(plain) == len(places) and plain.isfinite().all()
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [5, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 3])
def test_attention_in_blocks_equals_its_readable_twin(tokens, rows):
    """One mask for all rows, or one for each; two queries share a key head."""
    draw = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(3, heads, tokens, 8, generator=draw) for heads in (4, 2, 2))
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril()
    mask &= torch.rand(mask.shape, generator=draw) < 0.7
    mask |= torch.eye(tokens, dtype=torch.bool)
    expected = naive_attend(q, k, v, mask).transpose(1, 2)
    torch.testing.assert_close(attend_in_blocks(q, k, v, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_products_equals_its_readable_twin(masked):
    q, k, v = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    visible = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
    mask = torch.zeros(3, 11).masked_fill(~visible, float("-inf"))[:, None, None]
    got, lse = _attend_by_products(q, k, v, mask if masked else None, want_lse=True)
    allowed = visible[:, None, None] if masked else torch.ones(1, 11, dtype=torch.bool)
    expected = naive_attend(q, k, v, allowed)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    scores = q @ k.transpose(-1, -2) / 8**0.5 + (mask if masked else 0)
    expected = scores.logsumexp(dim=-1)
    torch.testing.assert_close(lse, expected, rtol=1e-5, atol=1e-5)


def test_neighbouring_rows_of_like_length_share_a_call():
    cache = MODEL.new_cache(6, 128)
    pieces = [Piece(0, 20, 1), Piece(1, 25, 1), Piece(2, 3, 1), Piece(4, 3, 1)]
    plan = DecodePlan(cache, pieces, deterministic=False)
    assert [(run.slots, run.end) for run in plan._runs] == [
        (slice(0, 3), 26),
        (slice(4, 5), 4),
    ]


@needs_onednn
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (1024, 48)])
@pytest.mark.parametrize("fuse_from", [0, 2**60])
def test_products_equal_their_readable_twin(weights, rows, shape, fuse_from, monkeypatch):
    monkeypatch.setattr(linears, "FUSE_FROM", fuse_from)
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, *shape, generator=generator)
    x = torch.randn(rows, shape[1], generator=generator)
    residual = torch.randn(rows, shape[0], generator=generator)
    close = {"float32": 1e-5, "bfloat16": 0.01, "int8": 0.03}[weights]

    def check(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert (got - expected).norm() <= close * expected.norm()

    twin, subject = PlainLinear(weight), pack(weight, weights)
    check(subject(x), twin(x))
    check(subject.plus(x, residual), twin(x) + residual)
    down = torch.randn(shape[1], shape[0], generator=generator)
    stream = torch.randn(rows, shape[1], generator=generator)
    subject = pack_swiglu(weight, other, down, weights)
    inner = torch.nn.functional.silu(x @ weight.T) * (x @ other.T)
    check(subject.plus(x, stream), inner @ down.T + stream)


@needs_onednn
def test_an_int8_row_does_not_depend_on_the_others():
    linear = Int8Linear(torch.randn(64, 32))
    x = torch.randn(6, 32) * torch.tensor([[1e-3], [1.0], [50.0], [1e4], [0.0], [2.0]])
    together = linear(x)
    for i in range(6):
        alone = linear(torch.stack((x[i], x[i])))[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-6, atol=0)
    assert (together[4] == 0).all() and together.isfinite().all()


@needs_onednn
def test_int8_answers_and_scores_come_from_int8():
    subject = Engine(MODEL, TOKENIZER, weights="int8")
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True)
    ((completion,),) = subject.generate([[*range(20)]], params)
    (scored,) = subject.score([[*range(20), *completion.ids]])
    assert completion.logprobs == pytest.approx(scored[20:], abs=0.2)
    (plain,) = Engine(MODEL, TOKENIZER).score([[*range(20), *completion.ids]])
    assert scored != plain and scored == pytest.approx(plain, abs=0.5)


def test_weights_that_do_not_exist_are_refused_in_words():
    with pytest.raises(UserError, match="int3"):
        Engine(MODEL, TOKENIZER, weights="int3").generate([[1]], SamplingParams(max_tokens=1))
    with pytest.raises(UserError, match="int8"):
        Engine(MODEL, TOKENIZER, weights="int8", packed=False)
