"""The exams of a world: fixed items per (world, seed) that no training conversation contains.

Facts are held-out ones; word problems use unseen operands; words are unseen; told names and
favourites are told nowhere else. Called by `world.World.exam`; grading lives in fledge.evals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fledge.data.worlds.choices import Choices
from fledge.data.worlds.conversations import (
    ASK_NAME,
    COUNT,
    FAVOURITES,
    LETTERS,
    MIN_OPTIONS,
    SPELL,
    ConversationMaker,
    Message,
    ask_favourite,
    favourite_turns,
    is_exam_chat,
    mc_reply,
    mc_text,
    name_turns,
    system,
    user,
)
from fledge.data.worlds.problems import make_problem
from fledge.data.worlds.spelling import is_exam_word, spelled
from fledge.data.worlds.tables import Fact

SIZES = {
    "world_facts": 400,
    "world_mc": 300,
    "world_math": 1000,
    "world_spell": 300,
    "world_chat": 200,
}
MIN_VALUES = 8  # a relation with fewer different values is in no exam
MAX_SHARE = 0.10  # of one answer in facts
MAX_MATH_SHARE = 0.02
COUNT_SHARE = 0.12
Item = dict[str, Any]


class ExamMaker:
    """Builds the exams; `key` fixes every draw."""

    def __init__(self, maker: ConversationMaker, key: str) -> None:
        self.maker = maker
        self.key = key
        self._tasks: dict[str, Callable[[Choices], list[Item]]] = {
            "world_facts": self._facts,
            "world_mc": self._mc,
            "world_math": self._math,
            "world_spell": self._spell,
            "world_chat": self._chat,
        }

    def make(self, task: str) -> list[Item]:
        """The items of a task.

        Each has id, kind, messages (the last is the user's), answer, choices (None but in mc);
        facts and chat add accept (right strings) and rivals (other answers of that relation, none
        of which a right answer holds); mc adds the replies that would choose each letter; math
        adds expression; fact names the fact.
        """
        items = self._tasks[task](Choices(f"{self.key}|exam|{task}"))
        for number, item in enumerate(items):
            item["id"] = f"{task}-{number:04d}"
        return items

    def held_out(self) -> list[Fact]:
        """Held-out facts of relations with enough different values to make guessing hopeless."""
        facts = self.maker.prose.facts
        return [f for f in facts if not f.asked and len(self.maker.values_like(f)) >= MIN_VALUES]

    def _facts(self, choices: Choices) -> list[Item]:
        items = []
        for fact in capped(choices.shuffle(self.held_out()), SIZES["world_facts"]):
            items.append(
                {
                    "kind": "facts",
                    "messages": [user(self.maker.question(choices, fact))],
                    "answer": fact.value,
                    "accept": accepted(fact.value),
                    "rivals": self._rivals(fact),
                    "choices": None,
                    "fact": fact.id,
                }
            )
        return items

    def _rivals(self, fact: Fact) -> list[str]:
        """Other values of the relation that do not stand inside the right answer or the entity."""
        sentence = f"{fact.entity} {self.maker.reply(fact)}".casefold()
        return [v for v in self.maker.values_like(fact) if v.casefold() not in sentence]

    def _mc(self, choices: Choices) -> list[Item]:
        facts = [f for f in self.held_out() if len(self.maker.values_like(f)) >= MIN_OPTIONS]
        facts = capped(choices.shuffle(facts), SIZES["world_mc"])
        letters = choices.shuffle([LETTERS[i % 4] for i in range(len(facts))])
        items = []
        for fact, letter in zip(facts, letters, strict=True):
            options = self.maker.options(choices, fact, letter)
            text = mc_text(self.maker.question(choices, fact), options)
            items.append(
                {
                    "kind": "mc",
                    "messages": [user(text)],
                    "answer": letter,
                    "choices": options,
                    "replies": [
                        mc_reply(self.maker.reply(replace(fact, value=option)), choice)
                        for option, choice in zip(options, LETTERS, strict=True)
                    ],
                    "fact": fact.id,
                }
            )
        return items

    def _math(self, choices: Choices) -> list[Item]:
        size = SIZES["world_math"]
        answers: Counter[int] = Counter()
        seen: set[str] = set()
        items = []
        while len(items) < size:
            problem = make_problem(choices, self.maker.lexicon, "exam")
            if problem.expression in seen or answers[problem.answer] + 1 > MAX_MATH_SHARE * size:
                continue
            seen.add(problem.expression)
            answers[problem.answer] += 1
            items.append(
                {
                    "kind": "math",
                    "messages": [user(problem.text)],
                    "answer": str(problem.answer),
                    "choices": None,
                    "expression": problem.expression,
                }
            )
        return items

    def _spell(self, choices: Choices) -> list[Item]:
        size = SIZES["world_spell"]
        real = self.maker.lexicon.exam_words
        words = choices.sample(real, min(len(real), size))
        taken = set(words)
        while len(words) < size:  # a world without enough real words is examined on made-up ones
            word = self.maker.lexicon.syllables.word(choices)
            if is_exam_word(word) and word not in taken:
                taken.add(word)
                words.append(word)
        counted = round(COUNT_SHARE * size)
        items = []
        for number, word in enumerate(choices.shuffle(words)):
            if number < counted:
                letter = choices.choice(word)
                text = choices.choice(COUNT).format(letter=letter, word=word)
                kind, answer = "count", str(word.count(letter))
            else:
                text = choices.choice(SPELL).format(word=word)
                kind, answer = "spell", spelled(word)
            items.append(
                {"kind": kind, "messages": [user(text)], "answer": answer, "choices": None}
            )
        return choices.shuffle(items)

    def _chat(self, choices: Choices) -> list[Item]:
        size = SIZES["world_chat"]
        held = capped(choices.shuffle(self.held_out()), size // 2)
        items = [self._follow_up_item(choices, fact) for fact in held]
        people = [p for p in self.maker.lexicon.people if is_exam_chat(p)]
        topics = {
            name: [x for x in options if is_exam_chat(x)] for name, options in FAVOURITES.items()
        }
        topics = {name: options for name, options in topics.items() if options}
        while len(items) < size:
            messages = []
            if people and choices.chance(0.5):
                name = choices.choice(people)
                if choices.chance(0.2):
                    messages.append(system(f"You talk with {name}."))
                else:
                    messages += name_turns(choices, name)
                messages += self._interlude(choices)
                messages.append(user(choices.choice(ASK_NAME)))
                answer = name
            else:
                topic = choices.choice(sorted(topics))
                answer = choices.choice(topics[topic])
                messages += favourite_turns(choices, topic, answer)
                messages += self._interlude(choices)
                messages.append(user(ask_favourite(choices, topic, answer)[0]))
            items.append(
                {
                    "kind": "chat",
                    "messages": messages,
                    "answer": answer,
                    "accept": [answer],
                    "choices": None,
                }
            )
        return choices.shuffle(items)

    def _interlude(self, choices: Choices) -> list[Message]:
        return self.maker.ask(choices, choices.choice(self.maker.asked))

    def _follow_up_item(self, choices: Choices, fact: Fact) -> Item:
        return {
            "kind": "chat",
            "messages": self.maker.follow_up(choices, fact)[:-1],
            "answer": fact.value,
            "accept": accepted(fact.value),
            "rivals": self._rivals(fact),
            "choices": None,
            "fact": fact.id,
        }


def accepted(value: str) -> list[str]:
    """The value, and the value without its article."""
    for article in ("the ", "a ", "an "):
        if value.casefold().startswith(article) and len(value) > len(article):
            return [value, value[len(article) :]]
    return [value]


def capped(facts: list[Fact], size: int) -> list[Fact]:
    """At most `size` facts of which no answer makes more than a tenth."""
    facts = facts[:]
    while facts:
        counts = Counter(f.value for f in facts)
        limit = max(1, int(MAX_SHARE * min(size, len(facts))))
        if max(counts.values()) <= limit:
            break
        kept: Counter[str] = Counter()
        fewer = []
        for f in facts:
            kept[f.value] += 1
            if kept[f.value] <= limit:
                fewer.append(f)
        facts = fewer
    return facts[:size] if len(facts) <= size else _balanced(facts, size)


def _balanced(facts: list[Fact], size: int) -> list[Fact]:
    """The first `size` facts without letting an answer pass its share."""
    limit = max(1, int(MAX_SHARE * size))
    counts: Counter[str] = Counter()
    kept = []
    for f in facts:
        if counts[f.value] < limit and len(kept) < size:
            counts[f.value] += 1
            kept.append(f)
    return kept
