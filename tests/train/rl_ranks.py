"""What one rank of `test_rl_ranks` does: a few steps of reinforcement. Torchrun's contract."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from fledge.dist import World, joined
from fledge.engine import Completion, Engine
from fledge.engine.tools import Tools
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.optim.sharded import ShardedOptimizers
from fledge.train import rl
from fledge.train.loop import Job
from tests.helpers_model import tiny_model
from tests.train.test_rl import TOKENIZER, Hooks, config

RATES = LearningRates(0.005, 0.01, 0.005, 0.002, 0.0)


def go(world: World, steps: int) -> dict[str, Any]:
    """The weights and rows after `steps` steps, and the answers that this rank graded, by problem.

    Odd numbers, that no rank's share divides; group statistics, a reference, two updates a batch
    and a refill take part.
    """
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
    answers: dict[int, list[list[int]]] = {}

    def reward(item: dict[str, Any], answer: Completion) -> rl.Graded:
        answers.setdefault(item["number"], []).append(answer.ids)
        right = answer.ids[0] % 8 == 0  # so rare that many a group has equal rewards
        return rl.Graded(float(right), right)

    more = {"refill_rounds": 1, "kl_beta": 0.1, "updates_per_batch": 2}
    with Tools() as tools:
        rl.train_rl(
            job,
            engine=Engine(model, TOKENIZER, deterministic=True),
            tools=tools,
            problem=lambda i: ({"number": i}, [i % 7 + 1]),
            reward=reward,
            config=dataclasses.replace(config("dapo", **more), prompts_per_step=5),
            reference=tiny_model(TOKENIZER.vocab_size),
        )
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, "rows": hooks.rows, "answers": answers}


def main() -> None:
    with joined() as world:
        torch.save(go(world, int(sys.argv[2])), Path(sys.argv[1]) / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main()
