"""Are a world's exams worth passing? Baselines, an untrained model, and a model of another seed.

    python benchmarks/worlds.py RUN [--other-seed N]

Prints, for the world of RUN: the share that the majority answer and the nearest training question
(BM25) get right, the scores of a model with fresh weights, those of RUN's last stage, and those of
the same model on the exam of another seed (for `village`, whose facts are new for every seed).
Multiple choice has a chance of 25 %; the other exams of 0 %. The letters and operands of another
village are not facts of it, so world_math and world_spell carry over by design.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fledge.data.worlds import load_world
from fledge.data.worlds.audit import audit
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.evals.examine import score_task
from fledge.evals.tasks.worlds import find_world_tasks
from fledge.model import Transformer
from fledge.run import Run


def scores(engine: Engine, world, title: str) -> None:
    """One line per exam."""
    engine.model.eval()
    print(f"\n{title}")
    for task in find_world_tasks(world, None):
        with Tools() as tools:
            result = score_task(engine, task, tools)
        print(
            f"  {result.name:12s} {result.value:6.1%} [{result.low:.1%}, {result.high:.1%}] "
            f"n={result.n} chance {result.chance:.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--other-seed", type=int, default=None)
    options = parser.parse_args()
    run = Run.read(options.run)
    data = run.recipe.data
    world = load_world(data.world, data.seed)
    found = audit(world, n_conversations=500, n_documents=8000, n_questions=200)
    print(f"{data.world}, seed {data.seed}: {len(world.facts)} facts, leaks {len(found.leaks)}")
    print("majority answer ", {k: round(v, 3) for k, v in found.majority.items()})
    print("nearest question", {k: round(v, 3) for k, v in found.nearest.items()})
    print("top answer      ", {k: round(v, 3) for k, v in found.top_answer.items()})
    print(f"mean answer entropy {found.answer_bits:.2f} bits")
    last = run.last_model()
    assert last is not None, "the run has no checkpoint"
    engine = Engine.from_folder(last[1])
    untrained = Engine(Transformer(engine.model.config, seed=0), engine.tokenizer)
    scores(untrained, world, "untrained model")
    scores(engine, world, f"{run.name}, {last[0]}, on its own exam")
    if options.other_seed is not None:
        other = load_world(data.world, options.other_seed)
        scores(engine, other, f"the same model on the exam of seed {options.other_seed}")


if __name__ == "__main__":
    main()
