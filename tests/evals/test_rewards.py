"""Rewards: what each is worth, mixing them, and one of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers_model import tiny_tokenizer

from fledge.errors import UserError
from fledge.evals import rewards
from fledge.evals.rewards import Reply, Rewards
from fledge.evals.tasks import worlds

TOKENIZER = tiny_tokenizer()


def reply(text: str, *, stopped: bool = True, tokens: int = 8) -> Reply:
    return Reply(text, [{"type": "text", "text": text}], stopped, tokens)


def test_a_reply_is_what_is_said_after_the_tool():
    special = TOKENIZER.special_tokens
    ids = [special["<|python_start|>"], *TOKENIZER.encode("1+1"), special["<|python_end|>"]]
    ids += [special["<|output_start|>"], *TOKENIZER.encode("2"), special["<|output_end|>"]]
    ids += TOKENIZER.encode("The answer is 2.")
    cut = Reply.of(TOKENIZER, ids)
    assert (cut.text, cut.stopped, cut.tokens) == ("The answer is 2.", False, len(ids))
    assert [p["type"] for p in cut.parts] == ["python", "output", "text"]
    assert Reply.of(TOKENIZER, [*ids, TOKENIZER.eos_id]).stopped


@pytest.mark.parametrize(
    ("item", "text", "worth"),
    [
        ({"answer": "1,060"}, "so #### 1060", 1.0),
        ({"answer": 18}, "It is 18.0", 1.0),
        ({"answer": "18"}, "It is 17", 0.0),
        ({"answer": "Paris"}, "The capital is Paris.", 1.0),
        ({"answer": "Paris"}, "Parisian", 0.0),
        ({"answer": "42", "kind": "math"}, "The answer is 42.", 1.0),
        ({"answer": "c-a-t", "kind": "spell"}, "c-a-t.", 1.0),
        ({"answer": "c-a-t", "kind": "spell"}, "c-a-r", 0.0),
    ],
)
def test_answers(item, text, worth):
    assert rewards.answer(item, reply(text)) == worth
    assert rewards.answer(item, reply(text, stopped=False)) == 0.0, "it must end by itself"


def test_the_kinds_of_worlds_are_those_that_are_graded():
    assert set(worlds.KINDS) == set(worlds._GRADERS)


def test_format_stops_and_brief():
    for text in ("We add.\n#### 42", "#### -1,000.5", "The answer is 7 apples."):
        assert rewards.format_({}, reply(text)) == 1.0
    for text in ("42", "#### 42 and more", "The answer is"):
        assert rewards.format_({}, reply(text)) == 0.0
    assert rewards.format_({"pattern": "[a-z]+"}, reply("yes")) == 1.0
    assert rewards.format_({}, reply("#### 1", stopped=False)) == 0.0
    assert rewards.stops({}, reply("x")) == 1.0 and not rewards.stops({}, reply("", stopped=False))
    assert rewards.brief({}, reply("x", tokens=64)) == 0.5


def test_unit_tests_run_in_a_sandbox():
    item = {"tests": "assert double(2) == 4"}
    with Rewards({"tests": 1.0}) as found:
        for code, worth in (("return 2 * n", 1.0), ("return n", 0.0), ("while True: pass", 0.0)):
            text = f"Here it is:\n```python\ndef double(n):\n    {code}\n```"
            assert found.parts(item, reply(text)) == {"tests": worth}
        assert found.parts(item, reply("def double(n): return 2 * n", stopped=False))["tests"] == 0


def test_one_of_ones_own_is_weighed_with_others(tmp_path: Path):
    file = tmp_path / "polite.py"
    file.write_text("def polite(item, reply):\n    return 0.0 if '!' in reply.text else 1.0\n")
    with Rewards({"answer": 1.0, f"{file}:polite": -0.25}) as found:
        assert found.names == ("answer", "polite")
        parts = found.parts({"answer": "4"}, reply("4!"))
        assert parts == {"answer": 1.0, "polite": 0.0} and found.total(parts) == 1.0
        assert found.total(found.parts({"answer": "4"}, reply("4."))) == 0.75
    file.write_text("def polite(item, reply):\n    return float('nan')\n")
    with Rewards({f"{file}:polite": 1.0}) as found, pytest.raises(UserError, match="finite"):
        found.parts({}, reply("x"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("anser", None, "there is no reward called 'anser'"),
        ("none.py:f", None, "there is no file none.py"),
        ("a.py:g", "def f(item, reply): return 1", "has no function g"),
        ("a.py:f", "import nothing_at_all", "ModuleNotFoundError"),
    ],
)
def test_rewards_that_cannot_be(name, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("a.py").write_text(text)
    with pytest.raises(UserError) as caught:
        Rewards({name: 1.0})
    assert said in f"{caught.value.what} {caught.value.why}"


def test_two_rewards_of_one_name_are_refused(tmp_path: Path):
    code = "def answer(item, reply):\n    return 1.0\n"
    paths = [tmp_path / name for name in ("a.py", "b.py")]
    for path in paths:
        path.write_text(code, encoding="utf-8")
    twice = {f"{path}:answer": 1.0 for path in paths}
    for weights in (twice, {"answer": 1.0, f"{paths[0]}:answer": 0.5}):
        with pytest.raises(UserError, match="the same name"):
            Rewards(weights)


def test_problems_that_a_reward_cannot_judge_are_refused_before_training():
    maths = {"messages": [], "answer": "4"}
    code = {"messages": [], "tests": "assert True"}
    with Rewards({"answer": 1.0}) as found:
        found.require(maths)
        found.require({"kind": next(iter(worlds.KINDS))})  # graded by its world
        with pytest.raises(UserError, match="the reward answer needs"):
            found.require(code)
    with Rewards({"tests": 1.0}) as found:
        found.require(code)
        with pytest.raises(UserError, match="the reward tests needs"):
            found.require(maths)


def test_a_reward_that_fails_is_the_users_error(tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text("def broken(item, reply):\n    return item['no such key']\n", encoding="utf-8")
    with (
        Rewards({f"{file}:broken": 1.0}) as found,
        pytest.raises(UserError, match="broken failed") as caught,
    ):
        found.parts({}, reply("x"))
    assert "KeyError" in caught.value.why
