"""Conversations as pieces: whole turns or nothing, counted once, never able to clog packing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers_model import tiny_tokenizer

from fledge.data.loader import Loader, Mixture
from fledge.data.tokenized import ConversationDocuments, Epochs, TextDocuments
from fledge.errors import UserError
from fledge.tokenizer.chat import render

TOKENIZER = tiny_tokenizer()


def chat(exchanges: int, *, number: int = 0, words: int = 2) -> dict[str, Any]:
    messages = []
    for i in range(exchanges):
        messages.append({"role": "user", "content": f"q{number}.{i}"})
        messages.append({"role": "assistant", "content": f"a{number}.{i} " + "so " * words})
    return {"messages": messages}


def documents(rows: list[dict[str, Any]], room: int, policy: Any = "start") -> Any:
    return ConversationDocuments(
        lambda i: rows[i % len(rows)], TOKENIZER, max_tokens=room, policy=policy
    )


def text_of(piece: Any) -> str:
    return TOKENIZER.decode(piece[0].tolist())


@pytest.mark.parametrize(
    ("policy", "kept", "gone"), [("start", "q0.0", "q0.9"), ("end", "q0.9", "q0.0")]
)
def test_a_long_chat_keeps_whole_exchanges(policy, kept, gone):
    made = documents([chat(10)], 100, policy)
    ids, mask = made.piece(0)
    assert len(ids) <= 100 and kept in text_of((ids,)) and gone not in text_of((ids,))
    special = TOKENIZER.special_tokens
    for role in ("user", "assistant"):
        starts, ends = (int((ids == special[f"<|{role}_{e}|>"]).sum()) for e in ("start", "end"))
        assert starts == ends > 1
    assert ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id and mask[-1] == 1
    assert made.counts == {"read": 1, "shortened": 1, "dropped": 0, "untrained": 0}


def test_what_is_dropped_and_what_has_nothing_to_learn():
    silent = {"messages": [{"role": "user", "content": "x"}]}
    rows = [chat(1), chat(10), chat(1, words=300), silent]
    made = documents(rows, 100, "drop")
    sizes = [len(made.piece(i)[0]) for i in range(4)]
    assert sizes[0] > 0 and sizes[1:] == [0, 0, 0]
    assert made.counts == {"read": 4, "shortened": 0, "dropped": 2, "untrained": 1}
    shortened = documents(rows, 100)
    assert [len(shortened.piece(i)[0]) > 0 for i in range(4)] == [True, True, False, False]
    assert shortened.counts == {"read": 4, "shortened": 1, "dropped": 1, "untrained": 1}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 60)), min_size=1, max_size=12),
    st.integers(30, 200),
    st.sampled_from(["start", "end"]),
)
def test_every_piece_is_exchanges_of_its_conversation(shapes, room, policy):
    rows = [chat(n, number=i, words=w) for i, (n, w) in enumerate(shapes)]
    made = documents(rows, room, policy)
    for i, row in enumerate(rows):
        ids, mask = made.piece(i)
        messages = row["messages"]
        cuts = range(0, len(messages) + 1, 2)
        possible = [messages[:c] if policy == "start" else messages[c:] for c in cuts]
        fitting = [render(TOKENIZER, {"messages": m}) for m in possible if m]
        fitting = [r for r in fitting if len(r[0]) <= room]
        best = max(fitting, key=lambda r: len(r[0]), default=([], []))
        assert (ids.tolist(), mask.tolist()) == best


def test_counts_survive_a_resume():
    """A resumed loader renders again what it had waiting, and counts it once."""
    rows = [chat(1 + i % 7, number=i, words=i % 5) for i in range(40)]

    def loader() -> Loader:
        prose = TextDocuments(lambda i: f"text {i}", TOKENIZER, max_tokens=60)
        mixture = Mixture([documents(rows, 60), prose, documents(rows, 60, "drop")], [2, 1, 1])
        return Loader(mixture, row_tokens=60, pad_id=TOKENIZER.pad_id, split=False)

    whole = loader()
    for _ in range(7):
        whole.batch(3)
    half = loader()
    for _ in range(3):
        half.batch(3)
    again = loader()
    again.restore(half.state())
    for _ in range(4):
        again.batch(3)
    assert again.state() == whole.state()
    tables = whole.counts()
    assert len(tables) == 2 and tables[0]["shortened"] > 0 and tables[1]["dropped"] > 0
    assert 0 < tables[0]["read"] < 600


def test_chats_of_which_none_fits_are_an_error_not_a_loop(monkeypatch):
    monkeypatch.setattr("fledge.data.pack.MOST_EMPTY", 50)
    loader = Loader(documents([chat(1, words=99)], 40), row_tokens=40, pad_id=0, split=False)
    with pytest.raises(UserError, match="50 documents in a row") as caught:
        loader.batch(1)
    assert "max_seq_len" in caught.value.fix
    # a few that fit among many that do not are enough
    rows = [chat(1, words=99)] * 30 + [chat(1, words=0)]
    Loader(documents(rows, 40), row_tokens=40, pad_id=0, split=False).batch(2)


def test_epochs_shuffle_anew_and_lose_nothing():
    items = Epochs(list(range(20)), seed=3)
    first, second = ([items(i) for i in range(e * 20, e * 20 + 20)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
