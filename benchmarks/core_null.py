"""What an untrained model scores on CORE: the check that no number comes from the evaluator itself.

    FLEDGE_DATA=../shared/data python benchmarks/core_null.py [--max-examples 500] [--seeds 3]

Random models of quickstart's shape, gold labels permuted among the rows. On a choice task the
accuracy must lie inside the interval around 1 / (number of choices), widened so that all tasks and
seeds together are wrong once in twenty times (Bonferroni); an exact continuation may be hit in at
most 1 % of the rows. The published baselines are not the yardstick: boolq's is 62 %. Prints a line
a task and ends with 1 if any is outside.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import tempfile
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from benchmarks.core_speed import random_model  # noqa: E402

from fledge.data.overlap import read_texts  # noqa: E402
from fledge.data.task_files import TaskData  # noqa: E402
from fledge.engine import Engine  # noqa: E402
from fledge.evals.core_exam import examine_core_task  # noqa: E402
from fledge.evals.tasks.core import find_core  # noqa: E402
from fledge.stats import wilson_interval  # noqa: E402


def permuted(rows: Any, seed: int) -> list[dict[str, Any]]:
    """The rows with their gold labels dealt out anew among rows of as many choices."""
    draw = random.Random(seed)
    table = [dict(row) for row in rows]
    by_size: dict[int, list[int]] = {}
    for i, row in enumerate(table):
        if "gold" in row:
            size = len(row.get("choices") or row["context_options"])
            by_size.setdefault(size, []).append(i)
    for places in by_size.values():
        gold = [table[i]["gold"] for i in places]
        draw.shuffle(gold)
        for i, label in zip(places, gold, strict=True):
            table[i]["gold"] = label
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--max-examples", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    root = Path(os.environ["FLEDGE_DATA"])
    exams, notes = find_core(TaskData(root, use_hub=False))
    assert not notes, notes
    texts = list(itertools.islice(read_texts(root / "pretrain" / "val.jsonl.zst"), 150))
    choices = sum(exam.task.kind != "language_modeling" for exam in exams)
    z = NormalDist().inv_cdf(1 - 0.05 / 2 / (choices * args.seeds))
    outside = 0
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            random_model(Path(folder), texts, seed=seed)
            engine = Engine.from_folder(folder)
        engine.model.eval()
        for exam in exams:
            rows = permuted(exam.rows, seed)
            result = examine_core_task(engine, exam.task, rows, max_examples=args.max_examples)
            right = round(result.value * result.n)
            low, high = wilson_interval(right, result.n, z=z)
            guess = result.details["guessing"]
            is_choice = exam.task.kind != "language_modeling"
            fine = low <= guess <= high if is_choice else result.value <= 0.01
            outside += not fine
            print(
                f"seed {seed} {exam.name:<40} {100 * result.value:6.2f} % of {result.n}, guessing "
                f"{100 * guess:5.2f} %{'' if fine else '   OUTSIDE'}",
                flush=True,
            )
    print(f"{outside} outside, threads {torch.get_num_threads()}, z {z:.2f}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
