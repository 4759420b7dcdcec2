"""What was decided when a run was made: the content of resolved.json, and how a new plan joins it.

`describe` makes it from a plan, `read` takes it from a run, `join` merges the two when a run is
opened again: what a person changed is taken, all else stays as it was resolved. Called by
`fledge.run` only. It never writes, and it knows nothing of stages.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fledge import files
from fledge.config import NUMERIC_KEYS, Recipe, flat, recipe_from_dict, recipe_to_dict
from fledge.errors import UserError
from fledge.fingerprint import environment

FORMAT = 1
"""Version of the run directory; a change makes older runs refuse instead of misread."""

_KEYS = {"name": str} | dict.fromkeys(
    ("recipe", "model", "values", "rules", "estimates", "hardware", "versions"), dict
)


class PlanLike(Protocol):
    """What a run needs of a `fledge.plan.planner.Plan` (run may not import plan)."""

    def to_dict(self) -> dict[str, Any]: ...

    def replan(self, recipe: Recipe) -> PlanLike: ...


def describe(
    name: str, recipe: Recipe, plan: PlanLike, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """The plan, the recipe and where it was made.

    `origin`: the command, what the header of the recipe expects, and what the command line changed;
    nothing where the run was not made by `fledge run`.
    """
    return {
        "format": FORMAT,
        "name": name,
        "recipe": recipe_to_dict(recipe),
        "origin": dict(origin),
        **plan.to_dict(),
        **environment(),
        "created": time.time(),
    }


def read(path: Path) -> dict[str, Any]:
    """The content of a resolved.json; UserError if it is damaged or another version's."""
    fix = "restore it, or start anew with --out DIR"
    table = files.read_json(path, {"format": int}, fix=fix)
    if table["format"] != FORMAT:
        raise UserError(
            f"{path.parent} was written by another version of fledge",
            f"its format is {table['format']}, this version writes {FORMAT}",
            f"use fledge {table.get('versions', {}).get('fledge', '')} for it, or another --out",
        )
    return files.read_json(path, _KEYS, fix=fix)


def asked(resolved: dict[str, Any], *, where: Path) -> Recipe:
    """The recipe as the user gave it."""
    return recipe_from_dict(resolved["recipe"], where=str(where))


def join(
    stored: dict[str, Any], fresh: dict[str, Any], plan: PlanLike, *, where: Path
) -> tuple[dict[str, Any], bool]:
    """(the stored content with what a new recipe changes, whether it changes any number).

    A value is new where the change of the recipe moves it; all else stays as it was resolved, even
    where this version's planner would choose otherwise. Keys of the execution are always new, but
    for one: on the same kind of device a run goes on in the dtype that it computed in, unless
    another is asked for.
    """
    # the old recipe by this version's planner, on this machine: not what it said of the other
    machine = asked(fresh, where=where).hardware
    old = dataclasses.replace(asked(stored, where=where), hardware=machine)
    before = plan.replan(old).to_dict()
    joined = prefer(
        stored,
        fresh,
        lambda key: key in NUMERIC_KEYS and fresh["values"][key] == before["values"].get(key),
        model=fresh["model"] == before["model"],
    )
    _keep_dtype(joined, stored, fresh)
    if _numeric(fresh["recipe"]) != _numeric(stored["recipe"]):
        return joined, True
    parts = {key: joined[key] for key in ("values", "rules", "recipe")}
    return stored | parts, _plain(joined["values"]) != _plain(stored["values"])


def _keep_dtype(joined: dict[str, Any], stored: dict[str, Any], fresh: dict[str, Any]) -> None:
    """hardware.dtype as it was; of a run that is older than the key, float32."""
    key = "hardware.dtype"
    same = stored["values"].get("hardware.device") == fresh["values"]["hardware.device"]
    if key in flat(fresh["recipe"]) or not same:
        return
    joined["values"][key] = stored["values"].get(key) or "float32"
    joined["rules"][key] = stored["rules"].get(key, "as the run was begun")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON has them: a tuple is a list there."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def prefer(
    stored: dict[str, Any], fresh: dict[str, Any], keep: Callable[[str], bool], *, model: bool
) -> dict[str, Any]:
    """The fresh content with the stored values of the keys to `keep`, and its `model` if so."""
    parts = {
        part: {
            key: stored[part].get(key, value) if keep(key) else value
            for key, value in fresh[part].items()
        }
        for part in ("values", "rules")
    }
    return fresh | parts | {"model": (stored if model else fresh)["model"]}


def _numeric(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in flat(tables).items() if key in NUMERIC_KEYS}
