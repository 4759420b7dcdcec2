"""One short pretraining on real text: a recipe's keys and a number of tokens in, bits per byte out.

What benchmarks/quality.py and benchmarks/ablation.py share. A `Subject` is a recipe (keys of
`fledge run`, planned by the planner) and, for a baseline, plain AdamW instead of the recipe's
optimizers. `speed` measures its tokens a second in real steps; `train_and_measure` trains it with
`fledge.train.loop` and scores whole held-out documents: every byte once, behind at least half a
context. So the result depends on keys, tokens, seed and text, never on who else computes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bare_hooks import BareHooks

from fledge.config import recipe_from_dict
from fledge.data.loader import Ahead, Loader
from fledge.data.sources import Corpus, open_corpus
from fledge.data.tokenized import TextDocuments
from fledge.engine import Engine
from fledge.errors import Interrupted
from fledge.evals import bpb
from fledge.model import Transformer
from fledge.optim.adamw import AdamW
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.plan.hardware import detect
from fledge.plan.planner import Plan, resolve
from fledge.stages.pipeline import keep_freed_memory
from fledge.tokenizer import Tokenizer
from fledge.train.loop import Job, train

MAX_BYTES = 60_000_000  # of the text
TOKENIZER_BYTES = 10_000_000
VALIDATION_BYTES = 400_000
NEVER = 10**9
PLAIN_BETAS, PLAIN_DECAY = (0.9, 0.95), 0.1  # GPT-3's (arXiv 2005.14165), and nanoGPT's since


@dataclass(frozen=True)
class Subject:
    """What is trained: keys as "section.key" -> value; `plain_lr` = all of it under plain AdamW."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    plain_lr: float | None = None

    def plan(self, tokens: int, seed: int) -> Plan:
        """The planner's numbers for so many tokens."""
        keys = {"data.world": "none", "data.source": "-", "base.tokens": tokens}
        keys |= {"base.seed": seed} | self.keys
        tables: dict[str, dict[str, Any]] = {}
        for key, value in keys.items():
            section, _, name = key.partition(".")
            tables.setdefault(section, {})[name] = value
        return resolve(recipe_from_dict(tables, where=self.name), detect())


class PlainAdamW(Optimizers):
    """Every parameter under AdamW at one rate; only matrices of the blocks decay."""

    def __init__(self, model: Transformer, rates: LearningRates, lr: float) -> None:
        super().__init__(model, rates)
        matrices = [p for group in self.muon.param_groups for p in group["params"]]
        others = [p for group in self.adamw.param_groups for p in group["params"]]
        self.adamw = AdamW(
            [
                {"params": params, "lr": lr, "betas": PLAIN_BETAS, "weight_decay": decay}
                for params, decay in ((matrices, PLAIN_DECAY), (others, 0.0))
            ],
            eps=1e-8,
        )
        for group in self.muon.param_groups:
            group["params"] = []
        self.all = (self.adamw,)
        for group in self.adamw.param_groups:
            group["peak_lr"], group["peak_decay"] = group["lr"], group["weight_decay"]


class _Clock(BareHooks):
    """Hooks that keep the time of every step, and stop the loop when `enough` says so."""

    def __init__(self, enough: Callable[[list[float]], bool] = lambda rates: False) -> None:
        self.rates: list[float] = []
        self._enough = enough
        self._since = time.perf_counter()

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def log(self, row: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.rates.append(row["tokens"] / (now - self._since))
        self._since = now

    def stop_requested(self) -> bool:
        return self._enough(self.rates)


class Text:
    """The documents, and a tokenizer of each vocabulary that was asked for, kept in a folder."""

    def __init__(self, source: Path, max_bytes: int, folder: Path) -> None:
        self.corpus: Corpus = open_corpus(source, max_bytes=max_bytes)
        self._folder = folder

    def tokenizer(self, vocab_size: int, pattern: str) -> Tokenizer:
        """Trained on the first bytes of the documents, or loaded if it was."""
        path = self._folder / f"tokenizer-{vocab_size}-{pattern}"
        if not path.is_dir():
            texts = self.corpus.one_epoch(0)
            trained = Tokenizer.train(
                _up_to(texts, TOKENIZER_BYTES), vocab_size=vocab_size, pattern=pattern
            )
            trained.save(path)
        return Tokenizer.load(path)

    def held_out(self) -> list[str]:
        """The first documents of the validation split, VALIDATION_BYTES or a little more."""
        return [*_up_to(islice(self.corpus.val, len(self.corpus.val)), VALIDATION_BYTES)]


def _up_to(texts: Iterator[str], limit: int) -> Iterator[str]:
    seen = 0
    for text in texts:
        yield text
        seen += len(text.encode("utf-8"))
        if seen >= limit:
            return


def speed(subject: Subject, text: Text, *, seconds: float) -> float:
    """Tokens a second: the median step, optimizer and data included, the first two left out."""
    began = time.perf_counter()
    clock = _Clock(lambda rates: len(rates) > 4 and time.perf_counter() - began > seconds)
    plan = subject.plan(4_000_000, 0)
    with contextlib.suppress(Interrupted):
        _train(subject, plan, text, clock, seed=0)
    return statistics.median(clock.rates[2:])


def train_and_measure(subject: Subject, text: Text, *, tokens: int, seed: int) -> dict[str, Any]:
    """Bits per byte of unseen documents after `tokens`, with what was done to get there."""
    plan = subject.plan(tokens, seed)
    began = time.perf_counter()
    model, tokenizer = _train(subject, plan, text, _Clock(), seed=seed)
    trained = time.perf_counter()
    model.eval()
    losses = bpb.full_documents(Engine(model, tokenizer), text.held_out())
    return {
        "name": subject.name,
        "keys": subject.keys,
        "plain_lr": subject.plain_lr,
        "seed": seed,
        "tokens": plan.values["base.tokens"],
        "steps": plan.values["base.tokens"] // plan.values["base.global_batch_tokens"],
        "parameters": plan.estimates["parameters"],
        "bpb": losses.bpb,
        "scored_bytes": losses.bytes,
        "wall_seconds": round(trained - began, 1),
    }


def _train(
    subject: Subject, plan: Plan, text: Text, hooks: _Clock, *, seed: int
) -> tuple[Transformer, Tokenizer]:
    values = plan.values
    tokenizer = text.tokenizer(values["tokenizer.vocab_size"], values["tokenizer.pattern"])
    base = {key[5:]: value for key, value in values.items() if key.startswith("base.")}
    model = Transformer(plan.model, seed=seed).compute_in(values["hardware.dtype"])
    rates = LearningRates.of(SimpleNamespace(**base))
    optimizers = (
        Optimizers(model, rates)
        if subject.plain_lr is None
        else PlainAdamW(model, rates, subject.plain_lr)
    )
    context = plan.model.max_position_embeddings
    rows = base["global_batch_tokens"] // context
    steps = max(1, base["tokens"] // base["global_batch_tokens"])
    schedule = Schedule(
        steps,
        min(base["warmup_steps"], steps // 2),
        *(base[name] for name in ("cooldown_fraction", "final_lr_fraction", "cooldown_shape")),
        *(base[name] for name in ("decay_schedule", "momentum_schedule")),
    )
    loader = Loader(
        TextDocuments(text.corpus.order("train", seed), tokenizer),
        row_tokens=context,
        pad_id=tokenizer.pad_id,
        split=True,
    )
    job = Job(model, optimizers, schedule, hooks, NEVER, NEVER)
    with Ahead(loader, rows) as ahead:
        train(
            job,
            ahead,
            rows_per_step=rows,
            device_batch_size=min(rows, base["device_batch_size"]),
        )
    return model, tokenizer


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """What the benchmarks have in common on the command line."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="a folder of real text")
    parser.add_argument("--out", type=Path, required=True, help="where rows and speeds are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of this process; speeds need all cores")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--table", action="store_true")
    return parser


def prepared(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, with threads and memory set as a run sets them."""
    wanted = parser.parse_args()
    if wanted.threads:
        torch.set_num_threads(wanted.threads)
    keep_freed_memory()
    return wanted


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more line, at once: a stopped benchmark keeps what it has."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
