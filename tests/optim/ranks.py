"""What one rank of `test_sharded` does: train, save, go on. Started by torchrun's contract."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fledge.data.loader import Loader
from fledge.dist import World, joined
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.optim.sharded import ShardedOptimizers
from fledge.train.loop import Job, train
from tests.model.test_extras import ALL, speedrun
from tests.train.test_loop import Counting, Hooks

RATES = LearningRates(0.02, 0.05, 0.01, 0.002, 0.1, 0.9)
SCHEDULE = Schedule(20, 2, 0.5, 0.1)


class Keeping(Hooks):
    """Keeps what a checkpoint would hold at every save."""

    held: dict[str, dict[str, torch.Tensor]]

    def save(self, step):
        self.saved.append(step)
        assert self.job is not None
        tensors = {f"weight/{n}": p.detach() for n, p in self.job.model.named_parameters()}
        self.held = {"weights": tensors, "state": self.job.optimizers.state_tensors()}


def go(
    world: World,
    steps: int,
    resume: dict | None,
    first: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Keeping, Job]:
    """Trains the all-extras network on 5 rows a step, up to `steps`.

    In float32 with a tenth of the rates: AdamW turns the rounding of a gradient near zero into a
    whole step, and 80 tokens have many such (docs/log.md).
    """
    rates = RATES if dtype == torch.float64 else RATES.scaled(0.1)
    torch.manual_seed(0)
    config = speedrun(**(ALL | {"norm_weights": True, "vocab_size": 97})).config
    model = Transformer(config, seed=0).to(dtype)
    if world.size > 1:
        optimizers: Optimizers = ShardedOptimizers(model, rates, world)
    else:
        optimizers = Optimizers(model, rates)
    loader = Loader(Counting(), row_tokens=16, pad_id=0, split=True)
    if resume is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(resume["weights"][f"weight/{name}"])
        optimizers.load_state_tensors(resume["state"])
        for _ in range(first):
            loader.batch(5)
    hooks = Keeping()
    schedule = SCHEDULE if steps == SCHEDULE.steps else Shortened(SCHEDULE, steps)
    job = Job(model, optimizers, schedule, hooks, 10**6, 10**6, first, world=world)
    hooks.job = job
    train(job, loader, rows_per_step=5, device_batch_size=2)
    return hooks, job


def Shortened(schedule: Schedule, steps: int) -> Schedule:
    """The same curve, stopped early."""

    class Stopped(Schedule):
        def factor(self, step):
            return schedule.factor(step)

    return Stopped(steps, schedule.warmup_steps, 0.5, 0.1)


def main() -> None:
    out, steps, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    dtype = getattr(torch, sys.argv[4])
    resume = torch.load(sys.argv[5]) if len(sys.argv) > 5 else None
    with joined() as world:
        hooks, _ = go(world, steps, resume, first, dtype)
        result = {**hooks.held, "losses": [r["loss"] for r in hooks.rows]}
        result["norms"] = [r["gradient_norm"] for r in hooks.rows]
        torch.save(result, out / f"rank{world.rank}.pt")


if __name__ == "__main__":
    main()
