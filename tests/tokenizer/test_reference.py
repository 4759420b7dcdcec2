"""The Rust module equals the pure-Python reference: pieces, merges, ids."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge.tokenizer import reference

rust = pytest.importorskip("fledge._bpe", reason="the Rust module is not built")

PATTERN = st.sampled_from(sorted(reference.PATTERNS))


def assigned(code: int) -> bool:
    """Known to this Python's Unicode version; newer characters may differ (see reference.py)."""
    return unicodedata.category(chr(code)) not in ("Cn", "Cs")


TEXT = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cn", "Cs"])),
    st.text(alphabet=" \t\r\n'sStTreVEllab012!?\u017f\u0301\u3000\x85\x1c", max_size=60),
)


@given(text=TEXT, pattern=PATTERN)
def test_pieces(text, pattern):
    pieces = rust.split(text, pattern)
    assert "".join(pieces) == text
    assert pieces == reference.split(text, pattern)


@pytest.mark.parametrize("pattern", reference.PATTERNS)
def test_pieces_with_every_character(pattern):
    codes = [c for c in range(0x110000) if assigned(c)]
    for start in range(0, len(codes), 4096):
        chars = [chr(c) for c in codes[start : start + 4096]]
        for text in (
            "".join(chars),
            "".join(f"a{c}b {c}{c}1'{c}  {c}" for c in chars),
        ):
            assert rust.split(text, pattern) == reference.split(text, pattern)


@given(texts=st.lists(st.text(alphabet="abc \n1", max_size=60), max_size=6), pattern=PATTERN)
def test_merges_and_ids(texts, pattern):
    merges = rust.train(texts, 50, pattern)
    assert merges == reference.train(texts, 50, pattern)
    fast, slow = rust.Bpe(merges, pattern), reference.Bpe(merges, pattern)
    assert fast.num_tokens == slow.num_tokens
    for text in texts:
        assert fast.encode(text) == slow.encode(text)
    assert fast.encode_batch(texts) == slow.encode_batch(texts)


def test_merges_and_ids_of_real_text(data_root):
    import gzip

    name = data_root / "tokenizer_texts" / "english_wikipedia.txt.gz"
    text = gzip.decompress(name.read_bytes()).decode()[:60_000]
    merges = rust.train([text], 1000, "qwen2")
    assert merges == reference.train([text], 1000, "qwen2")
    assert rust.Bpe(merges, "qwen2").encode(text) == reference.Bpe(merges, "qwen2").encode(text)


def test_arbitrary_merges_encode_by_rank():
    # Merges that no training makes: "abc" exists, but "a" + "bc" never comes to be.
    merges = [(97, 98), (98, 99), (97, 257), (256, 99)]
    for text in ("abc", "bc", "abcabc", "aabbcc"):
        expected = reference.Bpe(merges, "qwen2").encode(text)
        assert rust.Bpe(merges, "qwen2").encode(text) == expected


@pytest.mark.parametrize("engine", [rust, reference])
def test_impossible_merges_are_refused(engine):
    for merges in ([(97, 256)], [(97, 98), (97, 98)]):
        with pytest.raises(ValueError, match="merge"):
            engine.Bpe(merges, "qwen2")
    with pytest.raises(ValueError, match="pattern"):
        engine.Bpe([], "gpt9")
    with pytest.raises(ValueError, match="256"):
        engine.Bpe([], "qwen2").token_bytes(256)


def test_learning_step_by_step():
    # aab aab aa: (a, a) 3 times, then (aa, b) twice.
    merges = reference.train(["aab\naab\naa"], 5, "qwen2")
    assert merges[:2] == [(97, 97), (256, 98)]
    assert reference.merge_pair([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]
    assert reference.merge_pair([7, 7, 7], (7, 7), 8) == [8, 7]
