"""What a run learns from and is examined on: a world, or the user's own text with real tasks.

The one place that knows both kinds of data, so that every stage works on either. `Material` is the
interface; `WorldMaterial` makes everything from a world; `TextMaterial` reads real documents and
the task files it can find, and says in `notes` what it lacks. Used by the stages only.
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fledge.config import TRAINED_STAGES, Recipe
from fledge.data.conversations import (
    chat_sources,
    default_weights,
    gsm8k_problems,
    held_out_chats,
)
from fledge.data.loader import Documents, Mixture
from fledge.data.personas import load_persona
from fledge.data.sources import open_corpus
from fledge.data.task_files import TaskData
from fledge.data.tokenized import ConversationDocuments, Epochs, TextDocuments
from fledge.data.worlds import load_world
from fledge.errors import UserError
from fledge.evals import chat_quality
from fledge.evals.tasks.base import Task
from fledge.evals.tasks.registry import find_tasks
from fledge.evals.tasks.worlds import EXAMS, find_world_tasks
from fledge.sandbox import arithmetic
from fledge.stages.own_files import (
    HELD_OUT_PROBLEMS,
    IDENTITY,
    PERSONA,
    PERSONA_WEIGHT,
    ChatStage,
    Extra,
    Problems,
    Split,
    add_persona,
    extra_conversations,
    extra_files,
    manifest_of,
    talks_of,
)
from fledge.tokenizer import Tokenizer

PROSE = "prose"  # the kind of a mixture that stands for base's raw text
ENTROPY_DOCUMENTS = 2000
FILE_WEIGHT = 0.1  # weight of each of the user's own conversation files in the default mixture
REPLAYED_PROSE = 10_000_000  # documents that mid and sft replay are other draws than base's
UNSEEN_CHATS = 30_000_000  # a world's dialogues from here on are for looking at the chat


class Material(Protocol):
    """Everything a run learns from, by stage."""

    notes: list[str]

    def manifest(self) -> dict[str, Any]:
        """What exactly the data is; enters the fingerprints."""
        ...

    def corpus(self) -> dict[str, Any]:
        """What base reads, for people: its name, and how much there is (data.sources.Corpus.size);
        of a world its facts, for its text has no end."""
        ...

    def tokenizer_texts(self, max_bytes: int) -> Iterator[str]: ...

    def texts(self, split: Split, tokenizer: Tokenizer) -> Documents: ...

    def chats(
        self, stage: ChatStage, split: Split, tokenizer: Tokenizer, *, max_tokens: int
    ) -> tuple[Documents, dict[str, float]]: ...

    def entropy_per_byte(self) -> float | None: ...

    def problem(self, index: int) -> dict[str, Any] | None: ...

    def tasks(self, names: tuple[str, ...] | None) -> list[Task]: ...

    def talks(self, stage: str, count: int) -> chat_quality.Material: ...

    def sample_prompts(self) -> list[str]: ...

    def sample_questions(self) -> list[str]: ...


def open_material(recipe: Recipe) -> Material:
    """The material that [data] of a recipe names.

    Raises UserError if it cannot be read, or if [mid], [sft] or [evaluate] ask of it what it does
    not have: better now than after hours of training.
    """
    for stage in recipe.evaluate.stages:
        require_known("stage", stage, TRAINED_STAGES, key="evaluate.stages")
    for name in (recipe.mid.persona, recipe.sft.persona):
        if name is not None:
            load_persona(name)
    if recipe.data.source is not None:
        return TextMaterial(recipe)
    return WorldMaterial(recipe)


def _take_bytes(texts: Iterator[str], max_bytes: int) -> Iterator[str]:
    total = 0
    for text in texts:
        yield text
        total += len(text.encode("utf-8"))
        if total >= max_bytes:
            return


def require_known(what: str, name: str, known: Iterable[str], *, key: str) -> None:
    """UserError, with the nearest one, for a name that is not among the known."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"there is no {what} called {name!r}, which {key} names",
            f"there are {', '.join(names)}",
            f"did you mean {near[0]}?" if near else "name some of those, or leave the key out",
        )


def _require_kinds(recipe: Recipe, kinds: Callable[[ChatStage], Iterable[str]]) -> None:
    """UserError for a mixture of [mid] or [sft] that names a kind that the data does not offer."""
    for stage in ("mid", "sft"):
        for key in ("mixture", "epochs"):
            for kind in getattr(getattr(recipe, stage), key) or ():
                own = [] if getattr(recipe, stage).persona is None else [PERSONA]
                offered = sorted({*kinds(stage), PROSE, *own})
                require_known("kind of conversation", kind, offered, key=f"{stage}.{key}")


def weights_of(
    section: Any, kinds: Mapping[str, Documents], standard: dict[str, float]
) -> dict[str, float]:
    """The weight of each kind by [mid] or [sft]: mixture, or passes x different conversations; a
    persona takes the place of identity."""
    weights = dict((section.mixture or standard) if section.epochs is None else {})
    for kind, passes in (section.epochs or {}).items():
        if kind not in kinds:  # none of them is held out; in training the mixture refuses it
            weights[kind] = passes
            continue
        items = getattr(getattr(kinds[kind], "conversation", None), "items", None)
        if items is None:
            raise UserError(
                f"epochs of {kind}",
                "these conversations are made anew without end: there is no pass over them",
                "use mixture, which gives each kind a weight",
            )
        weights[kind] = passes * len(items)
    if PERSONA in kinds:
        weights.pop(IDENTITY, None)  # it says another name
        weights.setdefault(PERSONA, PERSONA_WEIGHT * sum(weights.values()) or 1.0)
    return weights


def _conversations(
    makers: Mapping[str, Callable[[int], Any]], section: Any, tokenizer: Tokenizer, max_tokens: int
) -> dict[str, Documents]:
    """The documents of each kind, long ones treated as [mid] or [sft] says."""
    return {
        kind: ConversationDocuments(
            make, tokenizer, max_tokens=max_tokens, policy=section.long_chats
        )
        for kind, make in makers.items()
    }


def _mixture(
    sources: dict[str, Documents], weights: dict[str, float], *, section: str
) -> tuple[Documents, dict[str, float]]:
    """The named sources interleaved."""
    used = {kind: weight for kind, weight in weights.items() if weight > 0}
    if not used:
        raise UserError(
            f"{section}.mixture has no positive weight",
            "there would be nothing to train on",
            "give at least one kind a weight above 0",
        )
    if unknown := sorted(used.keys() - sources.keys()):
        raise UserError(
            f"[{section}] names conversations that the data does not have: {', '.join(unknown)}",
            f"it has {', '.join(sorted(sources))}",
            "take them out, or give the data that they come from",
        )
    mixture = Mixture([sources[kind] for kind in used], list(used.values()))
    total = sum(used.values())
    return mixture, {kind: weight / total for kind, weight in used.items()}


class WorldMaterial:
    """Everything made by one world."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.world = load_world(recipe.data.world, recipe.data.seed)
        self.notes: list[str] = self.world.notes()
        self._extra = extra_files(recipe)
        self._problems = Problems.of_files(recipe)
        for name in recipe.evaluate.tasks or ():
            require_known("exam", name, EXAMS, key="evaluate.tasks")
        _require_kinds(
            recipe, lambda s: [*self.world.kinds(s), *extra_conversations(self._extra, s)]
        )

    def manifest(self) -> dict[str, Any]:
        return {"world": self.world.manifest()} | manifest_of(self._extra)

    def corpus(self) -> dict[str, Any]:
        told = self.world.manifest()
        return {"world": told["name"], "facts": told["facts"], "seed": self.recipe.data.seed}

    def tokenizer_texts(self, max_bytes: int) -> Iterator[str]:
        documents = (self.world.document("train", i).text for i in itertools.count())
        return _take_bytes(documents, max_bytes)

    def texts(self, split: Split, tokenizer: Tokenizer) -> Documents:
        return TextDocuments(lambda i: self.world.document(split, i).text, tokenizer)

    def chats(
        self, stage: ChatStage, split: Split, tokenizer: Tokenizer, *, max_tokens: int
    ) -> tuple[Documents, dict[str, float]]:
        own = self.world.kinds(stage)
        extra = extra_conversations(self._extra, stage)
        section, standard = getattr(self.recipe, stage), own | dict.fromkeys(extra, FILE_WEIGHT)
        # validation conversations are later draws of the same generator
        offset = 0 if split == "train" else HELD_OUT_PROBLEMS
        makers: dict[str, Callable[[int], Any]] = {
            kind: lambda i, kind=kind: self.world.conversation(stage, kind, i + offset)
            for kind in own
        }
        makers |= add_persona(self.recipe, stage, split, self.world)
        makers |= {kind: Epochs(rows, self.recipe.data.seed) for kind, rows in extra.items()}
        sources = _conversations(makers, section, tokenizer, max_tokens)
        sources[PROSE] = TextDocuments(
            lambda i: self.world.document(split, i + REPLAYED_PROSE).text,
            tokenizer,
            max_tokens=max_tokens,
        )
        weights = weights_of(section, sources, standard)
        return _mixture(sources, weights, section=stage)

    def entropy_per_byte(self) -> float | None:
        return self.world.entropy_per_byte(n_documents=ENTROPY_DOCUMENTS)

    def problem(self, index: int) -> dict[str, Any] | None:
        return self._problems(index) if self._problems else self.world.problem(index)

    def tasks(self, names: tuple[str, ...] | None) -> list[Task]:
        return [*find_world_tasks(self.world, names)]

    def talks(self, stage: str, count: int) -> chat_quality.Material:
        unseen = [self.world.conversation("sft", "chat", UNSEEN_CHATS + i) for i in range(count)]
        return talks_of(self.recipe, stage, count, unseen, self.problem, self.world)

    def sample_prompts(self) -> list[str]:
        facts = self.world.facts
        return [f"{facts[i * len(facts) // 5].entity}" for i in range(5)]

    def sample_questions(self) -> list[str]:
        items = (self.world.exam(name)[0] for name in ("world_facts", "world_math", "world_spell"))
        return [item["messages"][-1]["content"] for item in items]


class TextMaterial:
    """The user's own text for base, and the real tasks that can be found for the rest.

    Spelling, counting and identity conversations come from the almanac: they need no text.
    """

    def __init__(self, recipe: Recipe) -> None:
        data, source = recipe.data, recipe.data.source
        assert source is not None
        self.recipe = recipe
        self._corpus = open_corpus(
            source,
            seed=data.seed,
            val_fraction=data.val_fraction,
            max_bytes=data.max_bytes,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
        self.files = TaskData(
            data.root, smoltalk=data.chats == "smoltalk", max_chat_files=data.max_chat_files
        )
        self.world = load_world("almanac", data.seed)
        self._extra = extra_files(recipe)
        self._chats = {
            (stage, split): self._sources(stage, split)
            for stage in ("mid", "sft")
            for split in ("train", "val")
        }
        _require_kinds(
            recipe, lambda s: [*self._chats[s, "train"], *extra_conversations(self._extra, s)]
        )
        self._problems = Problems.of_files(recipe) or Problems(
            gsm8k_problems(self.files), gsm8k_problems(self.files, split="val")
        )
        self._tasks, missing = find_tasks(self.files, recipe.evaluate.tasks)
        self.notes = [*self._corpus.notes, *self.files.missing(), *missing]
        self._manifest: dict[str, Any] | None = None

    def _sources(self, stage: ChatStage, split: Split) -> Extra:
        section = getattr(self.recipe, stage)
        return dict(
            chat_sources(
                self.files,
                stage,
                split=split,
                world=self.world,
                calculator=arithmetic.evaluate,
                solutions=section.solutions,
                longest_reply=section.longest_reply,
            )
        )

    def manifest(self) -> dict[str, Any]:
        if self._manifest is None:  # hashing the files takes a while; every stage asks
            self._manifest = {
                "text": self._corpus.manifest(),
                "tasks": [list(row) for row in self.files.manifest()],
                "world": self.world.manifest(),
            } | manifest_of(self._extra)
        return self._manifest

    def corpus(self) -> dict[str, Any]:
        return {"source": self.recipe.data.source, **self._corpus.size()}

    def tokenizer_texts(self, max_bytes: int) -> Iterator[str]:
        return _take_bytes(self._corpus.one_epoch(self.recipe.data.seed), max_bytes)

    def texts(self, split: Split, tokenizer: Tokenizer) -> Documents:
        return TextDocuments(self._order(split), tokenizer)

    def _order(self, split: Split) -> Callable[[int], str]:
        return self._corpus.order(split, self.recipe.data.seed)

    def chats(
        self, stage: ChatStage, split: Split, tokenizer: Tokenizer, *, max_tokens: int
    ) -> tuple[Documents, dict[str, float]]:
        rows = self._chats[stage, split] | extra_conversations(self._extra, stage)
        section, standard = getattr(self.recipe, stage), default_weights(stage, list(rows))
        makers: dict[str, Callable[[int], Any]] = {
            kind: Epochs(items, self.recipe.data.seed) for kind, items in rows.items()
        }
        makers |= add_persona(self.recipe, stage, split, self.world)
        sources = _conversations(makers, section, tokenizer, max_tokens)
        sources[PROSE] = TextDocuments(self._order(split), tokenizer, max_tokens=max_tokens)
        weights = weights_of(section, sources, standard)
        if split == "val":  # few chats: perhaps none of them is held out
            weights = {kind: weight for kind, weight in weights.items() if kind in sources}
        return _mixture(sources, weights, section=stage)

    def entropy_per_byte(self) -> float | None:
        return None  # nobody knows the entropy of real English

    def problem(self, index: int) -> dict[str, Any] | None:
        return self._problems(index)

    def tasks(self, names: tuple[str, ...] | None) -> list[Task]:
        def is_asked(name: str) -> bool:  # "core" asks for core/copa and the 21 others
            return names is None or name in names or name.partition("/")[0] in names

        return [task for task in self._tasks if is_asked(task.name)]

    def talks(self, stage: str, count: int) -> chat_quality.Material:
        """Held-out chats of the files, else the almanac's."""
        unseen: Sequence[Any] = held_out_chats(self.files)[:count]
        if not unseen:
            ids = range(UNSEEN_CHATS, UNSEEN_CHATS + count)
            unseen = [self.world.conversation("sft", "chat", i) for i in ids]
        return talks_of(self.recipe, stage, count, unseen, self.problem, self.world)

    def sample_prompts(self) -> list[str]:
        texts = [self._corpus.val[i] for i in range(min(5, len(self._corpus.val)))]
        return [" ".join(text.split()[:12])[:120] for text in texts]

    def sample_questions(self) -> list[str]:
        asked = ["Who are you?", 'Spell the word "house".']
        problem = self.problem(HELD_OUT_PROBLEMS)
        if problem is not None:
            asked.append(problem["messages"][-1]["content"])
        return asked
