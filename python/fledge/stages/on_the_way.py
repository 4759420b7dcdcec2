"""ChatCORE while a stage trains: a small exam every so many steps, as rows of metrics.

`looks` makes the trainer's `EvalHook` for mid and sft (called by `stages.chats`). All ranks take
part, each with every n-th question. The weights are the same with and without it: random numbers
and the training mode are put back. It keeps no records: the exams at the end do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fledge.dist import World
from fledge.evals import suite
from fledge.evals.examine import pick_items
from fledge.evals.tasks.base import Item, Task
from fledge.model import Transformer
from fledge.stages.context import StageContext
from fledge.stages.inference import stage_engine
from fledge.stages.own_files import ChatStage
from fledge.tokenizer import Tokenizer
from fledge.train.loop import EvalHook
from fledge.train.metrics import Row


def looks(ctx: StageContext, stage: ChatStage) -> list[tuple[int, EvalHook]]:
    """(steps between two looks, the look), if the plan wants any and the data has exams."""
    section: Any = getattr(ctx.recipe, stage)  # Any: a planned section has no absent values
    if not section.chatcore_every:
        return []
    found = {task.name: task for task in ctx.material.tasks(ctx.recipe.evaluate.tasks)}
    tasks = [found[name] for name in suite.chatcore_tasks(found)]
    if not tasks:
        ctx.progress.note(f"{stage}: no ChatCORE on the way, for the data has none of its tasks")
        return []

    def look(model: Transformer, step: int) -> Row:
        began = time.perf_counter()
        with undisturbed(model):
            row = measure(model, ctx.tokenizer, tasks, section.chatcore_examples, ctx.world)
        return row | {"chatcore_seconds": time.perf_counter() - began}

    return [(section.chatcore_every, look)]


def measure(
    model: Transformer, tokenizer: Tokenizer, tasks: Sequence[Task], examples: int, world: World
) -> Row:
    """ChatCORE, and the share of right answers of each task, over all ranks."""
    engine, device = stage_engine(model, tokenizer), model.cos.device
    right = {}
    for task in tasks:
        part = Part(task, examples, world)
        records = suite.take(engine, part, suite.Options()).records if part.items() else []
        right[task.name] = sum(float(record["score"]) for record in records)
    world.wait()  # however long the slowest of them talks
    scores: dict[str, Any] = {}
    for task in tasks:
        n = len(pick_items(task.items(), examples))
        value = world.sum_number(right[task.name], device) / n
        scores[task.name] = {"value": value, "chance": task.chance, "n": n}
    table = suite.chatcore(scores)
    assert table is not None
    each = {f"chatcore_{name}": score["value"] for name, score in scores.items()}
    return {"chatcore": table["value"], **each}


@dataclass(frozen=True)
class Part:
    """A few questions of a task: those of one rank."""

    task: Task
    examples: int
    world: World

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def kind(self) -> Literal["generate", "choice", "reply", "core"]:
        return self.task.kind

    @property
    def chance(self) -> float:
        return self.task.chance

    @property
    def max_new_tokens(self) -> int:
        return self.task.max_new_tokens

    def items(self) -> list[Item]:
        picked = pick_items(self.task.items(), self.examples)
        return [picked[i] for i in self.world.strided(len(picked))]

    def grade(self, item: Item, text: str) -> bool:
        return self.task.grade(item, text)


@contextmanager
def undisturbed(model: Transformer) -> Iterator[None]:
    """Evaluation mode inside; after it the mode and all random numbers are as they were."""
    was_training, python, array = model.training, random.getstate(), np.random.get_state()
    device = model.cos.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            random.setstate(python)
            np.random.set_state(array)
