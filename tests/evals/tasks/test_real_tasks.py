"""The real tasks: prompts, answers and the graders' judgement of tricky replies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fledge.data.task_files import TaskData
from fledge.errors import UserError
from fledge.evals.tasks.arc import arc
from fledge.evals.tasks.chat import Chat, repeated_share
from fledge.evals.tasks.gsm8k import Gsm8k, answer_of
from fledge.evals.tasks.humaneval import HumanEval, code_of, program
from fledge.evals.tasks.mmlu import mmlu
from fledge.evals.tasks.registry import TASKS, find_tasks
from fledge.sandbox.interpreter import Interpreter, Limits
from fledge.sandbox.process import CPython
from fledge.sandbox.process import Limits as TimeLimits

SHARED = Path(os.environ.get("FLEDGE_DATA") or Path(__file__).parents[4] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (SHARED / "gsm8k").is_dir(), reason=f"no task files under {SHARED} (set FLEDGE_DATA)"
)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("#### 1080", True),
        ("#### 1,080", True),
        ("####1080", True),
        ("#### $1,080.00", True),
        ("#### 1080.", True),
        ("She earns 1,080 dollars.", True),
        ("first 5, then 1080", True),
        ("#### 1080\n#### 7", True),  # the first mark counts
        ("The answer is 1080.0", True),
        ("#### -1080", False),
        ("#### 108", False),
        ("#### 1081 so 1080 is wrong", False),
        ("1080 clips, or 12", False),
        ("####", False),
        ("", False),
        ("no number", False),
    ],
)
def test_gsm8k_grades_the_final_number(reply: str, right: bool) -> None:
    task = Gsm8k([{"question": "How many?", "answer": "x = <<540*2=1080>>1080\n#### 1,080"}])
    (item,) = task.items()
    assert (item["id"], item["answer"]) == ("gsm8k/0", "1080")
    assert item["messages"] == [{"role": "user", "content": "How many?"}]
    assert task.grade(item, reply) is right


def test_answer_of_nothing_is_none() -> None:
    assert answer_of("none") is None
    assert answer_of("#### none, but 3") == "3"


def test_letter_tasks() -> None:
    row = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "art"}
    task = mmlu([row])
    (item,) = task.items()
    assert (task.name, task.kind, task.chance, task.max_new_tokens) == ("mmlu", "choice", 0.25, 1)
    assert (item["id"], item["answer"], item["letters"]) == ("mmlu/0/art", "C", list("ABCD"))
    assert "- c=C\n" in item["messages"][0]["content"]
    assert task.grade(item, "C") and task.grade(item, " C\n") and not task.grade(item, "B")
    five = {"id": "q", "question": "?", "choices": list("vwxyz"), "gold": 4}
    three = {"id": "r", "question": "?", "choices": list("xyz"), "gold": 0}
    levels = arc("easy", [five, three])
    assert levels.name == "arc_easy" and abs(levels.chance - (1 / 5 + 1 / 3) / 2) < 1e-12
    assert [i["letters"] for i in levels.items()] == [list("ABCDE"), list("ABC")]


def test_chat_grades_the_form() -> None:
    conversation = {"messages": [{"role": "user", "content": "How are you?"}, {"content": "Well."}]}
    too_long = {"messages": [{"role": "user", "content": "x" * 1000}, {"content": "y"}]}
    task = Chat([conversation, too_long])
    (item,) = task.items()
    assert item["answer"] == "Well."
    assert task.grade(item, "I am well, thank you.")
    for bad in ("", "  ", "How are you?", "how are you? ", "the cat sat on " * 9):
        assert not task.grade(item, bad)
    assert repeated_share("a b c") == 0.0 and repeated_share("a a a a a a") > 0.5


PROBLEM = {
    "task_id": "HumanEval/x",
    "prompt": 'import math\nfrom typing import List\n\n\ndef root(x: int):\n    """Root."""\n',
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(9) == 3\n    assert candidate(0) == 0\n",
}


@pytest.fixture(scope="module")
def humaneval() -> Iterator[HumanEval]:
    pytest.importorskip("pydantic_monty", reason="pydantic-monty is not installed")
    with HumanEval([PROBLEM], interpreter=Interpreter(Limits(seconds=0.3), workers=1)) as task:
        assert task.why_unavailable() is None
        yield task


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("    return math.sqrt(x)", True),
        ("return math.sqrt(x)", True),  # replies arrive stripped
        ("y = math.sqrt(x)\n    return y", True),
        ("def root(x):\n    return math.sqrt(x)", True),
        ("Sure!\n```python\ndef root(x):\n    return x ** 0.5\n```\nDone.", True),
        ("```\nimport math\ndef root(x): return math.sqrt(x)\n```", True),
        ("```python\ndef root(x):\n    return x ** 0.5\n", True),  # cut before the fence closes
        ("```python\ndef other(x):\n    return 1\n```", False),
        ("    return 1", False),
        ("    while True: pass", False),
        ("I cannot.", False),
        ("", False),
        ("def root(x):\n    raise SystemExit", False),
    ],
)
def test_humaneval_runs_the_code(humaneval: HumanEval, reply: str, right: bool) -> None:
    (item,) = humaneval.items()
    assert humaneval.grade(item, reply) is right


def test_a_program_may_not_pass_by_printing_or_redefining_check(humaneval: HumanEval) -> None:
    (item,) = humaneval.items()
    assert not humaneval.grade(item, "def check(f): pass\ndef root(x): return 5")
    assert program(item, "def root(x): return 5").count("def check") == 1
    assert code_of("text only") == "text only"


def test_find_tasks_says_what_is_missing(tmp_path: Path) -> None:
    tasks, notes = find_tasks(TaskData(tmp_path, use_hub=False))
    assert tasks == [] and len(notes) == len(TASKS)
    assert notes[0] == (
        "arc_easy is left out: arc/arc_easy_test.jsonl.gz is not under " + str(tmp_path)
    )
    with pytest.raises(UserError, match="did you mean gsm8k"):
        find_tasks(TaskData(tmp_path, use_hub=False), ["gsm8"])


@needs_data
def test_the_shared_data() -> None:
    tasks, notes = find_tasks(TaskData(SHARED, use_hub=False))
    assert [t.name for t in tasks] == list(TASKS) and notes == []
    sizes = {t.name: len(t.items()) for t in tasks}
    assert sizes["gsm8k"] == 1319 and sizes["mmlu"] == 14042 and sizes["humaneval"] == 164
    assert sizes["arc_easy"] == 2376 and sizes["arc_challenge"] == 1172 and sizes["chat"] >= 100
    for task in tasks:
        items = task.items()
        assert len({item["id"] for item in items}) == len(items), task.name
        if task.kind == "choice":
            assert all(item["answer"] in item["letters"] for item in items)
        if task.name != "chat":  # a file's own reply may be a poor one
            assert all(task.grade(item, item["answer"]) for item in items[:20]), task.name
        wrong = "wrong"
        assert task.name == "chat" or not any(task.grade(item, wrong) for item in items[:20])
    for task in tasks:
        if isinstance(task, HumanEval):
            task.close()


def test_humaneval_runs_in_cpython_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with HumanEval([PROBLEM]) as task:
        note, (item,) = task.note, task.items()
        assert note == "run in CPython" or str(note).startswith("run in Monty, not CPython: ")
        if task.why_unavailable() is None:
            assert task.grade(item, item["answer"]) and not task.grade(item, "return 5")
    monkeypatch.setattr(CPython, "why_unavailable", lambda self: "the kernel has no Landlock")
    with HumanEval([PROBLEM]) as task:
        assert task.note == "run in Monty, not CPython: the kernel has no Landlock"


@needs_data
@pytest.mark.parametrize("layer", ["L1", "L2"])
def test_the_canonical_solutions_pass_in_both_sandboxes(layer: str) -> None:
    rows = TaskData(SHARED, use_hub=False).rows("humaneval/HumanEval")
    if not rows:
        pytest.skip(f"no HumanEval under {SHARED}")
    sandbox = (
        Interpreter(Limits(seconds=30.0)) if layer == "L1" else CPython(TimeLimits(seconds=30))
    )
    with HumanEval(rows, interpreter=sandbox) as task, ThreadPoolExecutor(2) as threads:
        reason = task.why_unavailable()
        if reason is not None:
            pytest.skip(f"{layer} is off here: {reason}")
        results = list(threads.map(lambda item: task.run(item, item["answer"]), task.items()))
    assert len(results) == 164
    assert sum(result.ok for result in results) >= 160, [r.error for r in results if not r.ok]
