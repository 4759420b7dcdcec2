"""Proof that the exams are honest: leaks, trivial baselines, entropy of the answers.

An exam is worth something only if training never shows its questions with their answers, if the
prose does state the facts, and if guessing or looking up the nearest training question fails.
Called by the tests and by `fledge data`; never changes a world.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import log, log2
from typing import Any

from fledge.data.worlds.conversations import is_exam_chat
from fledge.data.worlds.problems import is_exam_expression
from fledge.data.worlds.spelling import is_exam_word
from fledge.data.worlds.tables import Fact, fill
from fledge.data.worlds.world import World

BASELINE_LIMIT = 0.30


@dataclass(frozen=True)
class Audit:
    """What was found; `leaks` and `unstated` must be empty."""

    leaks: list[str]
    unstated: list[str]
    majority: dict[str, float]  # share that the best constant guess per relation gets
    nearest: dict[str, float]  # share that the nearest training question's answer gets
    top_answer: dict[str, float]  # share of the most frequent answer of the task
    answer_bits: float  # mean entropy of the answers of world_facts within their relation


def audit(world: World, *, n_conversations: int, n_documents: int, n_questions: int) -> Audit:
    """All checks on samples of the given sizes (conversations per kind and stage)."""
    majority, top = {}, {}
    for task in ("world_facts", "world_mc", "world_math", "world_spell"):
        items = world.exam(task)
        majority[task] = majority_share(world, items)
        top[task] = top_share(items)
    nearest = {
        task: nearest_share(world, task, n_conversations=4 * n_conversations, limit=n_questions)
        for task in ("world_facts", "world_math", "world_spell")
    }
    return Audit(
        leaks=list(leaks(world, n_conversations=n_conversations)),
        unstated=unstated(world, n_documents=n_documents),
        majority=majority,
        nearest=nearest,
        top_answer=top,
        answer_bits=answer_bits(world, world.exam("world_facts")),
    )


def training_items(world: World, n: int) -> Iterator[dict[str, Any]]:
    """n conversations of every kind of mid and of sft, and n problems of rl."""
    for stage in ("mid", "sft"):
        for kind in world.kinds(stage):
            for index in range(n):
                yield world.conversation(stage, kind, index)
    for index in range(n):
        yield world.problem(index)


def leaks(world: World, *, n_conversations: int) -> Iterator[str]:
    """A line for everything of the exams that a sample of the training items gives away."""
    held = [fact for fact in world.facts if not fact.asked]
    pairs = {_pair(fact): fact for fact in held}
    for fact in world.facts:
        if fact.asked and _pair(fact) in pairs:
            yield f"{fact.id} is asked and gives {pairs[_pair(fact)].id} away"
    questions, statements = _texts(world, held)
    for item in training_items(world, n_conversations):
        for message in item["messages"]:
            if message["role"] == "user":
                for line in _tails(message["content"].split("\n")[0]):
                    if line in questions:
                        yield f"{item['kind']} asks {questions[line]}: {line}"
            elif message["role"] == "assistant":
                text = message["content"] if isinstance(message["content"], str) else ""
                line = text.split("\n")[0]
                if line in statements:
                    yield f"{item['kind']} states {statements[line]}: {line}"
                yield from _told(line)
        yield from _skill_leaks(item)


def _pair(fact: Fact) -> frozenset[str]:
    return frozenset((fact.entity.casefold(), fact.value.casefold()))


def _texts(world: World, facts: Iterable[Fact]) -> tuple[dict[str, str], dict[str, str]]:
    """Every question wording and every statement wording -> the fact's id."""
    tables = {table.name: table for table in world.tables}
    questions, statements = {}, {}
    for fact in facts:
        relation = tables[fact.table].relations[fact.relation]
        questions |= {fill(q, fact.entity): fact.id for q in relation.questions}
        statements |= {fill(s, fact.entity, fact.value): fact.id for s in relation.statements}
    return questions, statements


def _tails(line: str) -> Iterator[str]:
    """The line, and what follows each possible preface in it."""
    yield line
    for match in re.finditer(r"[.?!:] ", line):
        yield line[match.end() :]


def _told(line: str) -> Iterator[str]:
    match = re.match(r"Your (?:name|favourite \w+) is (.+)\.$", line)
    if match and is_exam_chat(match[1]):
        yield f"chat tells {match[1]!r}, which the exam asks"


def _skill_leaks(item: dict[str, Any]) -> Iterator[str]:
    if item["kind"] in ("spell", "count"):
        for word in re.findall(r'"(\w{2,})"', item["messages"][0]["content"]):
            if is_exam_word(word):
                yield f"{item['kind']} uses the exam's word {word}"
    if item["kind"] == "math":
        expression = item.get("expression") or item["messages"][-1]["content"][0]["text"]
        if is_exam_expression(expression):
            yield f"math uses the exam's expression {expression}"


def unstated(world: World, *, n_documents: int) -> list[str]:
    """The ids of the facts that the first n documents state in no wording."""
    prose = "\n".join(world.document("train", i).text for i in range(n_documents))
    tables = {table.name: table for table in world.tables}
    return [
        fact.id
        for fact in world.facts
        if not any(
            fill(s, fact.entity, fact.value) in prose
            for s in tables[fact.table].relations[fact.relation].statements
        )
    ]


def top_share(items: list[dict[str, Any]]) -> float:
    """Share of the most frequent answer."""
    counts = Counter(item["answer"] for item in items)
    return max(counts.values()) / len(items) if items else 0.0


def majority_share(world: World, items: list[dict[str, Any]]) -> float:
    """Score of always giving the most frequent answer of the item's relation (or kind)."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        groups[_group(item)][item["answer"]] += 1
    hits = sum(max(counts.values()) for counts in groups.values())
    return hits / len(items) if items else 0.0


def answer_bits(world: World, items: list[dict[str, Any]]) -> float:
    """Mean over items of the entropy of the answers of the item's relation, in bits."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        groups[_group(item)][item["answer"]] += 1
    bits = 0.0
    for counts in groups.values():
        n = sum(counts.values())
        bits -= sum(c * log2(c / n) for c in counts.values())
    return bits / len(items) if items else 0.0


def _group(item: dict[str, Any]) -> str:
    if "fact" in item and item["kind"] != "mc":
        table, _, rest = item["fact"].partition("/")
        return table + "/" + rest.rpartition("/")[2]
    return item["kind"]


def nearest_share(world: World, task: str, *, n_conversations: int, limit: int) -> float:
    """Score of answering with the answer of the nearest training question (BM25)."""
    kinds = {"world_facts": ("facts",), "world_math": ("math",), "world_spell": ("spell", "count")}
    known = [
        world.conversation("sft", kind, index)
        for kind in kinds[task]
        for index in range(n_conversations)
    ]
    index = BM25([item["messages"][-2]["content"] for item in known])
    items = world.exam(task)[:limit]
    hits = 0
    for item in items:
        found = index.nearest(item["messages"][-1]["content"])
        content = known[found]["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        hits += bool(re.search(rf"(?<![\w-]){re.escape(item['answer'])}(?![\w-])", text))
    return hits / len(items) if items else 0.0


class BM25:
    """Okapi BM25 (Robertson and Zaragoza 2009, k1 = 1.2, b = 0.75) over short texts."""

    def __init__(self, texts: list[str]) -> None:
        words = [self._words(text) for text in texts]
        mean = sum(map(len, words)) / len(words)
        self._size = len(words)
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for number, found in enumerate(words):
            for word, count in Counter(found).items():
                norm = 1.2 * (0.25 + 0.75 * len(found) / mean)
                self._postings[word].append((number, count * 2.2 / (count + norm)))

    def nearest(self, text: str) -> int:
        """The number of the text that fits best (the first of equals)."""
        scores: dict[int, float] = defaultdict(float)
        for word in set(self._words(text)):
            postings = self._postings.get(word, ())
            rarity = log(1 + (self._size - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, weight in postings:
                scores[number] += rarity * weight
        if not scores:
            return 0
        return heapq.nsmallest(1, scores, key=lambda number: (-scores[number], number))[0]

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())
