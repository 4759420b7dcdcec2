"""The prose of a world: encyclopaedia entries, lists, stories, sums and spellings, endlessly.

About half of the bytes state facts; the rest is everyday text whose free choices a model cannot
guess, so that the entropy of the corpus is known and not tiny. Every decision goes through
`Choices`. Called by `world.World.document`; never asks a question about a fact.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from fledge.data.worlds.choices import Choices, Weighted, templates
from fledge.data.worlds.problems import make_problem
from fledge.data.worlds.spelling import spelled
from fledge.data.worlds.tables import Fact, Table, capital, fill
from fledge.data.worlds.vocabulary import ADJECTIVES, ANIMALS, COLOURS, FEELINGS, Lexicon

KINDS = {  # share of the documents
    "entry": 0.15,  # one entity or a few, several facts each
    "list": 0.16,  # one relation, several entities
    "told": 0.15,  # a story in which facts are told
    "sums": 0.10,  # word problems and how to calculate them
    "spelling": 0.08,  # words letter by letter
    "story": 0.02,  # a day in the life
    "labels": 0.01,  # things with letters or owners, then looked up
    "notes": 0.32,  # shopping lists, numbers, times and prices
    "copy": 0.01,  # the same again, word for word
}
CANONICAL = 0.4  # probability that a fact is stated in its canonical wording


@dataclass(frozen=True)
class Document:
    """One text and -log2 of the probability of the choices that made it."""

    text: str
    bits: float


class ProseWriter:
    """Writes the documents of one world; holds only what is prepared once."""

    def __init__(self, tables: list[Table], facts: list[Fact], lexicon: Lexicon) -> None:
        self.lexicon = lexicon
        self.tables = {table.name: table for table in tables}
        self.facts = facts
        by_entity: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        by_relation: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        for fact in facts:
            by_entity[fact.table, fact.entity].append(fact)
            by_relation[fact.table, fact.relation].append(fact)
        self._entities = Weighted([(members, len(members)) for members in by_entity.values()])
        self._relations = Weighted([(members, len(members)) for members in by_relation.values()])
        self._kinds = Weighted(KINDS)
        self._writers: dict[str, Callable[[Choices], str]] = {
            "entry": self._entry,
            "list": self._list,
            "told": self._told,
            "sums": self._sums,
            "spelling": self._spelling,
            "story": self._story,
            "labels": self._labels,
            "notes": self._notes,
            "copy": self._copy,
        }
        self._wordings = {
            (table.name, relation.name): Weighted(_wording_weights(relation.statements))
            for table in tables
            for relation in table.relations.values()
        }
        self._openers = templates(_OPENERS)
        self._sentences = templates(_SENTENCES)
        self._frames = templates(_FRAMES)
        self._endings = templates(_ENDINGS)
        self._note_lines = templates(_NOTE_LINES)
        self._copy_styles = Weighted(_COPY_STYLES)
        slots = lexicon.slots
        words = [*slots["thing"], *slots["things"], *ADJECTIVES, *ANIMALS, *FEELINGS]
        self._words = list(dict.fromkeys(str(word) for word in words))

    def write(self, choices: Choices, kind: str | None = None) -> Document:
        """A document of a random kind, or of the one named."""
        text = self._writers[kind or choices.weighted(self._kinds)](choices)
        return Document(text, choices.bits)

    def statement(self, choices: Choices, fact: Fact) -> str:
        """The fact in one of its wordings, the canonical one most often."""
        wording = choices.weighted(self._wordings[fact.table, fact.relation])
        return fill(wording, fact.entity, fact.value)

    def _entry(self, choices: Choices) -> str:
        out: list[str] = []
        goal = choices.integer(3, 9)
        while len(out) < goal:
            facts = choices.weighted(self._entities)
            count = choices.integer((len(facts) + 1) // 2, min(len(facts), 8))
            chosen = choices.sample(facts, count)
            out += [self.statement(choices, fact) for fact in chosen]
        return " ".join(out)

    def _list(self, choices: Choices) -> str:
        facts = choices.weighted(self._relations)
        count = choices.integer(min(len(facts), 4), min(len(facts), 20))
        chosen = choices.sample(facts, count)
        if choices.chance(0.4):
            table = self.tables[facts[0].table]
            noun = table.relations[facts[0].relation].noun
            pairs = " ".join(f"{capital(f.entity)}: {f.value}." for f in chosen)
            return f"The {noun} of some {table.plural}. {pairs}"
        return " ".join(self.statement(choices, fact) for fact in chosen)

    def _told(self, choices: Choices) -> str:
        bound = self._cast(choices)
        slots = self.lexicon.slots
        out = [choices.choice(self._openers).fill(choices, bound, slots)]
        for _ in range(choices.integer(1, 3)):
            if choices.chance(0.4):
                out.append(choices.choice(self._sentences).fill(choices, bound, slots))
            frame = choices.choice(self._frames).fill(choices, bound, slots)
            out.append(frame)
            for fact in choices.sample(self.facts, choices.integer(1, 2)):
                out.append(self.statement(choices, fact))
        if choices.chance(0.5):
            out.append(choices.choice(self._endings).fill(choices, bound, slots))
        return " ".join(out)

    def _story(self, choices: Choices) -> str:
        bound = self._cast(choices)
        slots = self.lexicon.slots
        count = choices.integer(3, 12)
        out = [choices.choice(self._openers).fill(choices, bound, slots)]
        for template in choices.sample(self._sentences, count):
            out.append(template.fill(choices, bound, slots))
        out.append(choices.choice(self._endings).fill(choices, bound, slots))
        return " ".join(out)

    def _sums(self, choices: Choices) -> str:
        out = []
        for _ in range(choices.integer(1, 5)):
            problem = make_problem(choices, self.lexicon, "train")
            # no result: mental arithmetic is beyond a small model, the tool will do it
            out.append(f"{problem.text} Calculate {problem.expression}.")
        return "\n".join(out)

    def _spelling(self, choices: Choices) -> str:
        out = []
        for _ in range(choices.integer(2, 9)):
            word = self.spell_word(choices, real=0.5)
            if choices.chance(0.12):
                letter = choices.choice(sorted(set(word)))
                out.append(f'"{word}".count("{letter}") is {word.count(letter)}.')
                continue
            out.append(choices.choice(_SPELL).format(word=word, letters=spelled(word)))
        return " ".join(out)

    def spell_word(self, choices: Choices, *, real: float) -> str:
        """A word that may be spelled: with probability `real` a true one, else a made-up one."""
        words = self.lexicon.train_words
        if words and choices.chance(real):
            return choices.choice(words)
        return self.lexicon.syllables.train_word(choices)

    def _labels(self, choices: Choices) -> str:
        if choices.chance(0.6):
            things = choices.sample(self.lexicon.slots["thing"], 4)
            if choices.chance(0.5):
                things = [f"{choices.choice(COLOURS)} {thing}" for thing in things]
            lines = "\n".join(f"- {t}={x}" for t, x in zip(things, "ABCD", strict=True))
            asked = choices.sample(range(4), choices.integer(2, 4))
            form = choices.choice(_FOUND)
            found = " ".join(form.format(t=things[i], x="ABCD"[i]) for i in asked)
            return f"{choices.choice(_LABELS)}\n{lines}\n{found}"
        count = choices.integer(2, 6)
        people = choices.sample(self.lexicon.people, count)
        things = choices.sample(self.lexicon.slots["thing"], count)
        numbers = [choices.integer(10, 999) for _ in range(count)]
        line = choices.choice(_OWNERS)
        told = [line.format(p=p, t=t, n=n) for p, t, n in zip(people, things, numbers, strict=True)]
        again = choices.sample(told, choices.integer(1, count))
        return " ".join([*told, choices.choice(_AGAIN), *again])

    def _copy(self, choices: Choices) -> str:
        bound = self._cast(choices)
        style = choices.weighted(self._copy_styles)
        if style == "words":
            first = " ".join(choices.sample(self._words, choices.integer(5, 18)))
        elif style == "numbers":
            many = choices.integer(3, 10)
            first = " ".join(str(choices.integer(10, 9999)) for _ in range(many))
        else:
            chosen = choices.sample(self._sentences, choices.integer(2, 4))
            first = " ".join(t.fill(choices, bound, self.lexicon.slots) for t in chosen)
            if style == "numbers of a text":
                found = re.findall(r"\d+", first)
                return f"{first} Numbers: {' '.join(found) or 'none'}."
            return f"{first} {choices.choice(_AGAIN)} {first}"
        opening, again = (text.format(**bound) for text in choices.choice(_TWICE))
        return f"{opening} {first}. {again} {first}."

    def _notes(self, choices: Choices) -> str:
        bound = self._cast(choices)
        slots = self.lexicon.slots
        if choices.chance(0.5):
            count = choices.integer(6, 24)
            things = choices.sample(slots["things"], count)
            listed = ", ".join(f"{choices.integer(2, 99)} {t}" for t in things)
            return f"{choices.choice(_LISTS)} {bound['p']}: {listed}."
        count = choices.integer(3, 10)
        chosen = [choices.choice(self._note_lines) for _ in range(count)]
        return "\n".join(t.fill(choices, dict(bound), slots) for t in chosen)

    def _cast(self, choices: Choices) -> dict[str, str]:
        first, second = choices.sample(self.lexicon.people, 2)
        return {"p": first, "q": second}


def _wording_weights(statements: tuple[str, ...]) -> list[tuple[str, float]]:
    others = len(statements) - 1
    if not others:
        return [(statements[0], 1.0)]
    rest = (1.0 - CANONICAL) / others
    return [(s, rest if i else CANONICAL) for i, s in enumerate(statements)]


_SPELL = (
    'The word "{word}" is spelled {letters}.',
    'We spell "{word}" like this: {letters}.',
    'To write "{word}", put down {letters}.',
    'The letters of "{word}" are {letters}.',
)

_LABELS = ("Labels in the shop:", "On the shelf:", "Things with letters:", "Look at this list:")

_FOUND = ("The {t} has the letter {x}.", "{t}={x}", "The letter of the {t} is {x}.")

_OWNERS = (
    "{p} has the {t} with the number {n}.",
    "{p} took the {t}, number {n}.",
    "{p}: {t} {n}.",
)

_AGAIN = ("Again:", "Once more:", "The same again:")

_COPY_STYLES = {"words": 0.4, "numbers": 0.2, "sentences": 0.2, "numbers of a text": 0.2}

_TWICE = (
    ("Copy this:", "Copied:"),
    ("First:", "Again:"),
    ("{p} wrote:", "{q} wrote the same:"),
    ("{p} said:", "{p} said again:"),
)

_LISTS = ("Shopping list of", "In the bag of", "Things that belong to", "What to bring, for")

_OPENERS = (
    "On {day} morning, {p} went to the {place} with {q}.",
    "It was a {weather} {day} in {month}, and {p} was {feeling}.",
    "{p} and {q} met at the {place} at {hour}.",
    "In {season}, {p} often visits the {place} near the {place}.",
    "At {hour} {p} woke up and felt {feeling}.",
    "{p} is {age} years old and lives near the {place}.",
    "One {weather} day, {p} wanted to {activity} with {q}.",
    "Last {day}, {p} had a {feeling} {family} to visit.",
    "The {family} of {p} works at the {place}.",
    "{p} took a {adjective} {thing} to the {place}.",
    "There was a {adjective}, {colour} {thing} in the room of {p}.",
    "On {day} {p} and {q} sat in the {place} and talked.",
)

_FRAMES = (
    "{p} said to {q}:",
    "The {family} of {p} explained:",
    "{q} wrote in a letter:",
    "{p} read aloud from a {adjective} book:",
    "At the {place}, {p} learned this.",
    "On the wall of the {place} stood:",
    "{q} knew the answer.",
    "Then {p} remembered:",
    "A note in the {colour} book said:",
    "{p} told the {family} of {q}:",
)

_SENTENCES = (
    "{p} bought {n} {things} and {n} {things} at the {place}.",
    "{q} ate {food}, {food} and {food}.",
    "They saw a {colour} {animal} and a {adjective} {animal}.",
    "At {hour} they went to the {place} and at {hour} to the {place}.",
    "{p} wanted to {activity}, but {q} wanted to {activity}.",
    "It was {weather}, then {weather}.",
    "{q} carried a {adjective} {thing} and a {colour} {thing}.",
    "In the bag were a {thing}, a {thing} and {few} {things}.",
    "The {family} of {q} sent {n} {adjective} {things}.",
    "{p} paid {price} coins for a {colour} {thing} and {price} for a {thing}.",
    "{q} was {feeling} because the {thing} was {adjective}.",
    "{p} gave a {adjective} {thing} to {person}.",
    "Behind the {place} they found {few} {colour} {things}.",
    "The {animal} likes {food} and {food}.",
    "{person} came by with a {adjective} {thing}.",
    "{person} and {person} sold {n} {colour} {things}.",
    "For dinner there was {food}, {food} and {adjective} {food}.",
    "On {day} they want to {activity} and {activity}.",
    "{p} counted {n} {things}, {n} {things} and {n} {things}.",
    "{q} put the {thing1} next to the {thing2}, and {p} took the {thing1} away.",
    "The {place1} was closed, so {p} walked from the {place1} to the {place}.",
    "{p} has known {person} since {month} {year}.",
    "The {adjective} {thing} cost {price1} coins, and {p} had only {price1} coins.",
    "{q} lost a {colour1} {thing1}. Later {person} found the {colour1} {thing1}.",
    "The ticket of {p} had the number {code1}, so {p} looked for seat {code1}.",
    "{p} felt {feeling} and {q} felt {feeling}.",
    "A {adjective} {animal1} ran after {q}, and {p} called the {animal1} back.",
    "{q} likes the {colour} {thing} better than the {colour} {thing}.",
    "They waited from {hour} to {hour} for {person}.",
    "{person} was born in {month} {year}, {person} in {year}.",
    "{p} asked {q} for {n1} {things1}, and {q} brought {n1} {things1}.",
    "In {month} the {place} is full of {things} and {animal} tracks.",
    "{person}, {person} and {person} came to {activity}.",
    "There were {things}, {things}, {things} and {things} on the table.",
    "One {thing} was {colour}, one {colour} and one {colour}.",
    "{p} drew a {animal} with a {thing} and a {animal} with a {thing}.",
    "{q} dreamed of a {adjective}, {adjective} {animal} in the {place}.",
    "The {colour} book had {code} words, the {colour} book {code}.",
)

_ENDINGS = (
    "In the evening, {p} was {feeling}.",
    "At {hour} they all went home.",
    "{p} thanked {q} and walked home past the {place}.",
    "Next {day} they will meet again at the {place}.",
    "{q} said goodbye, and {p} went to {activity}.",
    "It had been a {weather} and {adjective} day.",
)

_NOTE_LINES = (
    "Call {person} at {code}{code} before {hour}.",
    "The bus from the {place} to the {place} leaves at {hour} and at {hour}.",
    "{person} was born on {few} {month} {year}, {person} on {few} {month} {year}.",
    "Copy this: {code1} {n1} {price1}. Copied: {code1} {n1} {price1}.",
    "{n} {things}, {n} {things}, {n} {things}, {n} {things}, {n} {things}.",
    "{person} {n}, {person} {n}, {person} {n}, {person} {n}.",
    "Code of {person1}: {code1}. Code of {person2}: {code2}. {person2} types {code2}.",
    "Price of {things}: {price} coins. Price of {things}: {price} coins.",
    "Locker {n} holds a {colour} {thing}, locker {n} a {adjective} {thing}.",
    "{day}, {hour}: meet {person} at the {place} and bring {few} {things}.",
    "The code {code1} opens the door of {person1}. Tell {person1} the code {code1}.",
    "{person1} has {n1} {things1}. Write down: {person1}, {n1} {things1}.",
)
