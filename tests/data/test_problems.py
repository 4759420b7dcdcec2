"""Problems of one's own for reinforcement: reading, splitting, refusing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.data.problems import problems_of, read_problems
from fledge.errors import UserError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_problems_are_split_and_shuffled(tmp_path):
    rows = read_problems(
        write(tmp_path / "p.jsonl", *[{"question": f"{i}?", "answer": i} for i in range(100)])
    )
    train, held = problems_of(rows, "train"), problems_of(rows, "val")
    asked = [[p["messages"][0]["content"] for p in part] for part in (train, held)]
    assert len(asked[0]) == 98 and len(asked[1]) == 2 and not set(asked[0]) & set(asked[1])
    assert asked[0] != sorted(asked[0]) and train[0]["answer"] == int(asked[0][0][:-1])
    one = read_problems(
        write(tmp_path / "q.jsonl", {"messages": [{"role": "user", "content": "x"}], "tests": "1"})
    )
    assert len(problems_of(one, "train")) == len(problems_of(one, "val")) == 1
    assert problems_of(one, "train")[0]["messages"][0]["content"] == "x"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": "4"}, "neither 'question'"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "answer": "4"},
            "neither 'question'",
        ),
        ({"question": "2+2?"}, "neither 'answer'"),
        ({"question": "2+2?", "answer": None, "tests": 3}, "neither 'answer'"),
    ],
)
def test_a_line_that_is_no_problem_is_named(tmp_path, row, said):
    path = write(tmp_path / "p.jsonl", {"question": "1+1?", "answer": "2"}, row)
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert "row 2 of" in caught.value.what and said in caught.value.why


def test_files_without_problems(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_problems(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="holds no problem"):
        read_problems(write(tmp_path / "empty.jsonl"))
