"""Text comes out whole and in order, whatever the tokens cut apart."""

import random

import pytest
from tests.helpers_model import tiny_tokenizer

from fledge.engine import TextStream

TOKENIZER = tiny_tokenizer()
TEXTS = [
    "The answer is 12. plus",
    "naïve 世界 👩‍👩‍👧‍👦 🏳️‍🌈 한국어",
    "aababaababab",
    "",
]


def bytes_of(text: str) -> list[int]:
    """One token per byte: every split point there can be."""
    by_byte = {TOKENIZER.token_bytes(i): i for i in range(256)}
    return [by_byte[bytes([b])] for b in text.encode()]


def told(ids: list[int], stop: list[str] | None = None) -> tuple[str, TextStream]:
    stream = TextStream(TOKENIZER, stop)
    pieces = [stream.push(i) for i in ids]
    return "".join(pieces) + stream.finish(), stream


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_joined_are_the_text(text):
    for ids in (bytes_of(text), TOKENIZER.encode(text)):
        stream = TextStream(TOKENIZER)
        pieces = [stream.push(i) for i in ids]
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == text


def test_bytes_that_are_no_text_are_what_decode_makes_of_them():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(TOKENIZER.num_ordinary_tokens) for _ in range(12)]
        assert told(ids)[0] == TOKENIZER.decode(ids)


def test_special_tokens_and_the_cancelled_token_add_no_text():
    ids = [*TOKENIZER.encode("a"), TOKENIZER.bos_id, -1, *TOKENIZER.encode("b"), TOKENIZER.eos_id]
    assert told(ids)[0] == "ab"


def naive_cut(text: str, stop: list[str]) -> str:
    """The readable twin: the shortest beginning that ends in a stop string, without it."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize(
    "stop", [["ab"], ["aab", "b"], ["abab"], ["世界", "👩‍👩"], ["is 1", "12."]]
)
def test_a_stop_string_is_met_wherever_the_tokens_split(stop):
    rng = random.Random(1)
    for text in [*TEXTS, *("".join(rng.choices("ab", k=12)) for _ in range(200))]:
        for ids in (bytes_of(text), TOKENIZER.encode(text)):
            got, stream = told(ids, stop)
            assert got == naive_cut(text, stop)
            assert stream.finished == any(s in text for s in stop)
            assert stream.stopped is None or stream.stopped in stop


def test_nothing_is_held_back_longer_than_needed():
    stream = TextStream(TOKENIZER, ["abc"])
    assert [stream.push(i) for i in bytes_of("xabxab")] == ["x", "", "", "abx", "", ""]
    assert stream.finish() == "ab" and not stream.finished


def test_after_the_stop_nothing_comes():
    got, stream = told(bytes_of("one END two"), ["END"])
    assert got == "one " and stream.push(bytes_of("x")[0]) == "" == stream.finish()
    assert stream.stopped == "END"


def test_empty_stop_strings_are_no_stop_strings():
    assert told(bytes_of("abc"), [""])[0] == "abc"
