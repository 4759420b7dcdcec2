"""Exam questions in training text: planted ones are found, others are not, short ones counted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge import cli
from fledge.data.overlap import Probe, words_of

QUESTION = (
    "Which of these animals lives in the sea, breathes air and sings songs that carry for miles?"
)


def search(question: str, *documents: str, n: int = 13) -> dict:
    probe = Probe(n)
    probe.add("t", "q", question)
    return probe.search(documents)["t"]


def test_a_planted_question_is_found_whatever_its_dress() -> None:
    dressed = "... " + QUESTION.upper().replace(",", " --") + " A whale."
    row = search(QUESTION, "nothing here", "before it. " + dressed)
    assert row["overlapped"] == 1 and row["share"] == 1.0
    assert row["examples"][0]["words"].startswith("which of these animals lives")


def test_twelve_words_in_a_row_are_not_thirteen() -> None:
    words = words_of(QUESTION)
    assert (
        search(QUESTION, " ".join(words[:12]) + " other " + " ".join(words[12:]))["overlapped"] == 0
    )
    assert search(QUESTION, " ".join(words[2:15]))["overlapped"] == 1


def test_short_questions_are_looked_for_whole_or_counted() -> None:
    play = "Who wrote the play about the prince of Denmark?"
    row = search(play, "x")
    assert (row["items"], row["too_short"], row["overlapped"]) == (1, 0, 0)
    told = "so who wrote the play about the prince of denmark then"
    assert search(play, told)["overlapped"] == 1
    assert search("Who is it?", "who is it")["too_short"] == 1


@given(st.lists(st.sampled_from("abc"), min_size=8, max_size=30), st.data())
def test_it_is_the_plain_search(question: list[str], data: st.DataObject) -> None:
    document = data.draw(st.lists(st.sampled_from("abc"), max_size=60))
    n = min(10, len(question))
    runs = {tuple(question[i : i + n]) for i in range(len(question) - n + 1)}
    plain = any(tuple(document[i : i + n]) in runs for i in range(len(document) - n + 1))
    assert search(" ".join(question), " ".join(document), n=10)["overlapped"] == plain


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    words = [
        "the",
        "a",
        "river",
        "house",
        "seven",
        "walk",
        "green",
        "stone",
        "happy",
        "over",
        "people",
    ]
    rows = [
        {"question": " ".join(draw.choice(words) for _ in range(20)), "answer": "x"}
        for _ in range(9)
    ]
    root = tmp_path / "data" / "gsm8k"
    root.mkdir(parents=True)
    lines = [json.dumps({**row, "answer": "#### 1"}) + "\n" for row in rows]
    (root / "test.jsonl").write_text("".join(lines))
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"text": "It says: " + rows[4]["question"] + " and so on"}) + "\n"
        + json.dumps({"text": "nothing"}) + "\n"
    )  # fmt: skip
    asked = [
        "data",
        "overlap",
        tmp_path / "t.jsonl",
        "--tasks",
        "gsm8k",
        "--data-root",
        root.parent,
    ]
    assert cli.main([*map(str, asked), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    row = table["tasks"]["gsm8k"]
    assert (row["items"], row["overlapped"]) == (9, 1) and row["examples"][0]["id"] == "gsm8k/4"
    assert table["documents"] == 2
    assert cli.main([*map(str, asked)]) == 0
    assert "gsm8k/4" in capsys.readouterr().out
    (root / "test.jsonl").unlink()
    assert cli.main([*map(str, asked)]) == 1
    assert "no exam questions" in capsys.readouterr().err
