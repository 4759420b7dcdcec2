"""fledge.bench.tok: its rows have the contract's shape, and its texts are what they say."""

from __future__ import annotations

import pytest

from fledge import cli
from fledge.bench import tok
from fledge.errors import UserError

TEXTS = ["The cat sat on the mat, and the dog barked at 17 birds. " * 40]


def test_rows_of_a_small_run() -> None:
    settings = tok.Settings(train_mb=0.02, document_mb=0.02, vocab_size=384, runs=1, threads=1)
    said: list[str] = []
    rows = tok.run(TEXTS, settings, said.append)
    keys = {"name", "value", "unit", "peer", "peer_value", "ratio", "low", "high"}
    assert all(set(row) == keys and row["value"] > 0 for row in rows)
    names = {row["name"].partition(",")[0] for row in rows}
    assert {"train 0.02 MB to 384", "document", "loop", "batch", "decode", "hostile"} <= names
    beside = [row for row in rows if row["ratio"] is not None]
    assert beside, "tiktoken and tokenizers are development dependencies"
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in beside)
    assert tok.table(rows).count("\n") == len(rows) + 1


def test_hostile_texts_have_the_size_that_was_asked_for() -> None:
    texts = tok.hostile_texts("prose ", 10_000)
    assert texts["normal"].startswith("prose prose")
    assert {10_000 - 4 < len(text.encode()) <= 10_000 for text in texts.values()} == {True}


def test_ratio_above_one_means_better() -> None:
    found = {"fledge": [{"s": 1.0}, {"s": 2.0}], "peer": [{"s": 4.0}, {"s": 4.0}]}
    faster = tok.row("train", "s", "peer", found, "s", less_is_better=True)
    assert (faster["ratio"], faster["low"], faster["high"]) == (3.0, 2.0, 4.0)
    assert tok.row("encode", "MB/s", "peer", found, "s")["ratio"] == 0.375


def test_a_peer_that_gives_up_has_no_ratio() -> None:
    found = {"fledge": [{"s": 1.0}], "peer": [{"s": 0.0}]}
    row = tok.row("hostile", "MB/s", "peer", found, "s")
    assert row["ratio"] is None and "gives up" in tok.table([row])


def test_no_text_is_a_users_error() -> None:
    with pytest.raises(UserError, match="no text"):
        tok.run([], tok.Settings(), print)


def test_a_contender_that_fails_is_named() -> None:
    with pytest.raises(UserError, match="measuring fledge"):
        tok.call({"what": "train", "name": "fledge", "folder": "/nowhere", "size": 384})


def test_parts_and_peers_can_be_chosen() -> None:
    settings = tok.Settings(
        train_mb=0.02, document_mb=0.02, vocab_size=384, runs=1, threads=1,
        parts=("decode",), peers=("tiktoken",),
    )  # fmt: skip
    rows = tok.run(TEXTS, settings, lambda line: None)
    names = [(row["name"], row["peer"]) for row in rows]
    assert names == [("decode, document", "tiktoken"), ("decode, loop", "tiktoken")]


def test_a_peer_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tok", "bench", "--peers", "nobody"]) == 1
    assert "there is no peer 'nobody'" in capsys.readouterr().err
