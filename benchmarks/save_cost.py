"""What saving a checkpoint costs a training run, written at once or behind the loop's back.

    quiet .venv/bin/python benchmarks/save_cost.py [--depth 4] [--vocab 8192] [--rounds 5]

Rounds of three runs of the same few steps: without a save, with one written at once, with one
written in the background, in an order that turns from round to round. What a save costs is the
difference to the run without, each over the same steps; median of the rounds. The background run
ends when its checkpoint is on the disk, and when it is not waited for (as in a long run, where the
next steps hide it) it is given as well. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]

import torch  # noqa: E402

from fledge import files  # noqa: E402
from fledge.model import Transformer  # noqa: E402
from fledge.optim.groups import LearningRates, Optimizers  # noqa: E402
from fledge.plan.scaling import model_config  # noqa: E402
from fledge.stages.pipeline import keep_freed_memory  # noqa: E402
from fledge.train import checkpoint  # noqa: E402
from fledge.train.saving import Saver, host_copies  # noqa: E402

RATES = LearningRates(0.02, 0.2, 0.01, 0.01, 0.0)


class Training:
    """A model and its optimizers on random tokens."""

    def __init__(self, depth: int, vocab: int, rows: int) -> None:
        config = model_config(depth, vocab_size=vocab, arch="speedrun", max_seq_len=512)
        self.model = Transformer(config, seed=0)
        self.optimizers = Optimizers(self.model, RATES)
        self.ids = torch.randint(0, vocab, (rows, 513))
        self.weights = torch.full((rows, 512), 1.0 / (rows * 512))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.model.add_gradients(self.ids[:, :-1], self.ids[:, 1:], self.weights)
            self.optimizers.step()

    def save(self, folder: Path, *, behind: bool) -> Saver:
        """As `stages.training` does it."""
        tensors, weights = self.optimizers.state_tensors(), None
        if behind:
            weights = host_copies(dict(self.model.named_parameters()))
            tensors = host_copies(tensors)

        def write() -> None:
            with files.atomic_directory(folder) as place:
                checkpoint.write(
                    place,
                    model=self.model,
                    optimizers=self.optimizers,
                    state={"step": 1},
                    token_ids={},
                    tensors=tensors,
                    weights=weights,
                )

        saver = Saver(behind=behind)
        saver.submit(write)
        return saver


def seconds_of(training: Training, steps: int, folder: Path, how: str) -> tuple[float, float]:
    """(until the steps are done, until the checkpoint is on the disk, too)."""
    began = time.perf_counter()
    saver = None
    if how != "none":
        saver = training.save(folder, behind=how == "behind")
    training.steps(steps)
    stepped = time.perf_counter() - began
    if saver is not None:
        saver.wait()
    return stepped, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens, a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    training = Training(args.depth, args.vocab, args.rows)
    training.steps(3)
    ways = ["none", "at once", "behind"]
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        for number in range(args.rounds):
            for way in ways[number % 3 :] + ways[: number % 3]:
                target = Path(folder) / f"step_{number}_{ways.index(way)}"
                found[way].append(seconds_of(training, args.steps, target, way))
                files.remove(target)
    none = statistics.median(all_ for _, all_ in found["none"])

    def cost(way: str, which: int) -> float:
        return round(statistics.median(times[which] for times in found[way]) - none, 3)

    print(
        json.dumps(
            {
                "parameters": sum(p.numel() for p in training.model.parameters()),
                "seconds_per_step": round(none / args.steps, 3),
                "at_once": cost("at once", 1),
                "behind_until_steps_done": cost("behind", 0),
                "behind_until_on_disk": cost("behind", 1),
            }
        )
    )


if __name__ == "__main__":
    main()
