"""Conversations from users' files and from the tasks' rows, and what the stages get of them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fledge.data import conversations as c
from fledge.data.task_files import JsonRows, TaskData
from fledge.errors import UserError
from fledge.sandbox import arithmetic

SHARED = Path(os.environ.get("FLEDGE_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (SHARED / "gsm8k").is_dir(), reason=f"no task files under {SHARED} (set FLEDGE_DATA)"
)
GSM8K = {
    "question": "How many?",
    "answer": "In May 48/2 = <<48/2=24>>24.\nIn all $<<24*2.50=60.00>>60.\n#### 1,060",
}


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)],
        "source": "test",
    }


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small folder of task files in the layout of the shared data."""
    write(
        tmp_path / "gsm8k" / "train.jsonl.gz", [GSM8K | {"question": f"Q{i}?"} for i in range(100)]
    )
    choices = {"question": "Which?", "choices": ["a", "b", "c", "d"], "gold": 2}
    write(
        tmp_path / "arc" / "arc_easy_train.jsonl.gz", [choices | {"id": str(i)} for i in range(5)]
    )
    piqa = {"goal": "To dry", "sol1": "wet it", "sol2": "air it", "label": 1}
    write(tmp_path / "mc_train" / "piqa_train.jsonl", [piqa] * 4)
    chats = [chat(f"Hello {i}", f"Hi {i}<|endoftext|>") for i in range(400)]
    write(tmp_path / "sft" / "small_talk.jsonl.gz", chats)
    write(tmp_path / "sft" / "t0_p3_sample.jsonl.gz", chats[:50])
    write(tmp_path / "sft" / "fastchat_identity.jsonl.gz", [chat("Who?", "Vicuna")])
    write(tmp_path / "sft" / "preference_pairs.jsonl.gz", [{"prompt": "p", "chosen": "c"}])
    return tmp_path


def local(root: Path) -> TaskData:
    return TaskData(root, use_hub=False)


# ------------------------------------------------------------------------------ rows of the tasks


def test_gsm8k_marks_become_python_parts() -> None:
    made = c.gsm8k_conversation(GSM8K)
    assert made["messages"][1]["content"] == [
        {"type": "text", "text": "In May 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "output", "text": "24"},
        {"type": "text", "text": "24.\nIn all $"},
        {"type": "python", "text": "24*2.50"},
        {"type": "output", "text": "60"},
        {"type": "text", "text": "60.\n#### 1,060"},
    ]
    assert c.problem_of(made) is None
    asked: list[str] = []
    c.gsm8k_conversation(GSM8K, lambda code: (asked.append(code), "7")[1])
    assert asked == ["48/2", "24*2.50"]
    problem = c.gsm8k_problem(GSM8K)
    assert problem["answer"] == "1060" and problem["messages"] == [c.user("How many?")]


def test_gsm8k_in_steps_is_its_calculations_alone() -> None:
    made = c.gsm8k_conversation(GSM8K, solutions="steps")
    assert made["messages"][1]["content"] == [
        {"type": "python", "text": "48/2"},
        {"type": "output", "text": "24"},
        {"type": "python", "text": "24*2.50"},
        {"type": "output", "text": "60"},
        {"type": "text", "text": "#### 1,060"},
    ]
    assert made["messages"][0] == c.gsm8k_conversation(GSM8K)["messages"][0]
    assert c.problem_of(made) is None


def test_in_steps_those_that_calculate_nothing_are_left_out(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "Think.\n#### 3"} for i in range(50)]
    rows += [{"question": f"{i}!", "answer": "So <<1+2=3>>3.\n#### 3"} for i in range(50)]
    (tmp_path / "gsm8k").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k" / "train.jsonl").write_text(text)
    whole = c.chat_sources(local(tmp_path), "mid")["gsm8k"]
    steps = c.chat_sources(local(tmp_path), "mid", solutions="steps")["gsm8k"]
    asked = [row["messages"][0]["content"] for row in steps]
    assert len(whole) == 98 and asked and all(question.endswith("!") for question in asked)
    assert set(asked) == {q for row in whole if (q := row["messages"][0]["content"]).endswith("!")}


def test_chats_with_long_replies_may_be_left_out(tmp_path: Path) -> None:
    replies = {f"question {i}": "x" * i for i in range(1, 101)}
    (tmp_path / "sft").mkdir()
    lines = [json.dumps(chat(asked, said)) + "\n" for asked, said in replies.items()]
    (tmp_path / "sft" / "talk.jsonl").write_text("".join(lines))
    every = c.chat_sources(local(tmp_path), "mid")["chat"][:]
    short = c.chat_sources(local(tmp_path), "mid", longest_reply=30)["chat"][:]
    longest = max(len(row["messages"][1]["content"]) for row in short)
    assert longest <= 30 < len(every) and len(short) > 25
    assert [row for row in every if row in short] == sorted(short, key=every.index)
    with pytest.raises(UserError, match="longest_reply"):
        c.chat_sources(local(tmp_path), "mid", longest_reply=0)


@needs_data
def test_every_calculator_mark_of_gsm8k_is_what_the_tool_answers() -> None:
    rows = TaskData(SHARED, use_hub=False).rows("gsm8k/train")
    assert rows is not None
    count = 0
    for row in rows:
        real = c.gsm8k_conversation(row, arithmetic.evaluate)["messages"][1]["content"]
        assert real == c.gsm8k_conversation(row)["messages"][1]["content"]
        count += sum(part["type"] == "python" for part in real)
    assert count > 20_000


def test_plain_numbers() -> None:
    for text, plain in (("2.50", "2.5"), ("10.0", "10"), (".5", "0.5"), ("3", "3"), ("x", "x")):
        assert c.plain_number(text) == plain


def test_multiple_choice_in_nanochats_words() -> None:
    made = c.choice_conversation("arc", "Which is wet?", ["fire", "water"], 1)
    assert made["messages"][0]["content"] == (
        "Multiple Choice question: Which is wet?\n- fire=A\n- water=B\n\n"
        "Respond only with the letter of the correct answer."
    )
    assert made["messages"][1]["content"] == "B"


def test_every_shape_of_multiple_choice_row() -> None:
    boolq = {"passage": "Rain is wet.", "question": "is rain wet", "answer": True}
    assert c.mc_parts(boolq) == ("Rain is wet.\nIs rain wet?", ["no", "yes"], 1)
    piqa = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}
    assert c.mc_parts(piqa) == ("g", ["a", "b"], 1)
    winogrande = {"sentence": "s _", "option1": "a", "option2": "b", "answer": "1"}
    assert c.mc_parts(winogrande) == ("s _", ["a", "b"], 0)
    mmlu = {"question": "q", "choices": ["a", "b"], "answer": 1, "subject": "s"}
    assert c.mc_parts(mmlu) == ("q", ["a", "b"], 1)


# ------------------------------------------------------------------------------------- user files


TOOL_TURN = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "python", "arguments": '{"code": "2+2"}'}}],
        },
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": [{"type": "text", "text": "4"}]},
    ]
}


def test_a_good_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", [chat("a", "b"), "", TOOL_TURN])
    assert c.check_file(path) == []
    rows = c.read_conversations(path)
    assert len(rows) == 2 and rows[1] == TOOL_TURN and rows[:1][0] == chat("a", "b")


BAD = [
    ("{", "not valid JSON"),
    ([1], "a JSON list, not an object"),
    ({"message": []}, "no field `messages`; is it 'message'?"),
    ({"text": "x"}, "no field `messages`"),
    ({"messages": []}, "at least one message"),
    ({"messages": ["x"]}, "message 1: a JSON str"),
    ({"messages": [{"role": "human", "content": "x"}]}, "message 1: role 'human'"),
    (chat("a"), "the last message must be the assistant's"),
    (chat("a", "b", "c"), "the last message must be the assistant's"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must follow a user's"),
    ({"messages": [c.user("a"), c.user("b")]}, "message 2: two user messages in a row"),
    (chat("a", " "), "message 2: empty content"),
    ({"messages": [c.user("a"), {"role": "assistant"}]}, "message 2: no content"),
    ({"messages": [c.user("a"), {"role": "assistant", "content": 5}]}, "a string or a list"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "string `text`"),
    ({"messages": [c.user("a"), {"role": "tool", "content": "x"}]}, "must follow an assistant"),
    ({"messages": [c.user("a"), {"role": "system", "content": "x"}]}, "must come first"),
    ({"messages": [c.user("a"), {"role": "assistant", "tool_calls": [{}]}]}, "function.name"),
    ({"messages": [*TOOL_TURN["messages"][:3], c.user("x")]}, "have no tool message"),
]


@pytest.mark.parametrize(("row", "problem"), BAD)
def test_what_is_wrong_is_said_line_by_line(tmp_path: Path, row: Any, problem: str) -> None:
    path = write(tmp_path / "a.jsonl", [chat("a", "b"), row, chat("c", "d")])
    (found,) = c.check_file(path)
    assert found.startswith("line 2: ") and problem in found
    with pytest.raises(UserError) as caught:
        c.read_conversations(path)
    assert "a.jsonl:2" in caught.value.what and problem in caught.value.why


def test_files_that_hold_nothing_or_cannot_be_read(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    assert c.check_file(empty) == ["the file holds no conversation"]
    with pytest.raises(UserError, match="holds no conversation"):
        c.read_conversations(empty)
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": "\xff"}\n')
    assert c.check_file(tmp_path / "a.jsonl") == ["line 1: not valid UTF-8 at byte 15"]
    for bad in (tmp_path, tmp_path / "nothing.jsonl", tmp_path / "a.txt"):
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(UserError):
            c.check_file(bad)


# -------------------------------------------------------------------------------- what stages get


def test_sources_of_a_stage(root: Path) -> None:
    data = local(root)
    found = c.chat_sources(data, "mid")
    assert set(found) == {"chat", "gsm8k", "arc", "mc"}
    for kind, rows in found.items():
        for row in [*rows[:3], rows[-1]]:
            assert c.problem_of(row) is None and row["kind"] == kind
    assert "Vicuna" not in json.dumps(found["chat"][:])
    assert "endoftext" not in json.dumps(found["chat"][:])
    assert data.missing()[-1] == f"mmlu/auxiliary_train.jsonl.gz is not under {root}"
    assert len(data.missing()) == 2  # and arc_challenge_train
    assert "sft/small_talk.jsonl.gz" in [name for name, _, _ in data.manifest()]
    weights = c.default_weights("mid", list(found))
    assert set(weights) == set(found) and abs(sum(weights.values()) - 1) < 1e-9


def test_the_order_is_shuffled_and_fixed(root: Path) -> None:
    one = c.chat_sources(local(root), "mid")["gsm8k"][:]
    two = c.chat_sources(local(root), "mid")["gsm8k"][:]
    sft = c.chat_sources(local(root), "sft")["gsm8k"][:]
    names = [row["messages"][0]["content"] for row in one]
    assert one == two and one != sft and names != sorted(names)


def test_train_and_validation_share_nothing_in_any_stage(root: Path) -> None:
    val: dict[str, set[str]] = {}
    for stage in ("mid", "sft"):
        train = c.chat_sources(local(root), stage)
        held = c.chat_sources(local(root), stage, split="val")
        for kind in ("chat", "gsm8k"):
            seen = {row["messages"][0]["content"] for row in train[kind]}
            kept = {row["messages"][0]["content"] for row in held[kind]}
            assert kept and not seen & kept, (stage, kind)
            assert val.setdefault(kind, kept) == kept
    problems = {p["messages"][0]["content"] for p in c.gsm8k_problems(local(root))}
    held = {p["messages"][0]["content"] for p in c.gsm8k_problems(local(root), split="val")}
    assert held == val["gsm8k"] and not problems & held and len(problems) + len(held) == 100


def test_sft_leaves_task_collections_out(root: Path) -> None:
    assert c.chat_names(local(root), "mid") == ["sft/small_talk", "sft/t0_p3_sample"]
    assert c.chat_names(local(root), "sft") == ["sft/small_talk"]


class TinyWorld:
    def kinds(self, stage: str) -> dict[str, float]:
        return {"identity": 0.5, "facts": 0.5}

    def conversation(self, stage: str, kind: str, index: int) -> dict[str, Any]:
        return {"kind": kind, **chat(f"{kind} {index}", "I am fledge.")}


def test_a_world_completes_the_kinds(root: Path) -> None:
    found = c.chat_sources(local(root), "sft", world=TinyWorld(), world_size=10)
    assert len(found["identity"]) == 10 and "facts" not in found
    assert found["identity"][3]["messages"][0]["content"] == "identity 3"
    held = c.chat_sources(local(root), "sft", split="val", world=TinyWorld(), world_size=10)
    assert held["identity"][0]["messages"][0]["content"] == f"identity {c.WORLD_VAL_OFFSET}"
    with pytest.raises(IndexError):
        found["identity"][10]


def test_without_any_files() -> None:
    data = TaskData(None, use_hub=False) if not os.environ.get("FLEDGE_DATA") else None
    if data is None:
        pytest.skip("FLEDGE_DATA is set")
    assert c.chat_sources(data, "mid") == {}
    assert "neither is set" in data.missing()[0]
    assert c.gsm8k_problems(data) == []


def test_a_root_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.root"):
        TaskData(tmp_path / "nowhere")
    monkeypatch.setenv("FLEDGE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="FLEDGE_DATA"):
        TaskData()


def test_the_hub_is_asked_once_when_it_does_not_answer(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []
    monkeypatch.setattr("fledge.data.hub.reachable", lambda: asked.append(1) or False)
    data = TaskData(root)
    assert data.rows("mmlu/test") is None and data.rows("humaneval/HumanEval") is None
    assert len(asked) == 1
    assert "cais/mmlu on the hub: the hub is not reachable" in data.missing()[0]


def test_rows_are_held_compactly() -> None:
    rows = JsonRows.of(iter([{"a": "é"}, {"a": 2}]))
    assert list(rows) == [{"a": "é"}, {"a": 2}] and list(rows[1:]) == [{"a": 2}]


@needs_data
def test_the_shared_data() -> None:
    from fledge.sandbox.arithmetic import evaluate

    data = TaskData(SHARED, use_hub=False)
    found = c.chat_sources(data, "sft", calculator=evaluate)
    assert len(found["gsm8k"]) + len(c.gsm8k_problems(data, split="val")) == 7473
    assert 2000 < len(found["arc"]) <= 3370 and len(found["mc"]) > 70_000
    assert 100 < len(c.held_out_chats(data)) < 2000
    for rows in found.values():
        for row in rows[:200]:
            assert c.problem_of(row) is None
    for row in found["gsm8k"][:500]:  # the tool says what the text goes on with
        for part in row["messages"][1]["content"]:
            assert part["text"]
