"""Worlds: the same bytes everywhere, honest exams, a true bound."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from fledge.data.worlds import World, load_world
from fledge.data.worlds.audit import BASELINE_LIMIT, audit
from fledge.data.worlds.exams import SIZES
from fledge.data.worlds.make import make_world
from fledge.data.worlds.problems import is_exam_expression
from fledge.data.worlds.spelling import is_exam_word
from fledge.data.worlds.tables import fill
from fledge.errors import UserError

# Change these only together with world.GENERATOR_VERSION.
STORED = {
    "train": "4ce9b565bdac4a0f",
    "val": "148822763bae3db7",
    "mid": "1409d669beb0585b",
    "sft": "8bc4895a83549693",
    "rl": "7256bf9445636d26",
    "world_facts": "791984283df2045c",
    "world_mc": "88e3869188595e03",
    "world_math": "c15b7d6db25b108f",
    "world_spell": "2c85e75f7b7f0def",
    "world_chat": "f16d795dc12a7449",
}


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def _digests(world: World) -> dict[str, str]:
    found = {
        "train": _sha([world.document("train", i).text for i in range(200)]),
        "val": _sha([world.document("val", i).text for i in range(50)]),
        "mid": _sha([world.mixed("mid", i) for i in range(200)]),
        "sft": _sha([world.mixed("sft", i) for i in range(200)]),
        "rl": _sha([world.problem(i) for i in range(50)]),
    }
    return found | {task: _sha(world.exam(task)) for task in SIZES}


def test_the_bytes_are_those_of_every_other_machine(village: World) -> None:
    assert _digests(village) == STORED


def test_items_are_random_access_and_splits_differ(village: World) -> None:
    again = load_world("village", 7)
    assert again.document("train", 123) == village.document("train", 123)
    assert again.document("train", 123) != village.document("val", 123)
    assert again.conversation("sft", "chat", 9) == village.conversation("sft", "chat", 9)
    other = load_world("village", 8)
    assert other.document("train", 123).text != village.document("train", 123).text


def test_another_seed_shares_no_villager(village: World) -> None:
    names = {fact.entity for fact in village.facts}
    for seed in range(5):
        others = {fact.entity for fact in load_world("village", seed).facts}
        assert len(names & others) <= 2
    assert len(village.facts) >= 1200 and len(names) >= 240


def test_the_bound_is_neither_tiny_nor_noise(village: World) -> None:
    bound = village.entropy_per_byte(n_documents=1000)
    assert 0.40 < bound < 0.7
    sizes = [len(village.document("train", i).text.encode()) for i in range(500)]
    assert max(sizes) <= 1300 and min(sizes) >= 20
    assert "<|" not in "".join(village.document("train", i).text for i in range(500))


def test_split_holds_out_three_tenths_of_every_relation(village: World) -> None:
    by_relation: dict[str, list[bool]] = defaultdict(list)
    by_entity: dict[str, list[bool]] = defaultdict(list)
    for fact in village.facts:
        by_relation[fact.relation].append(fact.asked)
        by_entity[fact.entity].append(fact.asked)
    for asked in by_relation.values():
        assert 0.65 < sum(asked) / len(asked) < 0.75
    assert all(any(asked) for asked in by_entity.values())


def test_facts_that_mirror_each_other_share_one_fate(tmp_path: Path) -> None:
    lines = ["name,partner"] + [f"A{i},B{i}" for i in range(20)] + [f"B{i},A{i}" for i in range(20)]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    fate: dict[frozenset[str], set[bool]] = defaultdict(set)
    for fact in load_world(str(path), 0).facts:
        fate[frozenset((fact.entity, fact.value))].add(fact.asked)
    assert all(len(found) == 1 for found in fate.values())
    assert {True} in fate.values() and {False} in fate.values()


def test_exams_do_not_leak_and_cannot_be_guessed(village: World) -> None:
    found = audit(village, n_conversations=400, n_documents=9000, n_questions=150)
    assert found.leaks == []
    assert found.unstated == []
    for shares in (found.nearest, found.majority):
        for task in ("world_facts", "world_math", "world_spell"):
            assert shares[task] <= BASELINE_LIMIT, (task, shares)
    assert found.top_answer["world_facts"] <= 0.10
    assert found.top_answer["world_math"] <= 0.02
    assert found.answer_bits >= 3


def test_an_audit_finds_a_planted_leak(village: World, monkeypatch: pytest.MonkeyPatch) -> None:
    item = village.exam("world_facts")[0]
    (fact,) = [f for f in village.facts if f.id == item["fact"]]
    statement = village.prose.tables[fact.table].relations[fact.relation].statements[0]
    canonical = statement.format(e=fact.entity, v=fact.value, E=fact.entity, V=fact.value)
    planted = {
        "kind": "facts",
        "messages": [*item["messages"], {"role": "assistant", "content": canonical}],
    }
    monkeypatch.setattr(village, "conversation", lambda *_: planted)
    monkeypatch.setattr(village, "kinds", lambda _: {"facts": 1.0})
    from fledge.data.worlds.audit import leaks

    assert len(list(leaks(village, n_conversations=1))) == 4  # asked and stated, in mid and sft


def test_exam_sizes_and_shapes(village: World) -> None:
    for task, size in SIZES.items():
        items = village.exam(task)
        assert len(items) == size
        assert len({item["id"] for item in items}) == size
        for item in items:
            assert item["messages"][-1]["role"] == "user"
            assert isinstance(item["answer"], str) and item["answer"]
            assert not set(item.get("rivals", ())) & set(item.get("accept", ()))
    letters = Counter(item["answer"] for item in village.exam("world_mc"))
    assert set(letters) == set("ABCD") and max(letters.values()) <= 75
    for item in village.exam("world_mc"):
        assert len(set(item["choices"])) == 4
    assert village.notes() == []


def test_problems_are_right(village: World) -> None:
    problems = [village.problem(index) for index in range(300)]
    spelling = [p for p in problems if p["kind"] == "spell"]
    assert 50 <= len(spelling) <= 100
    for problem in spelling:
        word = problem["answer"].replace("-", "")
        assert not is_exam_word(word)
        assert f'"{word}"' in problem["messages"][0]["content"]
    for problem in problems:
        if problem["kind"] == "spell":
            continue
        assert not is_exam_expression(problem["expression"])
        assert str(_calculate(problem["expression"])) == problem["answer"]
        text = problem["messages"][0]["content"]
        numbers = "".join(c if c.isdigit() else " " for c in problem["expression"]).split()
        assert [w for w in _numbers(text) if w in numbers] == numbers, (text, numbers)


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def _calculate(expression: str) -> int:
    import ast
    from fractions import Fraction

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int)
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        return left * right if isinstance(node.op, ast.Mult) else left / right

    result = value(ast.parse(expression, mode="eval").body)
    assert result.denominator == 1 and result >= 0
    return int(result)


def test_chat_formats(village: World) -> None:
    mc = village.conversation("sft", "mc", 0)["messages"]
    assert mc[0]["content"].endswith("\nAnswer with the letter.")
    assert mc[0]["content"].count("\n- ") == 4
    assert mc[1]["content"].split("\n")[1][:-1] == "Answer: "
    math = village.conversation("sft", "math", 0)["messages"][-1]["content"]
    assert [part["type"] for part in math] == ["python", "output", "text"]
    assert math[2]["text"] == f"The answer is {math[1]['text']}."
    for stage in ("mid", "sft"):
        weights = village.kinds(stage)
        assert sum(weights.values()) == pytest.approx(1)
        for kind in weights:
            for index in range(50):
                item = village.conversation(stage, kind, index)
                roles = [m["role"] for m in item["messages"] if m["role"] != "system"]
                assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_a_users_table_makes_a_world_with_small_exams(table: Path, tmp_path: Path) -> None:
    summary = make_world(str(table), 1, tmp_path / "out", n_documents=40, n_conversations=60)
    assert summary["facts"] == 40 and 0 < summary["lines"]["exams/world_facts.jsonl"] <= 12
    assert any("world_facts" in note for note in summary["notes"])
    names = sorted(
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")
    )
    assert "world.json" in names and "exams/world_math.jsonl" in names
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    first = (tmp_path / "out" / "sft.jsonl").read_bytes()
    make_world(str(table), 1, tmp_path / "again", n_documents=40, n_conversations=60)
    assert (tmp_path / "again" / "sft.jsonl").read_bytes() == first
    with pytest.raises(UserError, match="exists already"):
        make_world(str(table), 1, tmp_path / "out", n_documents=1, n_conversations=1)


def test_braces_in_values_stay() -> None:
    assert fill("The {x} of {e} is {v}.", "{v}", "{e}") == "The {x} of {v} is {e}."


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"name\na\nb\n", "only one column"),
        (b"name,age,Age\na,1,2\n", "two columns"),
        (b"name,\na,1\n", "a column with the name"),
        (b"name,age\na,1\nb,2\n", "holds 2 facts"),
        (b"name,age\n\xff\xfe,1\n", "not UTF-8"),
        (b"name,age\na,1\x00\n", "zero byte"),
        (b"name,age\na,1,2\n", "row 2"),
        (b"name,age\n,1\n", "no entity"),
        (b"name,age\na,1\na,2\n", "twice"),
        (b"name,age\na," + b"x" * 500 + b"\n", "500 characters"),
        (b'name,age\na,"x\n', "not a CSV"),
    ],
)
def test_faults_of_a_table_are_told(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=what):
        load_world(str(path), 0)


def test_missing_tables_and_unknown_worlds_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_world(str(tmp_path / "none.csv"), 0)
    with pytest.raises(UserError, match="no world called"):
        load_world("atlantis", 0)
    with pytest.raises(UserError, match="is a folder"):
        load_world(str(tmp_path), 0)
    with pytest.raises(UserError, match="no exam called"):
        load_world("village", 0).exam("world_dance")
