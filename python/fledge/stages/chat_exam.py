"""The look at a stage's chat in its run: what it is asked, and where the result is kept.

Called by `stages.evaluate` for each stage it examines; `evals.chat_quality` has the measures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fledge import files
from fledge.dist import World
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals import chat_quality
from fledge.plan.defaults import CHAT_DRY_MULTIPLIER
from fledge.run import Run
from fledge.stages.material import Material
from fledge.stats import format_percent

DAMAGED = "delete it and run the same command again"


def take(
    engine: Engine,
    material: Material,
    run: Run,
    stage: str,
    *,
    count: int,
    key: str,
    world: World | None = None,
) -> dict[str, Any]:
    """Examines the chat on `count` dialogues, probes and facts; `key` says of which model.

    The ranks of a `world` share the replies; the leader alone writes.
    """
    with Tools() as tools:
        scores, told = chat_quality.examine(engine, tools, material.talks(stage, count), world)
    if world is not None and not world.leads:
        return scores
    lines = "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in told)
    files.write_text(run.chat_samples_file(stage), lines)
    table = {"model": key, "dialogues": count, "dry_multiplier": CHAT_DRY_MULTIPLIER}
    files.write_json(run.chat_file(stage), table | {"scores": scores})
    return scores


def kept(run: Run, stage: str, *, count: int, key: str) -> dict[str, Any] | None:
    """The scores of this very model, if they were taken before."""
    path: Path = run.chat_file(stage)
    if not path.is_file():
        return None
    try:
        table = files.read_json(path, {"model": str, "scores": dict}, fix=DAMAGED)
    except UserError:  # a damaged file is made again
        return None
    same = (
        table["model"] == key
        and table.get("dialogues") == count
        and table.get("dry_multiplier") == CHAT_DRY_MULTIPLIER
    )
    return table["scores"] if same else None


def describe(scores: dict[str, Any]) -> str:
    """One line for the log."""
    words = {"stops": "stops by itself", "repeats": "repeats", "recalls": "recalls",
             "flips": "gives in to a wrong claim", "calls": "calls its tool well",
             "persona": "in character"}  # fmt: skip
    told = [f"{words[n]} {format_percent(s['value'])}" for n, s in scores.items() if n in words]
    return "chat: " + ", ".join(told or ["nothing to ask"])
