"""Scoring tasks with the engine: prompts in, graded records and intervals out.

Two primitives, as everywhere in fledge: `generate` (greedy, with tools) and the log-probability of
given tokens (the letters or the whole replies of a multiple-choice item). A task says which it
wants through `kind`; the result holds one record per example, so that any score can be looked into.
Called by `stages.evaluate` and by the stages' eval hooks; never by the trainer directly.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from fledge.engine import Engine, SamplingParams
from fledge.engine.tools import Tools
from fledge.evals.tasks.base import Item, Task
from fledge.stats import wilson_interval
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import answer_text, split_parts


@dataclass(frozen=True)
class TaskResult:
    """A score with its 95 % interval, and the record of every example."""

    name: str
    value: float
    low: float
    high: float
    n: int
    chance: float
    seconds: float
    records: list[dict[str, Any]]
    note: str | None = None

    def summary(self) -> dict[str, Any]:
        """Without the records; the shape of a score in report.json."""
        score = {key: getattr(self, key) for key in ("value", "low", "high", "n", "chance")}
        score |= {"unit": "accuracy", **({"note": self.note} if self.note else {})}
        return score | {"seconds": round(self.seconds, 3)}


def pick_items(items: list[Item], max_examples: int | None) -> list[Item]:
    """All items, or a fixed random sample of them in their own order."""
    if max_examples is None or len(items) <= max_examples:
        return items
    kept = sorted(random.Random(1337).sample(range(len(items)), max_examples))
    return [items[i] for i in kept]


def score_task(
    engine: Engine, task: Task, tools: Tools, *, max_examples: int | None = None
) -> TaskResult:
    """Examines the engine's model on a task. Prompts that do not fit count as wrong, and say so."""
    began = time.perf_counter()
    items = pick_items(task.items(), max_examples)
    limit = engine.model.config.max_position_embeddings
    room = min(task.max_new_tokens, limit // 2) if task.kind != "choice" else 1
    asked = enumerate(render_prompt(engine.tokenizer, item["messages"]) for item in items)
    prompts = {i: prompt for i, prompt in asked if len(prompt) + room <= limit}
    fitting, ids = [items[i] for i in prompts], list(prompts.values())
    if task.kind == "choice":
        found = _choose(engine, ids, fitting)
    elif task.kind == "reply":
        found = _likeliest_reply(engine, ids, fitting)
    else:
        found = _generate(engine, ids, tools, room)
    replies = dict(zip(prompts, found, strict=True))
    records = []
    for i, item in enumerate(items):
        reply = replies.get(i, _reply("", [], "too_long"))
        records.append(
            {
                "id": item["id"],
                "question": _last_user_text(item["messages"]),
                "answer": item["answer"],
                **reply,
                "correct": i in replies and bool(task.grade(item, reply["output"])),
            }
        )
    correct, too_long = sum(r["correct"] for r in records), len(items) - len(prompts)
    low, high = wilson_interval(correct, len(records))
    notes = [note] if (note := getattr(task, "note", None)) else []  # how it was examined
    if too_long:
        notes.append(f"{too_long} prompts longer than {limit} tokens count as wrong")
    return TaskResult(
        name=task.name,
        value=correct / len(records) if records else 0.0,
        low=low,
        high=high,
        n=len(records),
        chance=task.chance,
        seconds=time.perf_counter() - began,
        records=records,
        note="; ".join(notes) or None,
    )


def _reply(text: str, parts: list[dict[str, str]], finish: str) -> dict[str, Any]:
    return {"output": text, "parts": parts, "finish": finish}


def _chosen(text: str) -> dict[str, Any]:
    return _reply(text, [{"type": "text", "text": text}], "choice")


def _generate(
    engine: Engine, prompts: list[list[int]], tools: Tools, room: int
) -> list[dict[str, Any]]:
    replies = []
    for (completion,) in engine.generate(prompts, SamplingParams(max_tokens=room), tools):
        parts = split_parts(engine.tokenizer, completion.ids)
        replies.append(_reply(answer_text(parts), parts, completion.finish_reason))
    return replies


def _choose(engine: Engine, prompts: list[list[int]], items: list[Item]) -> list[dict[str, Any]]:
    """The likeliest letter right after <|assistant_start|> (nanochat's chat_eval)."""
    alphabet = sorted({letter for item in items for letter in item["letters"]})
    ids = [engine.tokenizer.encode(letter)[0] for letter in alphabet]
    replies = []
    for row, item in zip(engine.next_logprobs(prompts, ids), items, strict=True):
        logprobs = dict(zip(alphabet, row, strict=True))
        replies.append(_chosen(max(item["letters"], key=logprobs.__getitem__)))
    return replies


def _likeliest_reply(
    engine: Engine, prompts: list[list[int]], items: list[Item]
) -> list[dict[str, Any]]:
    """The option whose reply has the highest mean log-probability per token (CORE's rule)."""
    tokenizer = engine.tokenizer
    rows = [
        prompt + tokenizer.encode(reply) + [tokenizer.eos_id]
        for prompt, item in zip(prompts, items, strict=True)
        for reply in item["replies"]
    ]
    scores = iter(engine.score(rows))
    replies = []
    for prompt, item in zip(prompts, items, strict=True):
        tails = [next(scores)[len(prompt) :] for _ in item["replies"]]
        means = [sum(tail) / len(tail) for tail in tails]
        best = item["replies"][means.index(max(means))]
        replies.append(_chosen(best) | {"mean_logprobs": [round(mean, 5) for mean in means]})
    return replies


def _last_user_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
