"""What the user brings beside the data of a run: conversations, problems, a persona, rewards.

Files that single keys of a recipe name ([mid] and [sft] files and persona, [rl] files and rewards),
read once, checked, and told in the fingerprints. Used by `stages.material` and the pipeline.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from fledge.config import Recipe
from fledge.data.conversations import Joined, read_conversations
from fledge.data.personas import Persona, PersonaConversations, load_persona
from fledge.data.problems import problems_of, read_problems
from fledge.data.worlds import World
from fledge.evals import chat_quality
from fledge.evals.rewards import Rewards
from fledge.files import canonical_json

Split = Literal["train", "val"]
ChatStage = Literal["mid", "sft"]
WITH_A_TOOL = ("math", "gsm8k")  # kinds of problems whose examples call the tool
HELD_OUT_PROBLEMS = 10_000_000  # problems from this index on are never trained on

Extra = dict[str, Sequence[dict[str, Any]]]


def extra_files(recipe: Recipe) -> dict[str, Extra]:
    """The user's own conversation files, by stage and file name; UserError if one is broken."""
    return {
        stage: {path: read_conversations(path) for path in getattr(recipe, stage).files}
        for stage in ("mid", "sft")
    }


def extra_conversations(extra: dict[str, Extra], stage: str) -> Extra:
    """Those of one stage."""
    return extra.get(stage, {})


class Problems:
    """What reinforcement practises on: an endless order of training problems, and from
    HELD_OUT_PROBLEMS on those that are kept for measuring."""

    def __init__(self, train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
        self._train, self._held_out = train, held_out

    @classmethod
    def of_files(cls, recipe: Recipe) -> Problems | None:
        """Those of [rl] files; None where it names none."""
        rows = Joined([read_problems(path) for path in recipe.rl.files])
        return cls(problems_of(rows, "train"), problems_of(rows, "val")) if len(rows) else None

    def __call__(self, index: int) -> dict[str, Any] | None:
        held = index >= HELD_OUT_PROBLEMS
        rows = self._held_out if held else self._train
        return rows[(index - HELD_OUT_PROBLEMS if held else index) % len(rows)] if rows else None


def manifest_of(extra: dict[str, Extra]) -> dict[str, Any]:
    """What the user's own files hold, so that an edit is noticed; empty without files."""
    digests = {path: _digest(rows) for files in extra.values() for path, rows in files.items()}
    return {"conversations": sorted(digests.values())} if digests else {}


def stage_manifest(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What the section of a stage alone names: the persona of mid and sft, the problems and the
    functions of rl. An edit of these leaves the stages before alone."""
    own: dict[str, Any] = {}
    if stage in ("mid", "sft") and getattr(recipe, stage).persona is not None:
        own["persona"] = _digest([dataclasses.asdict(load_persona(getattr(recipe, stage).persona))])
    if stage == "rl" and recipe.rl.files:
        own["problems"] = [_digest(read_problems(path)) for path in recipe.rl.files]
    if stage == "rl":
        files = {name.rpartition(":")[0] for name in recipe.rl.rewards or () if ":" in name}
        texts = [Path(file).read_text(encoding="utf-8") for file in sorted(files)]
        own |= {"rewards": _digest(texts)} if texts else {}
    return own


def require_rewards(recipe: Recipe, own: dict[str, Any] | None) -> None:
    """UserError for rewards that cannot be, or that the problems are not made for; `own` is a
    problem of the data itself. Runs the user's own functions' files."""
    with Rewards(recipe.rl.rewards) as rewards:
        files = Joined([read_problems(path) for path in recipe.rl.files])
        problems = problems_of(files, "train") if len(files) else []
        for item in problems or ([] if own is None else [own]):
            rewards.require(item)


def _digest(rows: Iterable[Any]) -> str:
    return hashlib.sha256(canonical_json(list(rows)).encode("utf-8")).hexdigest()


PERSONA, IDENTITY = "persona", "identity"
PERSONA_WEIGHT = 0.1  # of a mixture that does not name it


def add_persona(
    recipe: Recipe, stage: ChatStage, split: Split, world: World
) -> dict[str, Callable[[int], Any]]:
    """The kind of conversation that makes the assistant a persona; none where none is asked for."""
    name = getattr(recipe, stage).persona
    if name is None:
        return {}

    def base(kind: str, index: int) -> dict[str, Any]:
        return world.conversation(
            stage, kind, index + (0 if split == "train" else HELD_OUT_PROBLEMS)
        )

    made = PersonaConversations(load_persona(name), base, f"{recipe.data.seed}|{stage}|{split}")
    return {PERSONA: made}


def persona_of(recipe: Recipe, stage: str) -> Persona | None:
    """Who the model of a stage is to be: the last that it was trained on."""
    for earlier in ("sft", "mid") if stage != "mid" else ("mid",):
        name = getattr(recipe, earlier).persona
        if name is not None:
            return load_persona(name)
    return None


def talks_of(
    recipe: Recipe,
    stage: str,
    count: int,
    dialogues: Sequence[Any],
    problem: Callable[[int], dict[str, Any] | None],
    world: World,
) -> chat_quality.Material:
    """What shows whether the chat is any good: dialogues and held-out problems of the material,
    probes and facts of a world."""
    probes = [item for item in world.exam("world_chat") if "fact" not in item]
    facts = world.exam("world_facts")
    found = [problem(HELD_OUT_PROBLEMS + i) for i in range(2 * count)]
    sums = [item for item in found if item is not None and item.get("kind") in WITH_A_TOOL]
    return chat_quality.Material(
        dialogues, probes[:count], facts[:count], sums[:count], persona_of(recipe, stage)
    )
