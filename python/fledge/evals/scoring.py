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
from fledge.evals.tasks.base import Task
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
        summary = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "chance": self.chance,
            "unit": "accuracy",
        }
        return summary | ({"note": self.note} if self.note else {})


def pick_items(items: list[dict[str, Any]], max_examples: int | None) -> list[dict[str, Any]]:
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
    tokenizer = engine.tokenizer
    limit = engine.model.config.max_position_embeddings
    room = min(task.max_new_tokens, limit // 2) if task.kind != "choice" else 1
    prompts = [render_prompt(tokenizer, item["messages"]) for item in items]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) + room <= limit]
    replies: list[dict[str, Any]] = [
        {"output": "", "parts": [], "finish": "too_long"} for _ in items
    ]
    fitting = [prompts[i] for i in fits]
    if task.kind == "choice":
        found = _choose(engine, fitting, [items[i]["letters"] for i in fits])
    elif task.kind == "reply":
        found = _likeliest_reply(engine, fitting, [items[i] for i in fits])
    else:
        found = _generate(engine, fitting, task, tools, room)
    for i, reply in zip(fits, found, strict=True):
        replies[i] = reply
    records = [
        {
            "id": item["id"],
            "question": _last_user_text(item["messages"]),
            "answer": item["answer"],
            **reply,
            "correct": reply["finish"] != "too_long" and bool(task.grade(item, reply["output"])),
        }
        for item, reply in zip(items, replies, strict=True)
    ]
    correct = sum(r["correct"] for r in records)
    low, high = wilson_interval(correct, len(records))
    too_long = len(items) - len(fits)
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


def _generate(
    engine: Engine, prompts: list[list[int]], task: Task, tools: Tools, room: int
) -> list[dict[str, Any]]:
    params = SamplingParams(max_tokens=room)
    replies = []
    for (completion,) in engine.generate(prompts, params, tools):
        parts = split_parts(engine.tokenizer, completion.ids)
        text = answer_text(parts)
        replies.append({"output": text, "parts": parts, "finish": completion.finish_reason})
    return replies


def _choose(
    engine: Engine, prompts: list[list[int]], letters: list[list[str]]
) -> list[dict[str, Any]]:
    """The likeliest letter right after <|assistant_start|> (nanochat's chat_eval)."""
    alphabet = sorted({letter for group in letters for letter in group})
    ids = [engine.tokenizer.encode(letter)[0] for letter in alphabet]
    place = {letter: i for i, letter in enumerate(alphabet)}
    replies = []
    for logprobs, group in zip(engine.next_logprobs(prompts, ids), letters, strict=True):
        best = max(group, key=lambda letter: logprobs[place[letter]])
        replies.append(
            {"output": best, "parts": [{"type": "text", "text": best}], "finish": "choice"}
        )
    return replies


def _likeliest_reply(
    engine: Engine, prompts: list[list[int]], items: list[dict[str, Any]]
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
        best = max(range(len(means)), key=lambda i: means[i])
        text = item["replies"][best]
        replies.append(
            {
                "output": text,
                "parts": [{"type": "text", "text": text}],
                "finish": "choice",
                "mean_logprobs": [round(mean, 5) for mean in means],
            }
        )
    return replies


def _last_user_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
