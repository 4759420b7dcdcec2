"""What a run keeps of its plan when it is opened again."""

from __future__ import annotations

from pathlib import Path

from fledge import resolved
from fledge.config import HardwareSection, ModelSection, Recipe
from fledge.plan import hardware, planner


def test_a_run_of_a_cpu_goes_on_on_a_gpu_though_it_asked_for_rounded_products() -> None:
    """What it was told about the other machine does not hold here."""
    model = ModelSection(depth=2)
    old = Recipe(model=model, hardware=HardwareSection(dtype="bfloat16_products"))
    plan = planner.resolve(old, hardware.parse("2xcpu"))
    stored = resolved.describe("r", old, plan, {})
    now = Recipe(model=model)
    here = planner.resolve(now, hardware.parse("h100"))
    fresh = resolved.describe("r", now, here, {})
    joined, changed = resolved.join(stored, fresh, here, where=Path("r"))
    assert joined["values"]["hardware.dtype"] == "bfloat16" and changed
    numbers = [
        {k: v for k, v in t["values"].items() if k.startswith("base.")} for t in (stored, joined)
    ]
    assert numbers[0]["base.tokens"] == numbers[1]["base.tokens"]
