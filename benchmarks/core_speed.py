"""How fast CORE is scored: our batches beside one example per forward pass, and beside lm-eval.

    FLEDGE_DATA=../shared/data python benchmarks/core_speed.py [--model runs/quickstart] [--json]

Three scorers get the very same prompts (22 tasks, at most 100 examples each) and must agree:
`batched` is what `fledge eval --tasks core` does; `one example` is the same code with one example
per forward pass; `plain` is the usual loop (nanochat's): one example per forward pass, its choices
as padded rows, logits of every position. Then lm-eval runs eight tasks with its own HFLM and with
our adapter (needs the `harness` extra). Without --model a random model of quickstart's shape is
made. Prints a table; the numbers stand in core_speed.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from fledge.config import ModelConfig  # noqa: E402
from fledge.data.overlap import read_texts  # noqa: E402
from fledge.data.task_files import TaskData  # noqa: E402
from fledge.engine import Engine  # noqa: E402
from fledge.evals.core_prompts import Example, examples  # noqa: E402
from fledge.evals.scoring import Likelihood, Request, loglikelihood  # noqa: E402
from fledge.evals.tasks.core import find_core  # noqa: E402
from fledge.model import Transformer  # noqa: E402
from fledge.run import find_checkpoint  # noqa: E402
from fledge.tokenizer import Tokenizer  # noqa: E402


def random_model(folder: Path, texts: list[str], *, seed: int = 0) -> None:
    """A random model of quickstart's shape: depth 3, width 192, 4096 tokens, context 256."""
    tokenizer = Tokenizer.train(iter(texts), vocab_size=4096, pattern="qwen2")
    config = ModelConfig(4096, 192, 3, 3, 3, 64, 512, 256, tie_word_embeddings=True)
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save(folder)
    tokenizer.save(folder)


def requests_of(example: Example) -> list[Request]:
    return [Request([*span.ids], span.start) for span in example.spans]


def batched(engine: Engine, tasks: list[list[Example]]) -> list[list[Likelihood]]:
    return [loglikelihood(engine, [r for e in task for r in requests_of(e)]) for task in tasks]


def one_example(engine: Engine, tasks: list[list[Example]]) -> list[list[Likelihood]]:
    """The same code, an example at a time."""
    return [[x for e in task for x in loglikelihood(engine, requests_of(e))] for task in tasks]


@torch.inference_mode()
def plain(engine: Engine, tasks: list[list[Example]]) -> list[list[Likelihood]]:
    """An example at a time, choices as padded rows, the logits and losses of all positions."""
    found = []
    for task in tasks:
        found.append([])
        for example in task:
            width = max(len(span.ids) for span in example.spans)
            ids = torch.zeros(len(example.spans), width, dtype=torch.long)
            for row, span in zip(ids, example.spans, strict=True):
                row[: len(span.ids)] = torch.tensor(span.ids)
            logits = engine.model(ids)
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(len(ids), -1)
            best = logits.argmax(-1)
            for row, span in enumerate(example.spans):
                at = slice(span.start - 1, len(span.ids) - 1)
                right = best[row, at] == ids[row, span.start : len(span.ids)]
                found[-1].append(Likelihood((-losses[row, at]).tolist(), right.tolist()))
    return found


def furthest(a: list[list[Likelihood]], b: list[list[Likelihood]]) -> float:
    """Largest difference of two log-probabilities."""
    pairs = zip(itertools.chain(*a), itertools.chain(*b), strict=True)
    return max(abs(x - y) for p, q in pairs for x, y in zip(p.logprobs, q.logprobs, strict=True))


CLOCK = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCK["wall"]


def timed(function: Any, *words: Any) -> tuple[float, Any]:
    began = clock()
    result = function(*words)
    return clock() - began, result


def core(engine: Engine, data: TaskData, cap: int) -> dict[str, Any]:
    exams, notes = find_core(data)
    context = engine.model.config.max_position_embeddings
    seconds, tasks = timed(
        lambda: [
            list(
                examples(
                    exam.task, exam.rows, engine.tokenizer,
                    profile="nanochat", max_examples=cap, context=context,
                )
            )
            for exam in exams
        ]
    )  # fmt: skip
    batched(engine, tasks[:2])  # warm
    rows: dict[str, Any] = {"tasks": len(exams), "missing": notes, "prompt_seconds": seconds}
    rows["examples"] = sum(map(len, tasks))
    times, results = {}, {}
    for scorer in (batched, one_example, plain) * 2:  # in turns; of each the faster one counts
        took, results[scorer.__name__] = timed(scorer, engine, tasks)
        times[scorer.__name__] = min(took, times.get(scorer.__name__, took))
    rows["seconds"] = times
    rows["speedup"] = {name: times[name] / times["batched"] for name in ("one_example", "plain")}
    rows["whole_speedup"] = (seconds + times["plain"]) / (seconds + times["batched"])
    rows["largest_difference"] = furthest(results["batched"], results["plain"])
    each: dict[str, list[float]] = {}
    for exam, task in zip(exams, tasks, strict=True):
        fast, slow = timed(batched, engine, [task])[0], timed(plain, engine, [task])[0]
        each[exam.name] = [fast, slow, slow / fast]
    rows["by_task"] = each
    return rows


def lm_eval_rows(folder: Path, root: Path, cap: int) -> dict[str, Any] | None:
    """Seconds of lm-eval's whole run of the eight tasks with its model class and with ours."""
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    from tests.helpers_lm_eval import local_tasks

    from fledge.evals.harness import FledgeLM

    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        tasks = local_tasks(root, Path(place), cap)

        def run(lm: Any) -> Any:
            return lm_eval.simple_evaluate(
                model=lm, tasks=[dict(task) for task in tasks], bootstrap_iters=0
            )

        run(FledgeLM(folder))  # datasets are cached now
        rows: dict[str, Any] = {"examples": cap * len(tasks)}
        models: dict[str, Any] = {"fledge": FledgeLM(folder)}
        for size in (1, 64):
            models[f"hf_batch_{size}"] = HFLM(
                pretrained=str(folder), dtype="float32", batch_size=size, device="cpu"
            )
        found: dict[str, Any] = {}
        for name, lm in [*models.items()] * 2:
            seconds, found[name] = timed(run, lm)
            rows[name] = min(seconds, rows.get(name, seconds))
        ours, theirs = found["fledge"], found["hf_batch_64"]
        names = [task["task"] for task in tasks]
        rows["same_scores"] = all(
            abs(ours["results"][n]["acc,none"] - theirs["results"][n]["acc,none"]) < 1e-9
            for n in names
        )
        rows["ratio"] = min(rows["hf_batch_1"], rows["hf_batch_64"]) / rows["fledge"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a run or a model folder")
    parser.add_argument("--max-examples", type=int, default=100)
    parser.add_argument(
        "--clock", choices=CLOCK, default="wall",
        help="cpu: seconds of this process, for a machine that others use too; with one thread",
    )  # fmt: skip
    parser.add_argument("--skip-lm-eval", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    global clock
    clock = CLOCK[args.clock]
    if args.clock == "cpu":
        torch.set_num_threads(1)
    root = Path(os.environ["FLEDGE_DATA"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if args.model is not None:
            folder, _, _ = find_checkpoint(args.model)
        else:
            val = root / "pretrain" / "val.jsonl.zst"
            random_model(folder, list(itertools.islice(read_texts(val), 150)))
        engine = Engine.from_folder(folder)
        engine.model.eval()
        table: dict[str, Any] = {"threads": torch.get_num_threads(), "clock": args.clock}
        table["torch"] = torch.__version__
        table["core"] = core(engine, TaskData(root, use_hub=False), args.max_examples)
        if not args.skip_lm_eval:
            table["lm_eval"] = lm_eval_rows(folder, root, args.max_examples)
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
