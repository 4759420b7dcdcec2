"""What an answer is worth to reinforcement: small pure functions of a problem and a reply.

A reward takes the problem (a dict with "messages" and what its maker put beside them: "answer",
"kind", "tests") and a `Reply`, and gives a number, usually between 0 and 1. [rl] rewards names
which count and how much. One of your own is a function in a file, named FILE.py:FUNCTION:

    # polite.py                                     [rl]
    def polite(item, reply):                        rewards = { answer = 1.0,
        return 0.0 if "!" in reply.text else 1.0                "polite.py:polite" = 0.2 }

Called by `stages.rl`; nothing here knows a model. Only `UnitTests` runs anything, in a sandbox.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from fledge.errors import UserError
from fledge.evals.tasks import worlds
from fledge.evals.tasks.gsm8k import answer_of, same_number
from fledge.evals.tasks.humaneval import best_sandbox, code_of
from fledge.sandbox.result import Python
from fledge.tokenizer import Tokenizer
from fledge.tokenizer.reply import answer_text, split_parts

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the model said: the final text, every part {type, text}, whether it ended by itself,
    and how many tokens long it was (tool output included)."""

    text: str
    parts: list[dict[str, str]]
    stopped: bool
    tokens: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, ids: list[int]) -> Reply:
        """The reply that sampled ids are."""
        parts = split_parts(tokenizer, ids)
        stopped = bool(ids) and ids[-1] == tokenizer.eos_id
        return cls(answer_text(parts), parts, stopped, len(ids))


Reward = Callable[[Item, Reply], float]


def answer(item: Item, reply: Reply) -> float:
    """1 for a right answer that ended by itself: by the rule of the problem's world, else the
    number, else the words."""
    if not reply.stopped:
        return 0.0
    if item.get("kind") in worlds.KINDS:
        return float(worlds.grade(dict(item), reply.text))
    wanted = str(item["answer"]).replace(",", "")
    if _is_number(wanted):
        return float(same_number(answer_of(reply.text), wanted))
    return float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", reply.text) is not None)


def format_(item: Item, reply: Reply) -> float:
    """1 for a reply that ends as the data's answers end: "#### 42", or "The answer is 42."; or,
    where the problem has a "pattern", that it fits whole."""
    pattern = item.get("pattern", r"(?s).*(?:#### -?[\d,]+(?:\.\d+)?|The answer is [^.\n]+\.)")
    return float(reply.stopped and re.fullmatch(pattern, reply.text) is not None)


def stops(item: Item, reply: Reply) -> float:
    """1 for a reply that ended by itself."""
    return float(reply.stopped)


def brief(item: Item, reply: Reply) -> float:
    """Near 1 for a short reply, 1/2 at 64 tokens, falling towards 0."""
    return 64.0 / (64.0 + reply.tokens)


class UnitTests:
    """1 where the code of the reply (its first fenced block) passes the problem's "tests"; holds a
    sandbox, opened when first needed."""

    def __init__(self) -> None:
        self._sandbox: Python | None = None

    def __call__(self, item: Item, reply: Reply) -> float:
        if self._sandbox is None:
            self._sandbox, _ = best_sandbox()
        if not reply.stopped:
            return 0.0
        return float(self._sandbox.run(f"{code_of(reply.text)}\n\n{item['tests']}\n").ok)

    def close(self) -> None:
        """Ends the sandbox's processes."""
        if self._sandbox is not None:
            self._sandbox.close()


NEEDS = {"answer": "answer", "tests": "tests"}
"""What a problem must have for a reward, where its kind is none of a world's."""
BUILT_IN: dict[str, Reward] = {"answer": answer, "format": format_, "stops": stops, "brief": brief}
TESTS = "tests"


class Rewards:
    """Several rewards, weighted: a context manager, because `tests` holds a sandbox."""

    def __init__(self, weights: Mapping[str, float] | None) -> None:
        """UserError for a name that is no reward."""
        self.weights = dict(weights or {"answer": 1.0})
        self.tests = UnitTests()
        table: dict[str, Reward] = {**BUILT_IN, TESTS: self.tests}
        self.functions = {
            name: table[name] if name in table else load(name, known=table) for name in self.weights
        }
        if len(set(self.names)) < len(self.names):  # one would take the other's place
            raise UserError(
                f"two rewards have the same name: {', '.join(self.weights)}",
                "a function counts by its own name, which the others must not have",
                "rename one of the functions",
            )

    def require(self, item: Item) -> None:
        """UserError for a problem that lacks what a reward needs: better now than in training."""
        for name in self.weights:
            need = NEEDS.get(name)
            graded = name == "answer" and item.get("kind") in worlds.KINDS
            if need is not None and need not in item and not graded:
                raise UserError(
                    f"the reward {name} needs problems with {need!r}",
                    f"one has only {', '.join(sorted(item))}",
                    "name other rewards in rl.rewards, or give other problems in rl.files",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """What each is called in the log: a file's function by its own name."""
        return tuple(name.rpartition(":")[2] for name in self.weights)

    def parts(self, item: Item, reply: Reply) -> dict[str, float]:
        """Every reward by its name in the log. UserError for one that fails, or gives no finite
        number."""
        found = {}
        for name, function in self.functions.items():
            try:
                value = function(item, reply)
            except Exception as error:  # of the user's function, pattern or problem
                raise UserError(
                    f"the reward {name} failed", f"{type(error).__name__}: {error}", "mend it"
                ) from error
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(
                    f"the reward {name} gave {value!r}", "it must be a finite number", "mend it"
                )
            found[name.rpartition(":")[2]] = float(value)
        return found

    def total(self, parts: Mapping[str, float]) -> float:
        """The weighted sum of `parts`."""
        weights = zip(self.names, self.weights.values(), strict=True)
        return sum(weight * parts[name] for name, weight in weights)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.tests.close()


def load(name: str, *, known: Mapping[str, Any]) -> Reward:
    """The function that FILE.py:FUNCTION names. The file is the user's own code and is run."""
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        raise UserError(
            f"there is no reward called {name!r}, which rl.rewards names",
            f"there are {', '.join(known)}",
            "name one of them, or a function of your own as FILE.py:FUNCTION",
        )
    if not Path(file).is_file():
        raise UserError(
            f"there is no file {file}", f"rl.rewards names {name}", "mind the spelling, or its path"
        )
    spec = importlib.util.spec_from_file_location(f"fledge_reward_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"{file} cannot be run", f"{type(error).__name__}: {error}", "mend it"
        ) from error
    found: Reward | None = getattr(module, function, None)
    if not callable(found):
        raise UserError(
            f"{file} has no function {function}",
            f"rl.rewards names {name}",
            f"write `def {function}(item, reply):` into it",
        )
    return found


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?", text) is not None
