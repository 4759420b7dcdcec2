"""lm-eval tasks over local files, since lm-eval has no network here: its formats, our data folder.

Used by tests/evals/test_harness.py and benchmarks/core_speed.py.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

METRICS = [
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
]


def choice_task(
    name: str, text: str, choices: str | list[str], gold: str, **more: Any
) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": gold,
        "metric_list": METRICS,
        **more,
    }


def is_short(line: str) -> bool:
    """Whether every choice of a row fits a context of 256 tokens: HFLM asserts that."""
    return all(len(choice) <= 300 for choice in json.loads(line).get("choices", ()))


def local_tasks(root: Path, folder: Path, examples: int) -> list[dict[str, Any]]:
    """Eight tasks in lm-eval's formats over the first `examples` short rows of local files."""
    core = "core/eval_data"
    asked = "Question: {{question}}\nAnswer:"
    letters = ["A", "B", "C", "D"]
    mmlu = "{{question.strip()}}\n" + "".join(
        f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate(letters)
    )
    mmlu += "Answer:"
    files = {
        "arc_easy": "arc/arc_easy_test",
        "arc_challenge_5shot": "arc/arc_challenge_test",
        "hellaswag": f"{core}/language_understanding/hellaswag",
        "piqa": f"{core}/commonsense_reasoning/piqa",
        "openbookqa": f"{core}/commonsense_reasoning/openbook_qa",
        "boolq": f"{core}/reading_comprehension/boolq",
        "mmlu_5shot": "mmlu/test",
        "lambada": f"{core}/language_understanding/lambada_openai",
    }
    tasks = [
        choice_task("arc_easy", asked, "{{choices}}", "gold"),
        choice_task("arc_challenge_5shot", asked, "{{choices}}", "gold", num_fewshot=5),
        choice_task("hellaswag", "{{query}}", "{{choices}}", "gold"),
        choice_task("piqa", "{{query}}\nAnswer:", "{{choices}}", "gold"),
        choice_task("openbookqa", "{{query}}", "{{choices}}", "gold"),
        choice_task("boolq", "{{query}}\nAnswer:", "{{choices}}", "gold"),
        choice_task("mmlu_5shot", mmlu, letters, "answer", num_fewshot=5),
        {
            "task": "lambada",
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "metric_list": [METRICS[0], {"metric": "perplexity", "aggregation": "perplexity"}],
        },
    ]
    for task in tasks:
        path = folder / f"{task['task']}.jsonl"
        with gzip.open(root / f"{files[task['task']]}.jsonl.gz", "rt", encoding="utf-8") as lines:
            path.write_text("".join(itertools.islice(filter(is_short, lines), examples)))
        task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}}
        task |= {"test_split": "test", "fewshot_split": "test"}
        task |= {"fewshot_config": {"sampler": "first_n"}} if task.get("num_fewshot") else {}
    return tasks
