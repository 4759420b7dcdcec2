"""A world: the one object through which everything of a synthetic corpus is reached.

Every item is a pure function of (generator version, world, seed, purpose, index). Called by stages
(training data), evals (exams) and the CLI; never reads the network and never keeps what it made.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from fledge.data.worlds.choices import Choices, Weighted
from fledge.data.worlds.conversations import ConversationMaker, user
from fledge.data.worlds.exams import MIN_VALUES, SIZES, ExamMaker
from fledge.data.worlds.problems import make_problem
from fledge.data.worlds.prose import Document, ProseWriter
from fledge.data.worlds.spelling import Syllables
from fledge.data.worlds.tables import Fact, Table, split_facts, table_from_csv, tables_from_folder
from fledge.data.worlds.village import village_lexicon, village_table
from fledge.data.worlds.vocabulary import PEOPLE, THINGS, Lexicon
from fledge.errors import UserError

GENERATOR_VERSION = 1
BUILTIN = ("almanac", "village")
SPELLING_PROBLEMS = 0.25  # share of rl's problems; without them rl unlearnt spelling (docs/log.md)
Split = Literal["train", "val"]
Stage = Literal["mid", "sft"]


@dataclass(frozen=True)
class Source:
    """What a world is made from: its tables, its words, and the digests of its files."""

    name: str
    tables: list[Table]
    lexicon: Lexicon
    files: dict[str, str]


class World:
    """Endless documents and conversations, and fixed exams, of one world and seed."""

    def __init__(self, source: Source, seed: int) -> None:
        self.name = source.name
        self.seed = seed
        self.files = source.files
        self.tables = source.tables
        self.facts: list[Fact] = split_facts(source.tables, seed)
        made_of = hashlib.sha256(repr(sorted(source.files.items())).encode()).hexdigest()[:16]
        self._key = f"fledge world {GENERATOR_VERSION}|{source.name}|{made_of}|{seed}"
        self.prose = ProseWriter(source.tables, self.facts, source.lexicon)
        self.conversations = ConversationMaker(self.prose)
        self.exams = ExamMaker(self.conversations, self._key)
        self._mixtures = {stage: Weighted(self.kinds(stage)) for stage in ("mid", "sft")}

    def document(self, split: Split, index: int) -> Document:
        """Document `index` of a split: its text and the bits of the choices behind it."""
        return self.prose.write(self._choices("document", split, index))

    def conversation(self, stage: Stage, kind: str, index: int) -> dict[str, Any]:
        """Conversation `index` of a kind; ends with the assistant's turn."""
        choices = self._choices("conversation", f"{stage}|{kind}", index)
        return self.conversations.make(choices, stage, kind)

    def mixed(self, stage: Stage, index: int) -> dict[str, Any]:
        """Conversation `index` of a stage in its default mixture of kinds."""
        kind = self._choices("mixture", stage, index).weighted(self._mixtures[stage])
        return self.conversation(stage, kind, index)

    def kinds(self, stage: Stage) -> dict[str, float]:
        """Default weight of each kind of conversation in a stage; the weights sum to 1."""
        return self.conversations.kinds(stage)

    def problem(self, index: int) -> dict[str, Any]:
        """Problem `index` of rl, a word to spell or a word problem; never one of the exam's."""
        choices = self._choices("problem", "rl", index)
        if choices.chance(SPELLING_PROBLEMS):
            asked, reply = self.conversations.make(choices, "sft", "spell")["messages"]
            return {"kind": "spell", "messages": [asked], "answer": reply["content"]}
        problem = make_problem(choices, self.prose.lexicon, "train")
        return {
            "kind": "math",
            "messages": [user(problem.text)],
            "answer": str(problem.answer),
            "expression": problem.expression,
        }

    def exam(self, task: str) -> list[dict[str, Any]]:
        """The items of world_facts, world_mc, world_math, world_spell or world_chat."""
        if task not in SIZES:
            raise UserError(
                f"the world has no exam called {task!r}",
                "its exams are " + ", ".join(SIZES),
                "choose one of them",
            )
        return self.exams.make(task)

    def manifest(self) -> dict[str, Any]:
        """What determines every byte of this world."""
        return {
            "name": self.name,
            "generator_version": GENERATOR_VERSION,
            "seed": self.seed,
            "options": {},
            "files": self.files,
            "facts": len(self.facts),
            "held_out": sum(not fact.asked for fact in self.facts),
        }

    def notes(self) -> list[str]:
        """What a person should know about the exams of this world; usually nothing."""
        notes = []
        for task, size in SIZES.items():
            found = len(self.exam(task))
            if found < size:
                notes.append(
                    f"{task} has {found} questions instead of {size}: it asks held-out facts only, "
                    f"of relations with at least {MIN_VALUES} different values"
                )
        return notes

    def entropy_per_byte(self, *, n_documents: int = 2000) -> float:
        """Bits per UTF-8 byte of the generator's own choices on validation documents: an upper
        bound of the entropy of the prose, the world given."""
        bits = size = 0.0
        for index in range(n_documents):
            document = self.document("val", index)
            bits += document.bits
            size += len(document.text.encode("utf-8"))
        return bits / size

    def _choices(self, purpose: str, part: str, index: int) -> Choices:
        return Choices(f"{self._key}|{purpose}|{part}|{index}")


def load_world(name_or_csv: str, seed: int) -> World:
    """The built-in world of that name, or the world of a CSV table.

    Raises UserError when there is neither, or when the table has a fault.
    """
    if name_or_csv == "village":
        table = village_table(seed)
        return World(Source("village", [table], village_lexicon(seed, table), {}), seed)
    folder = Path(str(resources.files("fledge.data.worlds"))) / "almanac"
    if name_or_csv == "almanac":
        tables, files = tables_from_folder(folder)
        lexicon, more = _lexicon(folder)
        return World(Source("almanac", tables, lexicon, files | more), seed)
    path = Path(name_or_csv)
    if not path.exists() and path.suffix.lower() != ".csv":
        raise UserError(
            f"there is no world called {name_or_csv!r}",
            f"the built-in worlds are {', '.join(BUILTIN)}, and no such file exists",
            "give one of these names or the path of a .csv table",
        )
    table, sha = table_from_csv(path)
    lexicon, more = _lexicon(folder)
    return World(Source(f"csv:{path.stem}", [table], lexicon, {path.name: sha} | more), seed)


def _lexicon(folder: Path) -> tuple[Lexicon, dict[str, str]]:
    """The everyday words of the almanac, with the digests of their files."""
    lines: dict[str, list[str]] = {}
    digests = {}
    for name in ("people.txt", "things.txt", "words.txt"):
        data = (folder / name).read_bytes() if (folder / name).exists() else b""
        lines[name] = [line.strip() for line in data.decode("utf-8").splitlines() if line.strip()]
        if data:
            digests[name] = hashlib.sha256(data).hexdigest()
    pairs = [(one, many) for one, many in (line.split(",") for line in lines["things.txt"])]
    lexicon = Lexicon(
        lines["people.txt"] or PEOPLE,
        pairs or THINGS,
        lines["words.txt"],
        Syllables.of_seed("almanac"),
    )
    return lexicon, digests
