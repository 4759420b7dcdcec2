"""HumanEval: 164 small Python functions, written by the model and run against the problem's tests.

The prompt is the function's head and docstring as user turn; the code is the first fenced block of
the reply, else the whole reply. It runs in real CPython (`sandbox.process`, L2) where that sandbox
holds, else in Monty (`sandbox.interpreter`, L1), which may lack what a program needs; the score's
`note` says which. How many of the 164 canonical solutions pass in each, and how long they take:

    FLEDGE_DATA=../shared/data python -m fledge.evals.tasks.humaneval

Each program gets 5 seconds, and 256 MB (L2) or 64 MB (L1). Examined by `evals.scoring`; no code
runs in this process. As everywhere, the tests share a process with the code that they judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fledge.data.conversations import user
from fledge.evals.tasks.base import Item
from fledge.sandbox import interpreter, process
from fledge.sandbox.result import Python, ToolResult

SECONDS = 5.0
_FENCE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


class HumanEval:
    """The problems of HumanEval; holds a sandbox, so close it at the end (or use `with`)."""

    name = "humaneval"
    kind: Literal["generate", "choice"] = "generate"
    chance = 0.0
    max_new_tokens = 512

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], *, interpreter: Python | None = None
    ) -> None:
        self._rows = rows
        self.note: str | None = None
        """Where the programs run; stands beside the score."""
        if interpreter is not None:
            self._interpreter: Python = interpreter
        else:
            self._interpreter, self.note = best_sandbox()

    def __enter__(self) -> HumanEval:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the sandbox's processes."""
        self._interpreter.close()

    def why_unavailable(self) -> str | None:
        """None if programs can be run here, else why not."""
        return self._interpreter.why_unavailable()

    def items(self) -> list[Item]:
        """{"id", "messages", "answer": canonical solution, "prompt", "test", "entry_point"}."""
        return [
            {
                "id": row["task_id"],
                "messages": [user(row["prompt"])],
                "answer": row["canonical_solution"],
                "prompt": row["prompt"],
                "test": row["test"],
                "entry_point": row["entry_point"],
            }
            for row in self._rows
        ]

    def grade(self, item: Item, text: str) -> bool:
        """Whether the reply's code passes the problem's tests."""
        return self.run(item, text).ok

    def run(self, item: Item, text: str) -> ToolResult:
        """The outcome of the reply's code with the problem's tests."""
        return self._interpreter.run(program(item, code_of(text)))


def best_sandbox() -> tuple[Python, str]:
    """L2 where it holds, else L1; and the words for the score."""
    cpython = process.CPython(process.Limits(seconds=SECONDS))
    reason = cpython.why_unavailable()
    if reason is None:
        return cpython, "run in CPython"
    monty = interpreter.Interpreter(interpreter.Limits(seconds=SECONDS))
    return monty, f"run in Monty, not CPython: {reason}"


def code_of(text: str) -> str:
    """The first fenced block of a reply, closed or not; without one the reply itself."""
    fenced = _FENCE.search(text)
    return fenced.group(1) if fenced else text


def program(item: Mapping[str, Any], code: str) -> str:
    """One program: the code, or the prompt that it continues, and the problem's tests.

    Code that defines the function stands alone after the prompt's imports; any other is taken as
    the function's body. Replies lose their leading blanks, so a body's first line is indented.
    """
    name, prompt = item["entry_point"], item["prompt"]
    if re.search(rf"^def\s+{re.escape(name)}\b", code, re.MULTILINE):
        solution = "\n".join([*_IMPORT.findall(prompt), code])
    else:
        body = code if code[:1].isspace() else "    " + code
        solution = prompt + body
    return f"{solution}\n\n{item['test']}\n\ncheck({name})\n"


def _measure() -> None:
    """Prints how many canonical solutions pass in each sandbox, and which do not and why."""
    from fledge.data.task_files import TaskData

    rows = TaskData().rows("humaneval/HumanEval") or []
    sandboxes: dict[str, Python] = {
        "CPython (L2)": process.CPython(process.Limits(seconds=SECONDS)),
        "Monty (L1)": interpreter.Interpreter(interpreter.Limits(seconds=SECONDS)),
    }
    for name, sandbox in sandboxes.items():
        with HumanEval(rows, interpreter=sandbox) as task:
            reason = task.why_unavailable()
            if reason is not None:
                print(f"{name} is off: {reason}")
                continue
            outcomes = [(item["id"], task.run(item, item["answer"])) for item in task.items()]
        times = sorted(result.ms for _, result in outcomes)
        print(
            f"{name}: {sum(r.ok for _, r in outcomes)} of {len(outcomes)} canonical solutions pass;"
            f" median {times[len(times) // 2]:.1f} ms, longest {times[-1]:.1f} ms"
        )
        for item_id, result in outcomes:
            if not result.ok:
                print(f"  {item_id}: {result.error}")


if __name__ == "__main__":
    _measure()
