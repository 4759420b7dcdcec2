"""HumanEval: 164 small Python functions, written by the model and run against the problem's tests.

The prompt is the function's head and docstring as user turn; the code is the first fenced block of
the reply, else the whole reply. It runs in Monty (`sandbox.interpreter`, L1), which is a Python
interpreter of its own, not CPython: scores may differ by what Monty lacks. 164 of the 164
canonical solutions pass there (pydantic-monty 1.4.0; median 0.3 ms, longest 0.7 s):

    FLEDGE_DATA=../shared/data python -m fledge.evals.tasks.humaneval

Each program gets 5 seconds and 64 MB. Examined by `evals.scoring`; no code runs in this process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fledge.data.conversations import user
from fledge.evals.tasks.base import Item
from fledge.sandbox.interpreter import Interpreter, Limits
from fledge.sandbox.result import ToolResult

LIMITS = Limits(seconds=5.0)
_FENCE = re.compile(r"```(?:[Pp]ython|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


class HumanEval:
    """The problems of HumanEval; holds an interpreter, so close it at the end (or use `with`)."""

    name = "humaneval"
    kind: Literal["generate", "choice"] = "generate"
    chance = 0.0
    max_new_tokens = 512
    description = "HumanEval, pass@1, run in Monty (a sandboxed Python interpreter, not CPython)"

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], *, interpreter: Interpreter | None = None
    ) -> None:
        self._rows = rows
        self._interpreter = interpreter or Interpreter(LIMITS)

    def __enter__(self) -> HumanEval:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the interpreter's workers."""
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
    """Prints how many canonical solutions pass, and which do not and why."""
    from fledge.data.task_files import TaskData

    with HumanEval(TaskData().rows("humaneval/HumanEval") or []) as task:
        outcomes = [(item["id"], task.run(item, item["answer"])) for item in task.items()]
    times = sorted(result.ms for _, result in outcomes)
    print(f"{sum(r.ok for _, r in outcomes)} of {len(outcomes)} canonical solutions pass")
    print(f"median {times[len(times) // 2]:.1f} ms, longest {times[-1]:.1f} ms")
    for name, result in outcomes:
        if not result.ok:
            print(f"{name}: {result.error}")


if __name__ == "__main__":
    _measure()
