"""Three skills that a model of 0.1M parameters learns by reinforcement: copy, sort, add.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/rl_toys.py [copy sort add] [--loss dapo]

Made here from nothing, with the loop of `train.rl` and the engine. Worked examples are shown until
a few answers in a hundred are right; from there on the model is only told which places of its own
answers were right (the end is one of them). Without the examples it finds a constant answer and
stays with it. Exact answers are counted on problems that are never practised; the table goes to
benchmarks/rl_toys.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]

import torch  # noqa: E402
from bare_hooks import BareHooks  # noqa: E402

from fledge.engine import Completion, Engine, SamplingParams  # noqa: E402
from fledge.engine.tools import Tools  # noqa: E402
from fledge.model import ModelConfig, Transformer  # noqa: E402
from fledge.optim.groups import LearningRates, Optimizers  # noqa: E402
from fledge.optim.schedule import Schedule  # noqa: E402
from fledge.train import rl  # noqa: E402
from fledge.train.loop import Job  # noqa: E402

PLUS, EQUALS = 10, 11
BOS, END = 12, 13
VOCAB = 16
PROMPTS, SAMPLES = 64, 8
SHOWN_UNTIL = 0.12  # of the held-out problems
RATES = (0.0012, 0.0024, 0.0012, 0.0012)
_KINDS = ("python", "output")
TOOL = {f"<|{kind}_{end}|>": VOCAB + 1 for kind in _KINDS for end in ("start", "end")}
RESULTS, TABLE = (Path(__file__).with_suffix(end) for end in (".json", ".md"))


class Symbols:
    """Stands in for a tokenizer: ten digits, two signs, two marks; no tool can be called."""

    special_tokens = {"<|bos|>": BOS, "<|assistant_end|>": END} | TOOL

    def encode(self, text: str) -> list[int]:
        raise AssertionError("no text here")

    decode: Any = encode


@dataclass(frozen=True)
class Toy:
    """A skill: `make` gives (prompt, answer without its end) from a random source."""

    make: Callable[[random.Random], tuple[list[int], list[int]]]
    length: int
    steps: int


def copy(rng: random.Random) -> tuple[list[int], list[int]]:
    digits = [rng.randrange(10) for _ in range(4)]
    return [BOS, *digits, EQUALS], digits


def sort(rng: random.Random) -> tuple[list[int], list[int]]:
    digits = [rng.randrange(10) for _ in range(4)]
    return [BOS, *digits, EQUALS], sorted(digits)


def add(rng: random.Random) -> tuple[list[int], list[int]]:
    """37 + 48 = 58 0: the units first, as one adds by hand."""
    a, b = rng.randrange(100), rng.randrange(100)
    digits = [int(d) for d in f"{a + b:03d}"[::-1]]
    return [BOS, a // 10, a % 10, PLUS, b // 10, b % 10, EQUALS], digits


TOYS = {"copy": Toy(copy, 4, 200), "sort": Toy(sort, 4, 600), "add": Toy(add, 3, 1000)}


def held_out(prompt: list[int]) -> bool:
    """A tenth of all problems is kept for counting."""
    return random.Random(str(prompt)).random() < 0.1


def draw(toy: Toy, key: str, *, kept: bool) -> tuple[list[int], list[int]]:
    """The first problem of a sequence that is kept, or is not."""
    rng = random.Random(key)
    while True:
        prompt, answer = toy.make(rng)
        if held_out(prompt) is kept:
            return prompt, answer


def exact(engine: Engine, toy: Toy, count: int = 500) -> float:
    """Share of held-out problems answered right to the end, greedily."""
    asked = [draw(toy, f"exam {i}", kept=True) for i in range(count)]
    params = SamplingParams(max_tokens=toy.length + 1)
    done = engine.generate([prompt for prompt, _ in asked], params)
    return sum(c.ids == [*a, END] for (_, a), (c,) in zip(asked, done, strict=True)) / count


class Hooks(BareHooks):
    """Keeps the rows; there is nothing to save."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: Any) -> None:
        self.rows.append(row)
        if row["step"] % 25 == 0:
            told = ("step", "reward", "pass_at_1", "entropy", "seconds")
            print({key: round(row[key], 3) for key in told}, flush=True)

    def evaluate(self, step: int) -> dict[str, float]:
        return {}


def graded(item: dict[str, Any], completion: Completion) -> rl.Graded:
    """The share of places that are right, the end among them."""
    wanted = [*item["answer"], END]
    right = sum(a == b for a, b in zip(completion.ids, wanted, strict=False))
    return rl.Graded(right / len(wanted), completion.ids == wanted)


def show(model: Transformer, engine: Engine, toy: Toy, until: float) -> int:
    """Supervised steps on worked examples until `until` of the held-out ones are right."""
    optimizers = Optimizers(model, LearningRates(0.01, 0.01, 0.005, 0.005, 0.0))
    for step in range(5000):
        model.eval()
        if exact(engine, toy, 200) >= until:
            return step
        model.train()
        rows = [draw(toy, f"shown {step} {i}", kept=False) for i in range(128)]
        ids = torch.tensor([[*p, *a, END] for p, a in rows])
        weights = torch.zeros(ids.shape)
        weights[:, len(rows[0][0]) :] = 1.0
        weights /= weights.sum()
        model.add_gradients(ids[:, :-1], ids[:, 1:], weights[:, 1:])
        optimizers.step()
        engine.weights_changed()
    raise SystemExit("it did not learn from the examples")


def learn(name: str, loss: Any, seed: int = 0) -> dict[str, Any]:
    """One skill from nothing; what it could before and after reinforcement."""
    toy = TOYS[name]
    config = ModelConfig(VOCAB, 64, 2, 4, 4, 16, 192, 32, tie_word_embeddings=False)
    model = Transformer(config, seed=seed)
    engine = Engine(model, Symbols(), slots=1024)  # type: ignore[arg-type]
    began = time.perf_counter()
    shown = show(model, engine, toy, SHOWN_UNTIL)
    model.eval()
    before, warm = exact(engine, toy), time.perf_counter() - began
    hooks = Hooks()
    optimizers = Optimizers(model, LearningRates(*RATES, 0.0))

    def problem(index: int) -> tuple[dict[str, Any], list[int]]:
        prompt, answer = draw(toy, f"problem {seed} {index}", kept=False)
        return {"answer": answer}, prompt

    with Tools() as tools:
        rl.train_rl(
            Job(model, optimizers, Schedule(toy.steps, 5, 0.5, 0.1), hooks, 10**6, 10**6),
            engine=engine,
            tools=tools,
            problem=problem,
            reward=graded,
            config=rl.RlConfig(PROMPTS, SAMPLES, toy.length + 1, 1.0, seed, loss=loss),
        )
    model.eval()
    seconds = time.perf_counter() - began
    print(
        f"{name} ({loss}): {before:.1%} -> {exact(engine, toy):.1%} in {seconds:.0f} s"
        f" ({shown} steps of examples, {warm:.0f} s; {toy.steps} of reinforcement)"
    )
    return {"name": name, "loss": loss, "before": before, "after": exact(engine, toy),
            "seconds": seconds, "shown": shown, "steps": toy.steps}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="skills that are learnt by reinforcement")
    parser.add_argument("toys", nargs="*", default=[*TOYS])
    parser.add_argument("--loss", default="dapo")
    args = parser.parse_args()
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    stored |= {name: learn(name, args.loss) for name in args.toys}
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    found = [stored[name] for name in TOYS if name in stored]
    lines = [
        "# Skills by reinforcement, from nothing",
        "",
        f"`benchmarks/rl_toys.py`, {torch.get_num_threads()} threads, {platform.machine()}, torch"
        f" {torch.__version__}. Exact answers on 500 problems that were never practised.",
        "",
        "| skill | loss | before | after | steps of examples | steps of reinforcement | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for f in found:
        lines.append(
            f"| {f['name']} | {f['loss']} | {f['before']:.1%} | {f['after']:.1%} | {f['shown']} |"
            f" {f['steps']} | {f['seconds']:.0f} |"
        )
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
