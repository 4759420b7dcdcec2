"""The native decode step equals the module, row by row, and leaves nothing behind."""

import contextlib
import dataclasses
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge.engine import Engine, SamplingParams, native
from fledge.engine.native import NativeDecoder, can_step
from fledge.engine.packed import PackedRunner
from fledge.engine.runner import Runner
from fledge.model import ModelConfig, Transformer
from fledge.model.kv_cache import KVCache, Piece, Segment

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(TOKENIZER.vocab_size)
CONTEXT = 400
SLOTS = 20

pytestmark = pytest.mark.skipif(
    not can_step("float32"), reason="the Rust module is not built, or this processor is too plain"
)

# vocab, hidden, layers, heads, key heads, head width, inner: widths that fill no register, grouped
# heads, one layer, heads as wide as those of real models
Shape = tuple[int, int, int, int, int, int, int]
SHAPES: list[Shape] = [
    (384, 32, 2, 4, 2, 8, 48),
    (130, 40, 3, 3, 1, 18, 50),
    (100, 64, 1, 2, 2, 64, 80),
    (96, 96, 2, 6, 3, 128, 200),
]


def random_model(shape: Shape, *, tied: bool = False, seed: int = 0) -> Transformer:
    config = ModelConfig(*shape, CONTEXT, tie_word_embeddings=tied)
    model = Transformer(config, seed=0)
    change(model, seed)
    return model.eval()


def change(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in {p.data_ptr(): p for p in model.parameters()}.values():
            wide = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.add_(wide * torch.randn(parameter.shape, generator=generator))


def poisoned(model: Transformer) -> KVCache:
    cache = model.new_cache(SLOTS, CONTEXT)
    for slot in range(SLOTS):
        cache.poison(slot, start=0)
    return cache


def prompt(row: int, length: int, vocab_size: int) -> list[int]:
    return [(7 * i + 31 * row + 3) % vocab_size for i in range(length)]


@torch.inference_mode()
def fill(runner: Runner, rows: int, vocab_size: int) -> list[Piece]:
    """Prompts of `rows` rows of several lengths, some behind shared ones; the next pieces."""
    runner.cache = poisoned(runner.model)
    first, second = Segment(17, 0, 150), Segment(18, 150, 170)
    runner.prefill([prompt(50, 150, vocab_size)], [Piece(17, 0, 150)], [0], None)
    runner.prefill([prompt(51, 20, vocab_size)], [Piece(18, 150, 20, (first,))], [0], None)
    pieces = []
    for row in range(rows):
        segments = ((), (first,), (first, second), ())[row % 4]
        base = segments[-1].end if segments else 0
        length = (1, 129, 5, 260)[(row * 3) % 4 if not segments else row % 4] % (CONTEXT - base - 4)
        slot = (5 * row) % 17  # not in order
        runner.prefill(
            [prompt(row, length, vocab_size)], [Piece(slot, base, length, segments)], [0], None
        )
        pieces.append(Piece(slot, base + length, 1, segments))
    return pieces


def further(pieces: list[Piece]) -> list[Piece]:
    return [dataclasses.replace(piece, start=piece.start + 1) for piece in pieces]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_logits_equal_the_module_and_the_packed_passes(shape, rows, tied):
    model, got = random_model(shape, tied=tied), []
    for runner in (
        Runner(model, deterministic=False),
        PackedRunner(model, deterministic=False, native=False),
        PackedRunner(model, deterministic=False),
    ):
        pieces = fill(runner, rows, shape[0])
        logits = [runner.decode([(11 * i + 2) % shape[0] for i in range(rows)], pieces).clone()]
        logits.append(runner.decode([(5 * i) % shape[0] for i in range(rows)], further(pieces)))
        got.append(torch.cat(logits))
    assert runner._native is not None  # type: ignore[union-attr]
    assert got[0].isfinite().all() and got[0].std() > 0.1
    torch.testing.assert_close(got[2], got[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2], got[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@torch.inference_mode()
def test_rounded_weights_give_what_the_packed_passes_give(weights):
    if not can_step(weights):
        pytest.skip("the packed passes are the fast way here")
    model, got = random_model(SHAPES[3]), []
    for options in ({"native": False}, {}):
        runner = PackedRunner(model, deterministic=False, weights=weights, **options)
        got.append(runner.decode([3, 4, 5, 6], fill(runner, 4, 96)))
    exact = Runner(model, deterministic=False)
    expected = exact.decode([3, 4, 5, 6], fill(exact, 4, 96))
    packed_error, native_error = ((logits - expected).norm() for logits in got)
    assert 0 < native_error < 1.3 * packed_error and native_error < 0.05 * expected.norm()


@torch.inference_mode()
def test_a_row_does_not_depend_on_others_or_on_threads_to_the_bit():
    for weights in ("float32", "int8"):
        model = random_model(SHAPES[1])
        runner = PackedRunner(model, deterministic=False)
        pieces, tokens = fill(runner, 7, 130), [9, 8, 7, 6, 5, 4, 3]
        together = NativeDecoder(model, weights, threads=3).decode(tokens, pieces, runner.cache)
        alone = NativeDecoder(model, weights, threads=1)
        for i, piece in enumerate(pieces):
            assert torch.equal(alone.decode([tokens[i]], [piece], runner.cache)[0], together[i])


@pytest.mark.parametrize("weights", ["float32", "int8"])
@torch.inference_mode()
def test_a_model_that_is_broken_says_so(weights):
    """What is no number does not become a reply: neither in a token's embedding nor in a matrix."""
    if not can_step(weights):
        pytest.skip(f"no native steps in {weights} on this processor")
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        model = random_model(SHAPES[0])
        model.get_parameter(name)[1, 0] = float("nan")
        runner = PackedRunner(model, deterministic=False, weights=weights)
        runner.cache = model.new_cache(SLOTS, CONTEXT)
        logits = runner.decode([1], [Piece(0, 0, 1)])
        assert logits.isnan().all(), name
        assert math.isnan(native.Draws(logits).logprobs([0])[0])


@torch.inference_mode()
def test_new_weights_are_used_after_weights_changed():
    model = random_model(SHAPES[0])
    subject, twin = PackedRunner(model, deterministic=False), Runner(model, deterministic=False)
    before = subject.decode([1], fill(subject, 1, 384)).clone()
    change(model, 9)
    subject.weights_changed()
    after = subject.decode([1], fill(subject, 1, 384))
    torch.testing.assert_close(after, twin.decode([1], fill(twin, 1, 384)), rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01


@torch.inference_mode()
def test_what_is_read_is_the_own_past_only():
    """NaN everywhere else, before and after: neither read nor written over."""
    model = random_model(SHAPES[0])
    runner = PackedRunner(model, deterministic=False)
    pieces = fill(runner, 4, 384)
    before = [t.clone() for t in (*runner.cache.keys, *runner.cache.values)]
    assert runner.decode([1, 2, 3, 4], pieces).isfinite().all()
    for old, new in zip(before, (*runner.cache.keys, *runner.cache.values), strict=True):
        changed = ~((old == new) | (old.isnan() & new.isnan())).all(dim=-1).all(dim=1)
        assert changed.nonzero().tolist() == sorted([p.slot, p.start] for p in pieces)


def helpers() -> int:
    """Threads of native steps in this process, by their names."""
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append(thread.joinpath("comm").read_text())
    return sum(name.startswith("fledge-decode") for name in names)


def has_helpers(count: int) -> bool:
    """Soon: a thread names itself when it begins to run and is listed a moment beyond its end."""
    deadline = time.monotonic() + 20
    while helpers() != count and time.monotonic() < deadline:
        time.sleep(0.001)
    return helpers() == count


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


@needs_proc
def test_threads_end_with_the_engine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    before = helpers()
    engines = [Engine(MODEL, TOKENIZER) for _ in range(2)]
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for engine in engines:
        engine.generate([[1, 2, 3]], params)
    assert has_helpers(before + 4)
    engines[0].weights_changed()
    assert has_helpers(before + 2)
    engines[0].generate([[1, 2, 3]], params)
    assert has_helpers(before + 4)
    for engine in engines:
        engine.close()
    assert has_helpers(before)


@needs_proc
@torch.inference_mode()
def test_helpers_sleep_between_steps():
    runner = PackedRunner(MODEL, deterministic=False, native=False)
    runner.cache = MODEL.new_cache(2, 128)
    subject = NativeDecoder(MODEL, "float32", threads=4)
    subject.decode([1], [Piece(0, 0, 1)], runner.cache)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    assert subject.decode([1], [Piece(0, 1, 1)], runner.cache).isfinite().all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@torch.inference_mode()
def test_a_forked_process_steps_on_without_the_helpers():
    cache = MODEL.new_cache(2, 128)
    subject = NativeDecoder(MODEL, "float32", threads=3)
    subject.decode([1], [Piece(0, 0, 1)], cache)
    expected = subject.decode([2], [Piece(0, 1, 1)], cache).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a process with threads forks is the point
        child = os.fork()
    if child == 0:
        same = torch.equal(subject.decode([2], [Piece(0, 1, 1)], cache), expected)
        del subject
        os._exit(0 if same else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("tokens", "pieces", "word"),
    [
        ([384], [Piece(0, 0, 1)], "token"),
        ([1], [Piece(9, 0, 1)], "slot"),
        ([1], [Piece(0, 128, 1)], "position"),
        ([1], [Piece(0, 3, 1, (Segment(1, 1, 2),))], "follow"),
        ([1], [Piece(0, 3, 1, (Segment(1, 0, 5),))], "shared"),
        ([1, 2], [Piece(0, 3, 1), Piece(0, 4, 1)], "one slot"),
        ([1, 2], [Piece(0, 3, 1), Piece(1, 9, 1, (Segment(0, 0, 9),))], "written"),
        ([], [], "without rows"),
        ([1, 2], [Piece(0, 0, 1)], "different number"),
    ],
)
@torch.inference_mode()
def test_what_cannot_be_is_refused(tokens, pieces, word):
    cache = MODEL.new_cache(3, 128)
    subject = NativeDecoder(MODEL, "float32", threads=2)
    with pytest.raises(ValueError, match=word):
        subject.decode(tokens, pieces, cache)
    with pytest.raises(OverflowError):
        subject.decode([-1], [Piece(0, 0, 1)], cache)
    assert subject.decode([1], [Piece(0, 0, 1)], cache).isfinite().all()


@torch.inference_mode()
def test_arrays_of_another_kind_are_refused():
    subject = NativeDecoder(MODEL, "float32", threads=1)._step
    logits = np.zeros((1, 384), np.float32)
    with pytest.raises(ValueError, match="use_cache"):
        subject.step([1], [0], [0], [[]], logits)
    cache = MODEL.new_cache(2, 16)
    keys, values = ([t.numpy() for t in ts] for ts in (cache.keys, cache.values))
    frozen = values[1].copy()
    frozen.flags.writeable = False
    for wrong in (
        keys[:1],
        [*keys, keys[0]],
        [keys[0], keys[1][:1]],
        [keys[0], keys[1].transpose(0, 1, 3, 2)],
        [keys[0], np.asfortranarray(keys[1])],
        [keys[0], frozen],
    ):
        with pytest.raises(ValueError, match=r"cache|contiguous|written"):
            subject.use_cache(keys, wrong)
    with pytest.raises(BufferError):
        subject.use_cache([k.astype(np.float64) for k in keys], values)
    subject.use_cache(keys, values)
    for wrong in (logits[:, :-1].copy(), np.zeros((2, 384), np.float32), logits[:, ::2]):
        with pytest.raises(ValueError, match=r"shape|contiguous"):
            subject.step([1], [0], [0], [[]], wrong)
    subject.step([1], [0], [0], [[]], logits)
    assert logits.any()


def test_without_the_module_the_packed_passes_do_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fledge._bpe", None)
    assert native.native_step() is None and not can_step("float32")
    engine = Engine(MODEL, TOKENIZER)
    ((got,),) = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    assert got.ids and engine.runner._native is None  # type: ignore[attr-defined]
