"""The chat tasks' exams: prompts in, graded records and intervals out.

A task says by its `kind` how it is examined: "choice" by the likeliest letter right after
<|assistant_start|>, "reply" by the likeliest of whole replies, "generate" by what the model says
(with tools). The result holds one record per example, so that any score can be looked into.
Called by `stages.evaluate`, `suite` and the stages' eval hooks; never by the trainer directly.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fledge.dist import World
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.evals.records import UNIT, Record, examine_in_chunks
from fledge.evals.scoring import Likelihood, Request, generate, loglikelihood
from fledge.evals.tasks.base import Item, Task
from fledge.stats import mean_and_stderr, pass_at_k, share_stderr, wilson_interval
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import answer_text, split_parts


@dataclass(frozen=True)
class TaskResult:
    """A score with its 95 % interval and standard error, and the record of every example."""

    name: str
    value: float
    low: float
    high: float
    n: int
    chance: float
    seconds: float
    records: list[Record]
    note: str | None = None
    stderr: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Without the records; the shape of a score in report.json."""
        score = {key: getattr(self, key) for key in ("value", "low", "high", "n", "chance")}
        score |= {"unit": "accuracy", **({"note": self.note} if self.note else {})}
        if self.stderr is not None:
            score["stderr"] = None if self.stderr != self.stderr else self.stderr
        return score | self.details | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Sampling:
    """How many replies a "generate" task asks for; more than one gives pass@k."""

    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    dry_multiplier: float = 0.0


def pick_items(items: list[Item], max_examples: int | None) -> list[Item]:
    """All items, or a fixed random sample of them in their own order."""
    if max_examples is None or len(items) <= max_examples:
        return items
    kept = sorted(random.Random(1337).sample(range(len(items)), max_examples))
    return [items[i] for i in kept]


def score_task(
    engine: Engine,
    task: Task,
    tools: Tools,
    *,
    max_examples: int | None = None,
    sampling: Sampling | None = None,
    partial: Path | None = None,
    key: str = "",
    world: World | None = None,
    after_chunk: Callable[[int], None] | None = None,
) -> TaskResult:
    """Examines the engine's model on a task. Prompts that do not fit count as wrong, and say so."""
    began = time.perf_counter()
    sampling = sampling or Sampling()
    items = pick_items(task.items(), max_examples)
    limit = engine.model.config.max_position_embeddings
    room = min(task.max_new_tokens, limit // 2) if task.kind != "choice" else 1
    prompts = [render_prompt(engine.tokenizer, item["messages"]) for item in items]

    def score(indices: list[int]) -> list[Record]:
        fitting = [i for i in indices if len(prompts[i]) + room <= limit]
        asked, ids = [items[i] for i in fitting], [prompts[i] for i in fitting]
        if task.kind == "choice":
            found = _choose(engine, ids, asked)
        elif task.kind == "reply":
            found = _likeliest_reply(engine, ids, asked)
        else:
            found = _generate(engine, ids, tools, room, sampling)
        replies = dict(zip(fitting, found, strict=True))
        return [_record(task, items[i], prompts[i], replies.get(i)) for i in indices]

    records = examine_in_chunks(
        [len(prompt) for prompt in prompts],
        score,
        partial=partial,
        key=key,
        world=world,
        # replies are made side by side, as many as there are: nothing is gained by fewer at a time
        unit=None if task.kind == "generate" else UNIT,
        after_chunk=after_chunk,
    )
    ordered = [records[i] for i in sorted(records)]
    return task_result(task, ordered, limit, seconds=time.perf_counter() - began)


def task_result(task: Task, records: list[Record], limit: int, *, seconds: float) -> TaskResult:
    """The score of records, with what is to be known beside it."""
    n = len(records)
    scores = [float(record["score"]) for record in records]
    value = sum(scores) / n if n else 0.0
    if all(score in (0.0, 1.0) for score in scores):
        right = round(sum(scores))
        (low, high), stderr = wilson_interval(right, n), share_stderr(right, n)
    else:  # several replies to an example: shares, whose spread is seen, not known
        _, stderr = mean_and_stderr(scores)
        low, high = max(0.0, value - 1.96 * stderr), min(1.0, value + 1.96 * stderr)
    notes = [note] if (note := getattr(task, "note", None)) else []  # how it was examined
    too_long = sum(1 for record in records if record["finish"] == "too_long")
    if too_long:
        notes.append(f"{too_long} prompts longer than {limit} tokens count as wrong")
    details: dict[str, Any] = {"truncated": too_long}
    if task.kind == "choice" and n:
        details["predicted"] = dict(sorted(Counter(r["output"] for r in records).items()))
        details["answers"] = dict(sorted(Counter(r["answer"] for r in records).items()))
    tries = [record["passed"] for record in records if "passed" in record]
    if tries:
        details["pass_at_k"] = _pass_at_k(tries)
    return TaskResult(
        name=task.name,
        value=value,
        low=low,
        high=high,
        n=n,
        chance=task.chance,
        seconds=seconds,
        records=records,
        note="; ".join(notes) or None,
        stderr=stderr,
        details=details,
    )


def _pass_at_k(tries: Sequence[Sequence[bool]]) -> dict[str, float]:
    """pass@k for k = 1, 2, 5, 10, ... up to the number of tries: means over the examples."""
    n = min(len(passed) for passed in tries)
    wanted = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= n]
    return {str(k): sum(pass_at_k(len(p), sum(p), k) for p in tries) / len(tries) for k in wanted}


def _record(task: Task, item: Item, prompt: list[int], found: Record | None) -> Record:
    reply = found or _reply("", [], "too_long")
    record = {
        "id": item["id"],
        "prompt_hash": hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).hexdigest()[:16],
        "prompt_tokens": len(prompt),
        "question": _last_user_text(item["messages"]),
        "answer": item["answer"],
        **reply,
    }
    texts = record.pop("outputs", None)
    if texts is None:
        correct = found is not None and bool(task.grade(item, reply["output"]))
        return record | {"correct": correct, "score": float(correct)}
    passed = [bool(task.grade(item, text)) for text in texts]
    share = sum(passed) / len(passed)
    return record | {"outputs": texts, "passed": passed, "correct": share == 1, "score": share}


def _reply(text: str, parts: list[dict[str, str]], finish: str) -> dict[str, Any]:
    return {"output": text, "parts": parts, "finish": finish}


def _chosen(text: str) -> dict[str, Any]:
    return _reply(text, [{"type": "text", "text": text}], "choice")


def _generate(
    engine: Engine, prompts: list[list[int]], tools: Tools, room: int, sampling: Sampling
) -> list[Record]:
    replies = []
    found = generate(
        engine,
        prompts,
        max_tokens=room,
        tools=tools,
        samples=sampling.samples,
        temperature=sampling.temperature,
        seed=sampling.seed,
        dry_multiplier=sampling.dry_multiplier,
    )
    for completions in found:
        first = completions[0]
        parts = split_parts(engine.tokenizer, first.ids)
        reply: Record = _reply(answer_text(parts), parts, first.finish_reason)
        reply |= {"ids": first.ids, "logprobs": [round(x, 6) for x in first.logprobs]}
        if sampling.samples > 1:
            split = [split_parts(engine.tokenizer, c.ids) for c in completions]
            reply["outputs"] = [answer_text(s) for s in split]
        replies.append(reply)
    return replies


def _choose(engine: Engine, prompts: list[list[int]], items: list[Item]) -> list[Record]:
    """The likeliest letter right after <|assistant_start|> (nanochat's chat_eval)."""
    alphabet = sorted({letter for item in items for letter in item["letters"]})
    letters = {letter: engine.tokenizer.encode(letter)[0] for letter in alphabet}
    requests = [
        Request([*prompt, letters[letter]], len(prompt))
        for prompt, item in zip(prompts, items, strict=True)
        for letter in item["letters"]
    ]
    found = iter(loglikelihood(engine, requests))
    replies = []
    for item in items:
        logprobs = [next(found).total for _ in item["letters"]]
        best = item["letters"][logprobs.index(max(logprobs))]
        scored = {"ids": [letters[letter] for letter in item["letters"]]}
        replies.append(_chosen(best) | scored | {"logprobs": [round(x, 6) for x in logprobs]})
    return replies


def _likeliest_reply(engine: Engine, prompts: list[list[int]], items: list[Item]) -> list[Record]:
    """The option whose reply has the highest mean log-probability per token (CORE's rule)."""
    tokenizer = engine.tokenizer
    requests = [
        Request([*prompt, *tokenizer.encode(reply), tokenizer.eos_id], len(prompt))
        for prompt, item in zip(prompts, items, strict=True)
        for reply in item["replies"]
    ]
    scores: list[Likelihood] = loglikelihood(engine, requests)
    replies, at = [], 0
    for item in items:
        end = at + len(item["replies"])
        means = [score.mean for score in scores[at:end]]
        best = item["replies"][means.index(max(means))]
        replies.append(_chosen(best) | {"mean_logprobs": [round(mean, 5) for mean in means]})
        at = end
    return replies


def _last_user_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
