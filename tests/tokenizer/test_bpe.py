"""Tokenizer: round trips, special tokens, sizes, hostile text, and the fallback."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.errors import UserError
from fledge.tokenizer import SPECIAL_TOKENS, Tokenizer, bpe, reference

ANY_TEXT = st.one_of(
    st.text(),
    st.text(alphabet=" \t\r\n'sSlLreab12!\u017f\u0301\U0001f600", max_size=40),
)


@given(text=ANY_TEXT)
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode_bytes(ids) == text.encode() == b"".join(map(tok.token_bytes, ids))
    assert all(i < tok.num_ordinary_tokens for i in ids)


@given(texts=st.lists(ANY_TEXT, max_size=8), threads=st.sampled_from([None, 1, 2, 3]))
def test_batch_equals_single(tok, texts, threads):
    assert tok.encode_batch(texts, threads) == [tok.encode(t) for t in texts]


def test_ids_are_laid_out_as_documented(tok):
    assert tok.vocab_size == 768
    assert [tok.token_bytes(b) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert list(tok.special_tokens) == list(SPECIAL_TOKENS)
    assert list(tok.special_tokens.values()) == list(range(768 - 12, 768))
    assert (tok.bos_id, tok.pad_id) == (756, 757)
    assert tok.eos_id == tok.special_tokens["<|assistant_end|>"]
    left, right = tok.merges[0]
    assert tok.token_bytes(256) == bytes([left, right])


@pytest.mark.parametrize(("asked", "got"), [(300, 384), (384, 384), (385, 512)])
def test_vocabulary_is_padded_to_a_multiple_of_128(texts, asked, got):
    tok = Tokenizer.train(texts, vocab_size=asked)
    assert tok.vocab_size == got
    assert len(tok.merges) == asked - 256 - 12
    assert max(tok.special_tokens.values()) == got - 1


def test_a_short_corpus_leaves_padding():
    tok = Tokenizer.train(["ab ab"], vocab_size=512)
    assert tok.vocab_size == 512
    assert len(tok.merges) == 2
    padding = tok.num_ordinary_tokens
    assert tok.token_bytes(padding) == b""
    assert tok.decode([padding]) == "<|reserved_0|>"
    assert tok.encode("<|reserved_0|>", allow_special=True) == [padding]


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_never_becomes_a_special_token(tok, special):
    text = f"x{special}{special} y"
    ids = tok.encode(text)
    assert max(ids) < tok.num_ordinary_tokens
    assert tok.decode(ids) == text
    with_special = tok.encode(text, allow_special=True)
    assert with_special == [
        *tok.encode("x"), *[tok.special_tokens[special]] * 2, *tok.encode(" y")
    ]  # fmt: skip
    assert tok.decode(with_special) == text
    assert tok.decode(with_special, skip_special=True) == "x y"
    assert tok.token_bytes(tok.special_tokens[special]) == b""


def test_lone_surrogates_become_replacement_characters(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    assert tok.encode_batch(["a\ud800b", "c"]) == [tok.encode("a\ufffdb"), tok.encode("c")]
    assert Tokenizer.train(["a\ud800b", "cd"], vocab_size=300).decode([99]) == "c"


@pytest.mark.parametrize("wrong", [-1, 768, 10**6])
def test_unknown_ids_are_refused(tok, wrong):
    with pytest.raises((ValueError, OverflowError)):
        tok.decode([wrong])


def test_half_a_character_decodes_to_a_replacement(tok):
    assert tok.decode([0xC3]) == "\ufffd"
    assert tok.decode_bytes([0xC3]) == b"\xc3"


@pytest.mark.parametrize("pattern", reference.PATTERNS)
def test_merges_do_not_depend_on_threads_or_order(texts, pattern):
    merges = Tokenizer.train(texts * 5, 512, pattern, threads=1).merges
    for threads in (2, 5):
        assert Tokenizer.train(texts * 5, 512, pattern, threads=threads).merges == merges
    assert Tokenizer.train(reversed(texts * 5), 512, pattern).merges == merges


def test_texts_may_be_a_generator_and_its_errors_come_through(texts):
    def broken():
        yield texts[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        Tokenizer.train(broken(), vocab_size=300)
    assert Tokenizer.train((t for t in texts), 300).merges == Tokenizer.train(texts, 300).merges


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "7", "\U0001f600", "\u4e2d", "a\u0301", "aB", "!"]
)
def test_hostile_text_is_not_quadratic(tok, unit):
    pytest.importorskip("fledge._bpe")
    text = unit * 100_000
    start = time.process_time()
    ids = tok.encode(text)
    seconds = time.process_time() - start
    assert tok.decode(ids) == text
    assert seconds < 10, "100,000 repeats take a fraction of a second unless they are quadratic"


def test_several_threads_may_share_a_tokenizer(tok, texts):
    expected = [tok.encode(t) for t in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tok.encode, texts * 50)) == expected * 50


def test_user_errors():
    with pytest.raises(UserError, match="too small"):
        Tokenizer.train(["a"], vocab_size=200)
    with pytest.raises(UserError, match="split pattern"):
        Tokenizer.train(["a"], vocab_size=300, pattern="gpt9")


def test_without_the_rust_module_the_reference_takes_over(tok, texts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fledge._bpe", None)
    monkeypatch.delattr("fledge._bpe", raising=False)
    bpe.engine.cache_clear()
    try:
        slow = Tokenizer.train(texts * 3, vocab_size=768)
        Tokenizer.train(texts, vocab_size=300)
    finally:
        bpe.engine.cache_clear()
    assert isinstance(slow._bpe, reference.Bpe)
    assert capsys.readouterr().err.count("not built") == 1
    assert slow.merges == tok.merges
    assert [slow.encode(t) for t in texts] == [tok.encode(t) for t in texts]


@pytest.mark.parametrize("vocab_size", [384, 70_016])
def test_arrays_hold_the_same_ids(texts, vocab_size):
    np = pytest.importorskip("numpy")
    tok = Tokenizer.train(texts, vocab_size=vocab_size)
    kind = np.uint16 if vocab_size <= 65536 else np.uint32
    texts = [*texts, "", "\ud800 lone"]
    for text in texts:
        ids = tok.encode_to_numpy(text)
        assert ids.dtype == kind and ids.tolist() == tok.encode(text)
        assert tok.count(text) == len(ids)
        assert tok.decode(ids) == tok.decode(ids.tolist())
    for threads in (1, 3):
        flat, offsets = tok.encode_to_numpy(texts, threads=threads)
        parts = [flat[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
        assert flat.dtype == kind and parts == tok.encode_batch(texts)
    with_special = np.array([tok.bos_id, 104, tok.eos_id])
    assert tok.decode(with_special) == "<|bos|>h<|assistant_end|>"


@given(st.text())
def test_the_decoder_equals_decode_and_gives_whole_characters(text):
    tok = _small()
    ids = [tok.bos_id, *tok.encode(text), 0xE4, 0xB8]  # ends inside a character
    decoder = tok.decoder()
    given_out = [decoder.push(i) for i in ids]
    assert "".join(given_out) + decoder.finish() == tok.decode(ids)
    assert decoder.push(0xE4) == "" and decoder.finish() == "\ufffd"
    assert "\ufffd" in text or not any("\ufffd" in part for part in given_out)


@functools.cache
def _small() -> Tokenizer:
    return Tokenizer.train(["the small tokenizer of one test"], vocab_size=384)


def test_decode_errors_and_ids_that_are_none():
    tok = _small()
    assert tok.decode([0xE4, 104], errors="ignore") == "h"
    with pytest.raises(UnicodeDecodeError):
        tok.decode([0xE4], errors="strict")
    for bad in ([-1], [tok.vocab_size], [2**40]):
        with pytest.raises(ValueError, match="token"):
            tok.decode(bad)


@pytest.mark.parametrize(
    "text", ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e01\u0e33\u0e25\u0e31\u0e07"]
)
def test_marks_as_letters_keep_words_whole(text):
    tok = Tokenizer.train([text * 3 + " x"], vocab_size=512, marks="letters")
    assert tok.pattern == "qwen2+marks"
    assert bpe.engine().split(f"{text} {text}", tok.pattern) == [text, " " + text]
    assert len(bpe.engine().split(text, "qwen2")) > 1


def test_arrays_are_ones_own(tok, texts):
    np = pytest.importorskip("numpy")
    ids = tok.encode_to_numpy(texts[0])
    expected = ids.tolist()
    ids[0] = 7  # may be written to, and nobody else sees it
    assert tok.encode_to_numpy(texts[0]).tolist() == expected
    kept = [tok.encode_to_numpy(f"{texts[0]} {i}") for i in range(200)]
    assert all(a.base is not None and a.flags.writeable for a in kept)
    assert [a.tolist() for a in kept] == [tok.encode(f"{texts[0]} {i}") for i in range(200)]
    assert tok.encode_to_numpy("").shape == (0,)
    flat, offsets = tok.encode_to_numpy([])
    assert flat.tolist() == [] and offsets.tolist() == [0] and offsets.dtype == np.uint64


class Odd(int):
    """An int, yet not exactly one."""


class Index:
    """Something that may stand for an int, and empties the list while it is asked."""

    def __init__(self, ids: list) -> None:
        self.ids = ids

    def __index__(self) -> int:
        self.ids.clear()
        return 104


def test_ids_that_are_not_plain_ints(tok):
    np = pytest.importorskip("numpy")
    assert tok.decode([np.uint16(104), Odd(105), True]) == "hi\x01"
    assert tok.decode((104, 105)) == tok.decode(np.array([104, 105])) == "hi"
    with pytest.raises(TypeError):
        tok.decode(["104"])
    with pytest.raises(TypeError):
        tok.decode([104.0])
    ids: list = [104]
    ids += [Index(ids), 105]
    assert tok.decode(ids) == "hh"


def test_decoding_gives_every_length_of_token_back():
    word = "antidisestablishmentarianism " * 40
    tok = Tokenizer.train([word], vocab_size=512)
    lengths = {len(tok.token_bytes(i)) for i in range(tok.num_ordinary_tokens)}
    assert {2, 14, 15, 16, 17} & lengths and max(lengths) > 20
    every = list(range(tok.num_ordinary_tokens)) * 3
    expected = b"".join(map(tok.token_bytes, every))
    assert tok.decode_bytes(every) == expected
    assert tok.decode(every) == expected.decode("utf-8", "replace")
