"""A BPE from ranks: the Rust module, its twin and tiktoken agree; bad ranks are refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.tokenizer import Tokenizer, reference

rust = pytest.importorskip("fledge._bpe", reason="the Rust module is not built")

BYTES = [bytes([b]) for b in range(256)]
TEXT = st.one_of(
    st.text(alphabet="abcd \n'1", max_size=200),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
)


@st.composite
def vocabularies(draw: st.DrawFn) -> list[bytes]:
    """Bytes in any order, and tokens that need not be made of others."""
    tokens = draw(st.lists(st.text(alphabet="abcd ", min_size=2, max_size=9), unique=True))
    bytes_first = draw(st.booleans())
    every = [*BYTES, *(token.encode() for token in tokens)]
    order = random.Random(draw(st.integers(0, 1000)))
    if bytes_first:
        every = [*order.sample(BYTES, 256), *every[256:]]
    else:
        order.shuffle(every)
    return every


@given(tokens=vocabularies(), text=TEXT)
def test_the_twin_gives_the_same_ids(tokens: list[bytes], text: str) -> None:
    fast = rust.Bpe.from_ranks(tokens, "qwen2")
    slow = reference.Bpe.from_ranks(tokens, "qwen2")
    assert fast.num_tokens == slow.num_tokens == len(tokens)
    assert fast.merges == slow.merges == []
    ids = fast.encode(text)
    assert ids == slow.encode(text)
    assert fast.count(text) == slow.count(text) == len(ids)
    assert fast.decode(ids, "strict") == slow.decode(ids, "strict") == text


@given(tokens=vocabularies(), text=TEXT)
def test_tiktoken_gives_the_same_ids(tokens: list[bytes], text: str) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding(
        "test",
        pat_str=reference.PATTERNS["qwen2"],
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={},
    )
    assert rust.Bpe.from_ranks(tokens, "qwen2").encode(text) == theirs.encode_ordinary(text)


def test_ranks_of_a_trained_tokenizer_are_its_merges() -> None:
    tok = Tokenizer.train(["the cat sat on the mat, the dog barked at the cat " * 9], 512)
    tokens = [tok.token_bytes(i) for i in range(tok.num_ordinary_tokens)]
    by_ranks = rust.Bpe.from_ranks(tokens, tok.pattern)
    text = "the cats barked; " * 50 + "a" * 1000
    assert by_ranks.encode(text) == tok.encode(text)


@pytest.mark.parametrize("engine", [rust, reference])
@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        ([*BYTES, b"ab", b"ab"], "256 and 257"),
        ([*BYTES, b""], "256 has no bytes"),
        ([*BYTES[:7], *BYTES[8:]], "0x07"),
        ([], "0x00"),
    ],
)
def test_refusals_say_where(engine, tokens: list[bytes], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        engine.Bpe.from_ranks(tokens, "qwen2")
    with pytest.raises(ValueError, match="pattern"):
        engine.Bpe.from_ranks(BYTES, "gpt9")


def test_more_than_65536_tokens_do_not_fit_16_bits() -> None:
    many = [*BYTES, *(b"%06d" % i for i in range(1 << 16))]
    bpe = rust.Bpe.from_ranks(many, "qwen2")
    with pytest.raises(ValueError, match="16 bits"):
        bpe.encode_u16("a")
    with pytest.raises(ValueError, match="16 bits"):
        bpe.encode_batch_u16(["a"])
    assert memoryview(bpe.encode_u32("a")).cast("I").tolist() == [97]
