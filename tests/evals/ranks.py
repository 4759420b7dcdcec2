"""What `test_ranks` starts in several processes: every kind of exam, shared by the ranks."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge.dist import World, joined
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.evals import chat_quality
from fledge.evals.core import BY_NAME
from fledge.evals.core_exam import examine_core_task
from fledge.evals.examine import score_task

TOKENIZER = tiny_tokenizer()
WORDS = ("plus", "answer", "The", "is", "7", "12")
CORE = ("copa", "winograd", "lambada_openai", "squad")


def core_rows(kind: str, n: int) -> list[dict[str, Any]]:
    draw = random.Random(2)

    def some(k: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, k + 1)))

    if kind == "multiple_choice":
        return [{"query": some(9), "choices": [some(2), some(3)], "gold": 0} for _ in range(n)]
    if kind == "schema":
        options = [
            {"context_options": [some(4), some(3)], "continuation": some(2)} for _ in range(n)
        ]
        return [row | {"gold": 1} for row in options]
    return [{"context": some(9), "continuation": some(2)} for _ in range(n)]


class Exam:
    """One exam of each kind of chat task, with prompts of many lengths."""

    chance, max_new_tokens = 0.25, 24
    letters: ClassVar = ["A", "B", "C", "D"]

    def __init__(self, kind: Literal["choice", "reply", "generate"], n: int) -> None:
        self.kind: Literal["choice", "reply", "generate"] = kind
        self.name, self.n = kind, n

    def items(self) -> list[dict[str, Any]]:
        draw = random.Random(3)
        return [
            {
                "id": f"{self.kind}-{i}",
                "messages": [
                    {"role": "user", "content": " ".join(draw.choices(WORDS, k=1 + i % 17))}
                ],
                "answer": "A",
                "letters": self.letters,
                "replies": ["The answer is 7", "12 plus 7"],
            }
            for i in range(self.n)
        ]

    def grade(self, item: Any, text: str) -> bool:
        return text.startswith("A")


def talk(i: int) -> dict[str, Any]:
    asked = [f"What is {i} plus 2?", "The answer is 7", "12"]
    said = [{"role": "user", "content": text} for text in asked]
    reply = {"role": "assistant", "content": "7"}
    return {"messages": [said[0], reply, said[1], reply, said[2], reply]}


def go(world: World, *, deterministic: bool) -> dict[str, Any]:
    engine = Engine(tiny_model(TOKENIZER.vocab_size), TOKENIZER, deterministic=deterministic)
    found: dict[str, Any] = {}
    for name in CORE:
        task = BY_NAME[name]
        rows = core_rows(task.kind, 300)  # a chunk and a part of one
        result = examine_core_task(engine, task, rows, deterministic=deterministic, world=world)
        found[result.name] = (result.value, result.low, result.high, result.records)
    with Tools() as tools:
        for exam in (Exam("choice", 300), Exam("reply", 90), Exam("generate", 41)):
            result = score_task(engine, exam, tools, world=world)
            found[exam.name] = (result.value, result.low, result.high, result.records)
        probe = {"messages": [{"role": "user", "content": "is 12?"}], "answer": "7"}
        material = chat_quality.Material([talk(i) for i in range(5)], [probe] * 3, [])
        found["chat"] = chat_quality.examine(engine, tools, material, world)
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined() as world:
        found = {name: go(world, deterministic=name == "same") for name in ("same", "close")}
        torch.save(found, folder / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main()
