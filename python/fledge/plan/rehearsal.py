"""A dress rehearsal: a costly recipe made small by stated factors, and what the whole will need.

`shrink` takes a resolved plan and gives the recipe of its rehearsal: every number of it stands, but
depth, tokens and rows, and with them context and vocabulary. `needs` says what the recipe itself
will take on the hardware that it was made for, and what this machine and this version lack for it.
Called by `fledge run RECIPE --rehearse`. It runs nothing and never touches a network.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from fledge.config import Recipe, flat, recipe_from_dict, recipe_to_dict
from fledge.plan import hardware, planner
from fledge.plan.hardware import Hardware
from fledge.plan.planner import Plan
from fledge.progress import format_seconds

SIZES: dict[str, int] = {
    "model.depth": 2,
    "model.max_seq_len": 192,
    "tokenizer.vocab_size": 768,
    "tokenizer.train_bytes": 100_000,
    "data.max_bytes": 1,
    "data.max_chat_files": 1,
    "evaluate.max_examples": 3,
    "evaluate.samples": 1,
    "rl.prompts_per_step": 2,
    "rl.samples_per_prompt": 2,
    "rl.max_new_tokens": 16,
}
"""What the rehearsal has at most: one shard of the corpus, one file of chats (which max_bytes = 1
means), three rows of each exam."""
STEPS = {"base": 12, "mid": 4, "sft": 4, "rl": 2}
ROWS_PER_STEP = 4
FOLLOWS_DEPTH = ("hidden_size", "intermediate_size", "head_dim", "num_key_value_heads")
_HUB_ONLY = ("data.max_bytes", "data.max_chat_files")

SLOW = (
    "float32 is what hardware.dtype asks for there: the hours above are those of a GPU without its "
    "matrix units, and they are assumed, not measured"
)
UNTRIED = (
    "training in {dtype} has been tested on CPUs only, never run on a GPU, and nothing is compiled "
    "as the published runs are: measure 50 steps before you rent for a day",
    "`--nproc` on GPUs (NCCL) has not been run yet; on CPUs (gloo) it is tested",
)
"""What nobody has tried of this version; said where the target is a GPU."""


def shrink(plan: Plan, recipe: Recipe) -> tuple[Recipe, dict[str, str]]:
    """(the rehearsal of a recipe, its factors as "section.key" -> "full -> small, 1/factor")."""
    values: dict[str, Any] = dict(plan.values)
    small: dict[str, Any] = dict(SIZES)
    if not _is_hub(recipe):  # text of one's own is read as it is
        small = {key: size for key, size in small.items() if key not in _HUB_ONLY}
    small = {k: size for k, size in small.items() if values[k] is None or size < values[k]}
    row = small.get("model.max_seq_len", values["model.max_seq_len"])
    for stage in ("base", "mid", "sft"):
        batch: int = min(ROWS_PER_STEP * row, values[f"{stage}.global_batch_tokens"] // row * row)
        steps = max(1, values[f"{stage}.tokens"] // values[f"{stage}.global_batch_tokens"])
        small[f"{stage}.global_batch_tokens"] = batch
        small[f"{stage}.tokens"] = min(STEPS[stage], steps) * batch
        _often(small, stage, min(STEPS[stage], steps))
    small["base.eval_tokens"] = ROWS_PER_STEP * row
    if values["rl.steps"]:
        small["rl.steps"] = min(STEPS["rl"], values["rl.steps"])
        _often(small, "rl", small["rl.steps"])
    factors = {key: _factor(values[key], size) for key, size in small.items()}
    factors = {key: text for key, text in factors.items() if text is not None}
    given = flat(recipe_to_dict(recipe))
    numbers = {
        key: value
        for key, value in (values | small).items()
        if value is not None and (key in given or not _is_place(key))
    }
    for stage in ("mid", "sft"):  # a look that the whole run takes is rehearsed on any machine
        if getattr(recipe, stage).chatcore_every != 0:
            numbers[f"{stage}.chatcore_every"] = small[f"{stage}.eval_every"]
            numbers[f"{stage}.chatcore_examples"] = SIZES["evaluate.max_examples"]
    for name in ("minutes", "tokens_per_param", "law"):  # `tokens` says it
        numbers.pop(f"base.{name}", None)
    for name in FOLLOWS_DEPTH:
        numbers.pop(f"model.{name}", None)
    tables: dict[str, dict[str, Any]] = {}
    for key, value in numbers.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    return recipe_from_dict(tables, where="the rehearsal"), factors


def _is_hub(recipe: Recipe) -> bool:
    source = recipe.data.source or ""
    return source in ("fineweb-edu", "climbmix") or source.startswith("hub:")


def _often(small: dict[str, Any], stage: str, steps: int) -> None:
    """Measure and save twice a stage."""
    small[f"{stage}.eval_every"] = small[f"{stage}.save_every"] = math.ceil(steps / 2)


def _is_place(key: str) -> bool:
    """Keys that say where to compute; the rehearsal's machine decides anew."""
    places = ("device", "threads", "dtype", "checkpoint_activations", "async_checkpoints")
    return key.endswith(".device_batch_size") or key in {f"hardware.{name}" for name in places}


def _factor(full: Any, small: int) -> str | None:
    if full is None:
        return f"all -> {small:,}"
    if full == small:
        return None
    return f"{full:,} -> {small:,} (1/{full / small:,.4g})"


def factors_text(name: str, factors: dict[str, str]) -> str:
    """What is smaller than in the recipe itself, for people."""
    lines = [f"{name}, rehearsed: the same recipe and code, smaller by"]
    lines += [f"  {key:<26} {text}" for key, text in factors.items()]
    return "\n".join(lines)


# -- what the whole run will need ----------------------------------------------------------------


def needs(recipe: Recipe, here: Plan, out: Path) -> dict[str, Any]:
    """What the recipe will take on its target, and what is missing for it on this machine."""
    machine = here.hardware
    target = hardware.parse(recipe.hardware.target) if recipe.hardware.target else machine
    there = planner.resolve(recipe, target) if recipe.hardware.target else here
    known, local = there.estimates, here.estimates
    return {
        "on": target.name,
        "seconds": known["seconds"],
        "dollars": known["dollars"],
        "memory_bytes_per_device": known["memory_bytes"],
        "disk_bytes": known["disk_bytes"],
        "download_bytes": known["download_bytes"],
        "here": {"on": machine.name, "seconds": local["seconds"], "dollars": local["dollars"]},
        "missing": missing(there, machine, target, out),
    }


def missing(there: Plan, machine: Hardware, target: Hardware, out: Path) -> list[str]:
    """Sentences on what this machine and this version lack for the whole run."""
    known, found = there.estimates, []
    if target.device != machine.device or target.device_count > machine.device_count:
        found.append(f"{target.name}: this machine computes on {machine.name}")
    if known["memory_bytes"] > machine.device_memory_bytes:
        found.append(
            f"memory: about {known['memory_bytes'] / 1e9:,.1f} GB per device are needed, "
            f"{machine.name} has {machine.device_memory_bytes / 1e9:,.1f} GB"
        )
    for what, folder, needed in (
        ("disk for the run", out, known["disk_bytes"]),
        ("disk for downloads", hardware.fledge_home(), known["download_bytes"]),
    ):
        free = _free(folder)
        if free < needed:
            found.append(
                f"{what}: about {needed / 1e9:,.1f} GB are needed under {folder}, "
                f"{free / 1e9:,.1f} GB are free"
            )
    if target.device == "cuda":
        dtype = there.values["hardware.dtype"]
        found += [SLOW] if dtype == "float32" else []
        found += [sentence.format(dtype=dtype) for sentence in UNTRIED]
    return found


def _free(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def needs_text(name: str, table: dict[str, Any]) -> str:
    """`needs` for people: the last thing that a rehearsal says."""
    here, dollars = table["here"], table["dollars"]
    cost = f", about {dollars:,.0f} dollars" if dollars is not None else ""
    lines = [
        f"the whole run of {name} on {table['on']}:",
        f"  time       about {format_seconds(table['seconds'])}{cost}",
        f"  memory     about {table['memory_bytes_per_device'] / 1e9:,.1f} GB per device",
        f"  disk       about {table['disk_bytes'] / 1e9:,.1f} GB for the run, and "
        f"{table['download_bytes'] / 1e9:,.1f} GB of downloads",
    ]
    if here["on"] != table["on"]:
        lines.append(f"  here       about {format_seconds(here['seconds'])} on {here['on']}")
    lines.append("missing for it:" if table["missing"] else "nothing is missing for it here")
    lines += [f"  - {sentence}" for sentence in table["missing"]]
    return "\n".join(lines)
