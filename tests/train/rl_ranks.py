"""What one rank of `test_rl_ranks` does: three steps of reinforcement. Torchrun's contract."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from fledge.dist import World, joined
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.optim.sharded import ShardedOptimizers
from fledge.train import rl
from fledge.train.loop import Job
from tests.helpers_model import tiny_model
from tests.train.test_rl import TOKENIZER, Hooks, config, even_share

RATES = LearningRates(0.005, 0.01, 0.005, 0.002, 0.0)


def go(world: World, steps: int) -> dict:
    """The weights and rows after `steps` steps; odd numbers, that no rank's share divides."""
    model, hooks = tiny_model(TOKENIZER.vocab_size), Hooks()
    optimizers = ShardedOptimizers(model, RATES, world) if world.size > 1 else None
    job = Job(
        model,
        optimizers or Optimizers(model, RATES),
        Schedule(steps, 0, 0.0, 1.0),
        hooks,
        100,
        100,
        world=world,
    )
    with Tools() as tools:
        rl.train_rl(
            job,
            engine=Engine(model, TOKENIZER, deterministic=True),
            tools=tools,
            problem=lambda i: ({}, [i % 7 + 1]),
            reward=even_share,
            config=dataclasses.replace(config("dapo", refill_rounds=1), prompts_per_step=5),
        )
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, "rows": hooks.rows}


def main() -> None:
    with joined() as world:
        torch.save(go(world, int(sys.argv[2])), Path(sys.argv[1]) / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main()
