"""Every data set of the speedrun recipes in miniature, in its real file layout and column names.

`mini_hub()` gives the files of `helpers_hub.LocalHub`: FineWeb-Edu and ClimbMix as shuffled shards
(zstd, row groups), SmolTalk, MMLU, ARC, GSM8K and HumanEval as the hub's Parquet files, and CORE's
archive as nanochat's bundle. Text and questions are the almanac's: English, and free.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from fledge.data.worlds import load_world
from fledge.evals.core import CORE_TASKS, CoreTask

ROWS = 14  # of each task: more than CORE's ten shots and the rows asked
SHARDS = 3
DOCUMENTS = 120  # of a shard


def parquet_bytes(rows: list[dict[str, Any]], *, row_group: int = 1024) -> bytes:
    target = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, target, compression="zstd", row_group_size=row_group)
    return target.getvalue()


def shards(repository: str, first: int) -> dict[str, bytes]:
    """shard_00000.parquet ...: one column, text; the last one validates."""
    world = load_world("almanac", 0)
    found = {}
    for number in range(SHARDS):
        start = first + number * DOCUMENTS
        rows = [{"text": world.document("train", start + i).text} for i in range(DOCUMENTS)]
        found[f"{repository}/shard_{number:05d}.parquet"] = parquet_bytes(rows, row_group=32)
    return found


def smoltalk() -> dict[str, bytes]:
    """data/train-*.parquet and data/test-*: messages (content, role) and source."""
    world, found = load_world("almanac", 0), {}
    for name, start, count in (
        ("train-00000-of-00002", 0, 60),
        ("train-00001-of-00002", 60, 60),
        ("test-00000-of-00001", 900, 10),
    ):
        rows = []
        for i in range(start, start + count):
            made = world.conversation("sft", "chat", i)["messages"]
            messages = [
                {"content": _text(m["content"]), "role": m["role"]}
                for m in made
                if m["role"] in ("user", "assistant")
            ]
            rows.append({"messages": messages, "source": "smol-magpie-ultra-short"})
        found[f"HuggingFaceTB/smol-smoltalk/data/{name}.parquet"] = parquet_bytes(rows)
    return found


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def tasks() -> dict[str, bytes]:
    choices = ["Paris", "Rome", "Oslo", "Bern"]
    mmlu = [
        {
            "question": f"Which city is number {i} of the list?",
            "subject": "geography",
            "choices": choices,
            "answer": i % 4,
        }
        for i in range(ROWS)
    ]
    arc = [
        {
            "id": f"MEA_{i}",
            "question": f"What falls when there are {i} clouds?",
            "choices": {"text": ["rain", "stone", "light", "song"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(ROWS)
    ]
    gsm8k = [
        {
            "question": f"Ann has {i} pens and buys {i + 1}. How many has she?",
            "answer": f"She has {i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1} pens.\n"
            f"#### {2 * i + 1}",
        }
        for i in range(60)
    ]
    humaneval = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def add_{i}(x: int) -> int:\n    """Return x plus {i}."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {i + 1}\n",
            "entry_point": f"add_{i}",
        }
        for i in range(ROWS)
    ]
    files = {f"cais/mmlu/all/{s}": mmlu for s in ("auxiliary_train", "dev", "validation", "test")}
    for folder in ("ARC-Easy", "ARC-Challenge"):
        for split in ("train", "validation", "test"):
            files[f"allenai/ai2_arc/{folder}/{split}"] = arc
    files |= {f"openai/gsm8k/main/{s}": gsm8k for s in ("train", "test")}
    files["openai/openai_humaneval/openai_humaneval/test"] = humaneval
    return {f"{k}-00000-of-00001.parquet": parquet_bytes(rows) for k, rows in files.items()}


def core_rows(task: CoreTask) -> list[dict[str, Any]]:
    """Rows of one of the 22 in the form of its kind."""
    if task.kind == "multiple_choice":
        return [
            {"query": f"Question {i}: wet or dry?", "choices": ["wet", "dry"], "gold": i % 2}
            for i in range(ROWS)
        ]
    if task.kind == "schema":
        return [
            {
                "context_options": [f"The cup {i} was", f"The sea {i} was"],
                "continuation": "full of water.",
                "gold": i % 2,
            }
            for i in range(ROWS)
        ]
    rows = [{"context": f"{i} and {i} is", "continuation": f"{2 * i}"} for i in range(ROWS)]
    return [row | {"category": "numbers"} for row in rows] if task.name == "jeopardy" else rows


def core_archive() -> bytes:
    """eval_bundle.zip: core.yaml, eval_meta_data.csv, eval_data/FOLDER/NAME.jsonl."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("eval_bundle/core.yaml", "icl_tasks: []\n")
        target.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\n")
        for task in {task.file: task for task in CORE_TASKS}.values():  # hellaswag is asked twice
            lines = [json.dumps(row) + "\n" for row in core_rows(task)]
            target.writestr(f"eval_bundle/eval_data/{task.file}.jsonl", "".join(lines))
    return packed.getvalue()


@functools.cache
def mini_hub() -> dict[str, bytes]:
    """All of it."""
    return {
        **shards("karpathy/fineweb-edu-100b-shuffle", 0),
        **shards("karpathy/climbmix-400b-shuffle", 5000),
        **smoltalk(),
        **tasks(),
        "eval_bundle.zip": core_archive(),
    }
