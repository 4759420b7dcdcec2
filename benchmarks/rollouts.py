"""How fast answers for reinforcement are sampled, beside one prompt at a time.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/rollouts.py                       (shape d4)
    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/rollouts.py --run runs/quickstart  (a real stage)

Three ways to sample the same answers with the same model, in turns, in one process: all prompts at
once, as `train.rl` does; one prompt with its group, as nanochat does; one answer after another.
All three by the engine, with the log-probabilities that the loss needs; the stage's engine is
deterministic, as in a run on a CPU. Random weights answer at full length; a run's sft model answers
the run's problems with its tool and stops when it likes. Adds to benchmarks/rollouts.json; the
table goes to benchmarks/rollouts.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python")]

import torch  # noqa: E402

from fledge.bench import infer  # noqa: E402
from fledge.engine import Completion, Engine, SamplingParams  # noqa: E402
from fledge.engine.tools import Tools  # noqa: E402
from fledge.model import Transformer  # noqa: E402

RESULTS, TABLE = (Path(__file__).with_suffix(end) for end in (".json", ".md"))
PROMPT_TOKENS, NEW_TOKENS = 120, 256  # as in the measurement of nanochat (1,071 tokens/s)


def sampled(groups: Sequence[Sequence[Completion]]) -> int:
    return sum(sum(c.sampled_mask) for group in groups for c in group)


def ways(
    engine: Engine, prompts: list[list[int]], params: SamplingParams, tools: Tools | None, few: int
) -> dict[str, Callable[[], int]]:
    """Name -> samples and says how many tokens; the slow ways take fewer prompts."""
    from dataclasses import replace

    one = replace(params, n=1)

    def together() -> int:
        return sampled(engine.generate(prompts, params, tools))

    def by_prompt() -> int:
        return sum(sampled(engine.generate([p], params, tools)) for p in prompts[: few * 2])

    def by_answer() -> int:
        return sum(sampled(engine.generate([p], one, tools)) for p in prompts[:few])

    return {"all together": together, "one prompt at a time": by_prompt,
            "one answer at a time": by_answer}  # fmt: skip


def measure(found: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each way: median, least, most of alternating repeats."""
    rates: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, work in found.items():
            began = time.perf_counter()
            tokens = work()
            if repeat:  # the first of each warms up
                rates[name].append(tokens / (time.perf_counter() - began))
    return {
        name: {"median": statistics.median(r), "least": min(r), "most": max(r)}
        for name, r in rates.items()
    }


def shape(repeats: int, prompts: int, samples: int) -> dict[str, Any]:
    """Random weights in the shape of depth 4: every answer has its full length."""
    torch.manual_seed(0)
    config = infer.SHAPES["d4"]
    model = Transformer(config, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    engine = Engine(model, infer.NoText(), deterministic=True)  # type: ignore[arg-type]
    rows = [[(7 * i + 31 * j) % 30000 for j in range(PROMPT_TOKENS)] for i in range(prompts)]
    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=1.0, n=samples, seed=1, ignore_eos=True
    )
    rates = measure(ways(engine, rows, params, None, 1), repeats)
    what = f"d4, vocabulary {config.vocab_size:,}, prompts of {PROMPT_TOKENS}, {NEW_TOKENS} new"
    return {"what": what, "prompts": prompts, "samples": samples, "rates": rates}


def stage(path: str, repeats: int, prompts: int, samples: int) -> dict[str, Any]:
    """The sft model of a run on the problems of its rl stage."""
    from fledge.run import Run
    from fledge.stages.material import open_material
    from fledge.tokenizer import Tokenizer
    from fledge.tokenizer.chat import render_prompt

    run = Run.read(Path(path))
    folder = run.latest_checkpoint("sft")
    assert folder is not None, "the run has no sft model"
    tokenizer, material = Tokenizer.load(folder), open_material(run.recipe)
    items = [material.problem(i) for i in range(prompts)]
    rows = [render_prompt(tokenizer, item["messages"]) for item in items if item is not None]
    engine = Engine(Transformer.load(folder).eval(), tokenizer, deterministic=True)
    most = run.recipe.rl.max_new_tokens or 128
    params = SamplingParams(max_tokens=most, temperature=1.0, n=samples, seed=1)
    with Tools() as tools:
        rates = measure(ways(engine, rows, params, tools, 8), repeats)
    what = f"{run.name}: sft model, problems of rl, at most {most} new, python tool"
    return {"what": what, "prompts": prompts, "samples": samples, "rates": rates}


def table(stored: dict[str, Any]) -> str:
    lines = [
        "# Sampling answers for reinforcement",
        "",
        f"`benchmarks/rollouts.py`, {stored['threads']} threads, {stored['cpu']}, torch"
        f" {stored['torch']}, {stored['date']}. Sampled tokens per second: median (least to most);"
        " the three ways take turns in one process.",
        "",
        "| what | prompts x samples | all together | one prompt with its group | one answer | times"
        " faster than a prompt at a time | than an answer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in stored["entries"].values():
        rates = list(entry["rates"].values())
        cells = [f"{r['median']:,.0f} ({r['least']:,.0f} to {r['most']:,.0f})" for r in rates]
        times = [f"{rates[0]['median'] / r['median']:.1f}" for r in rates[1:]]
        shape = f"{entry['prompts']} x {entry['samples']}"
        lines.append(f"| {' | '.join([entry['what'], shape, *cells, *times])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="sampling for reinforcement, three ways")
    parser.add_argument("--run", help="a run with an sft model; without it random weights of d4")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    size = (args.repeats, args.prompts, args.samples)
    entry = stage(args.run, *size) if args.run else shape(*size)
    empty: dict[str, Any] = {"entries": {}}
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else empty
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    stored |= {"threads": torch.get_num_threads(), "cpu": cpu, "torch": str(torch.__version__),
               "date": str(date.today())}  # fmt: skip
    stored["entries"][entry["what"]] = entry
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    TABLE.write_text(table(stored), encoding="utf-8")
    print(table(stored))


if __name__ == "__main__":
    main()
