"""How fast this machine trains a planned network: seconds of real steps, before a run begins.

`base.minutes` needs it to say how many tokens fit. Called by the pipeline only; the steps are made
on made-up tokens and a network that is thrown away, and nothing is written.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fledge.config import Recipe
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.plan import planner, scaling
from fledge.run import Run
from fledge.train.loop import accumulate, is_out_of_memory

PROBE_SECONDS = 6.0
LEAST_STEPS = 4  # the first of them warms up and does not count


def known_speed(recipe: Recipe, out: Path) -> float | None:
    """FLOP/s that were measured for the run at `out`, if it is the same network and batch."""
    if not Run.is_run(out):
        return None
    run = Run.read(out)
    asked = run.asked
    same = (
        asked.model == recipe.model
        and asked.tokenizer.vocab_size == recipe.tokenizer.vocab_size
        and asked.base.global_batch_tokens == recipe.base.global_batch_tokens
    )
    return run.resolved["hardware"].get("training_flops") if same else None


def plan_at_measured_speed(
    recipe: Recipe, plan: planner.Plan, device: str, ranks: int
) -> planner.Plan:
    """The same recipe planned with the speed that its network has here.

    One rank measures; that `ranks` of them are so many times as fast is taken for granted.
    """
    print("measuring how fast this machine trains this network", file=sys.stderr, flush=True)
    rate = tokens_per_second(plan, device) * ranks
    flops = rate * scaling.count(plan.model).flops_per_token
    machine = dataclasses.replace(plan.hardware, training_flops=flops)
    return dataclasses.replace(planner.resolve(recipe, machine), rehearsal=plan.rehearsal)


def tokens_per_second(plan: planner.Plan, device: str) -> float:
    """Median over whole optimizer steps of the planned size."""
    values: dict[str, Any] = plan.values
    context = plan.model.max_position_embeddings
    rows = values["base.global_batch_tokens"] // context
    model = Transformer(plan.model, seed=0, device=device).compute_in(
        values["hardware.dtype"],
        checkpoint_activations=values["hardware.checkpoint_activations"],
    )
    base = {key.partition(".")[2]: v for key, v in values.items() if key.startswith("base.")}
    rates = LearningRates(**{f.name: base[f.name] for f in dataclasses.fields(LearningRates)})
    optimizers = Optimizers(model, rates)
    generator = torch.Generator().manual_seed(0)
    model.train()
    size: int = values["base.device_batch_size"]
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < LEAST_STEPS or time.perf_counter() - began < PROBE_SECONDS:
        ids = torch.randint(plan.model.vocab_size, (rows, context + 1), generator=generator)
        step_began = time.perf_counter()
        try:
            accumulate(model, ids, torch.ones_like(ids), size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size = (size + 1) // 2  # as training will
            optimizers.zero_grad()
            continue
        optimizers.step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - step_began)
    return rows * context / statistics.median(seconds[1:])
