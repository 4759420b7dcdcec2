"""Conversations to train on: from a person's JSONL, from chat files, and from the real tasks' rows.

A conversation is a dict with "messages" in OpenAI's shape (see `tokenizer.chat`, which renders it).
`chat_sources` gathers what the mid, sft and rl stages mix, by kind, each a sequence with random
access in a fixed shuffled order; `check_file` is `fledge data check`. Test splits of the tasks are
never read here, and chats held out for examination are never trained on. Called by stages, evals
and the CLI; it never renders, never runs code and never imports torch.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, overload

from fledge.data.task_files import NOT_FOR_CHAT, JsonRows, TaskData
from fledge.data.text_files import SourceFile, find_files, read_lines
from fledge.errors import UserError

Conversation = dict[str, Any]
Calculator = Callable[[str], str]
LETTERS = "ABCDEFGHIJ"
MAX_PROBLEMS = 1000
CHAT_EXAM_SHARE = 0.01  # of the different opening messages in the chat files
VAL_SHARE = 0.02  # of the rows of the other kinds
WORLD_VAL_OFFSET = 10_000_000  # a world's validation conversations are later draws
Split = Literal["train", "val"]
Solutions = Literal["whole", "steps"]

# Share of each kind in a stage; the others take the place of what is missing. mid sees every format
# often, sft leans to conversation. A world adds spelling, counting and identity.
DEFAULT_MIXTURE: dict[str, dict[str, float]] = {
    "mid": {
        "chat": 0.40, "gsm8k": 0.22, "mmlu": 0.10, "mc": 0.10, "arc": 0.06,
        "spell": 0.06, "count": 0.03, "identity": 0.03,
    },
    "sft": {
        "chat": 0.50, "gsm8k": 0.24, "mmlu": 0.03, "mc": 0.03, "arc": 0.08,
        "spell": 0.05, "count": 0.03, "identity": 0.04,
    },
}  # fmt: skip
WORLD_KINDS = ("spell", "count", "identity")
MID_ONLY_CHATS = ("t0_p3_sample", "openstax_definitions")  # tasks and glossaries more than talk


class WorldLike(Protocol):
    """The part of `worlds.World` that is used here."""

    def conversation(self, stage: Any, kind: str, index: int) -> Conversation: ...

    def kinds(self, stage: Any) -> dict[str, float]: ...


# ------------------------------------------------------------------------- reading and checking


def read_conversations(path: str | Path) -> JsonRows:
    """All conversations of a .jsonl(.gz/.zst) file; the first fault is a UserError."""
    file = _conversation_file(path)

    def rows() -> Iterator[Conversation]:
        for number, row, problem in _checked_lines(file):
            if row is None:
                raise UserError(
                    f"{path}:{number} is not a conversation",
                    str(problem),
                    f"mend or remove that line; `fledge data check {path}` lists them all",
                )
            yield row

    found = JsonRows.of(rows())
    if not found:
        raise UserError(
            f"{path} holds no conversation",
            "the file has no lines",
            'each line is an object {"messages": [...]}',
        )
    return found


def check_file(path: str | Path) -> list[str]:
    """What is wrong with a file of conversations, "line N: ..." each; empty if nothing is.

    Raises UserError only where there is no such file or it cannot be decompressed.
    """
    problems = []
    count = 0
    for number, _, problem in _checked_lines(_conversation_file(path)):
        count += 1
        if problem is not None:
            problems.append(f"line {number}: {problem}")
        if len(problems) >= MAX_PROBLEMS:
            problems.append(f"stopped after {MAX_PROBLEMS} problems")
            break
    return problems if count else ["the file holds no conversation"]


def _conversation_file(path: str | Path) -> SourceFile:
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder", "conversations come from one file", "name the file")
    (file,), _ = find_files(path)
    if file.format != "jsonl":
        raise UserError(
            f"{path} is not a .jsonl file",
            "conversations are JSON objects, one per line (.jsonl, .jsonl.gz or .jsonl.zst)",
            "convert the file",
        )
    return file


def _checked_lines(file: SourceFile) -> Iterator[tuple[int, Conversation | None, str | None]]:
    """(line number, conversation or None, problem or None) of every line that is not blank."""
    for number, line in read_lines(file):
        if not line.strip():
            continue
        row = problem = None
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            problem = f"not valid UTF-8 at byte {error.start + 1}"
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON: {error}"
        else:
            problem = problem_of(row)
        yield number, (row if problem is None else None), problem


def problem_of(row: Any) -> str | None:
    """What keeps `row` from being a conversation to train on, in words, or None."""
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__}, not an object"
    if "messages" not in row:
        near = difflib.get_close_matches("messages", map(str, row), n=1, cutoff=0.5)
        return "no field `messages`" + (f"; is it {near[0]!r}?" if near else "")
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "`messages` must be a list with at least one message"
    before = None
    for i, message in enumerate(messages):
        problem = _message_problem(message, before)
        if problem is not None:
            return f"message {i + 1}: {problem}"
        before = message
    if before is None or before["role"] != "assistant":
        return "the last message must be the assistant's: it is what is learnt"
    return None


ROLES = ("system", "developer", "user", "assistant", "tool")


def _message_problem(message: Any, before: Mapping[str, Any] | None) -> str | None:
    if not isinstance(message, dict):
        return f"a JSON {type(message).__name__}, not an object"
    role = message.get("role")
    if role not in ROLES:
        return f"role {role!r}; it must be one of {', '.join(ROLES)}"
    last = before["role"] if before else None
    if role in ("system", "developer") and last not in (None, "system", "developer"):
        return "a system message must come first"
    if role == "user" and last == "user":
        return "two user messages in a row; join them"
    if role == "assistant" and last not in ("user", "tool"):
        return "an assistant message must follow a user's or a tool's"
    if role == "tool" and not (last == "tool" or (before and before.get("tool_calls"))):
        return "a tool message must follow an assistant message with tool_calls"
    if last == "assistant" and role != "tool" and before and before.get("tool_calls"):
        return "tool_calls before it have no tool message"
    return _content_problem(message, role)


def _content_problem(message: Mapping[str, Any], role: str) -> str | None:
    calls = message.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            return "only an assistant message has tool_calls"
        problem = _calls_problem(calls)
        if problem is not None:
            return problem
    content = message.get("content")
    if content is None:
        return None if calls else "no content"
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, list):
        known = ("text", "python", "output") if role == "assistant" else ("text",)
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in known:
                return f"a part of content must be an object of type {' | '.join(known)}"
            if not isinstance(part.get("text"), str):
                return "a part of content must have a string `text`"
        texts = [part["text"] for part in content]
    else:
        return "content must be a string or a list of parts"
    if role in ("user", "assistant") and not calls and not "".join(texts).strip():
        return "empty content"
    return None


def _calls_problem(calls: Any) -> str | None:
    if not isinstance(calls, list) or not calls:
        return "tool_calls must be a list with at least one call"
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return "a tool call must have function.name"
        if not isinstance(function.get("arguments", {}), (str, dict)):
            return "function.arguments must be a JSON text or an object"
    return None


# ------------------------------------------------------------------- rows of tasks as conversations


def gsm8k_conversation(
    row: Mapping[str, Any],
    calculator: Calculator | None = None,
    *,
    solutions: Solutions = "whole",
) -> Conversation:
    """A GSM8K row; its calculator marks <<48/2=24>> become python parts with outputs.

    `calculator` says what the tool would answer (`sandbox.arithmetic.evaluate`); without it the
    mark's own result stands, written as the tool writes numbers. The last line "#### n" stays text.
    Of a solution in "steps" the words between the calculations are left out.
    """
    parts: list[dict[str, str]] = []

    def add(kind: str, text: str) -> None:
        if text:
            parts.append({"type": kind, "text": text})

    answer = row["answer"]
    if solutions == "steps":
        answer = "".join(re.findall(r"<<.*?>>", answer)) + "####" + answer.rpartition("####")[2]
    for piece in re.split(r"(<<.*?>>)", answer):
        if not (piece.startswith("<<") and piece.endswith(">>")):
            add("text", piece)
            continue
        expression, _, result = piece[2:-2].rpartition("=")
        add("python", expression)
        add("output", calculator(expression) if calculator else plain_number(result))
    messages = [user(row["question"]), {"role": "assistant", "content": parts}]
    return {"kind": "gsm8k", "messages": messages}


def gsm8k_problem(row: Mapping[str, Any]) -> dict[str, Any]:
    """A GSM8K row as a problem for rl: the question and the number behind ####."""
    return {
        "kind": "gsm8k",
        "messages": [user(row["question"])],
        "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
    }


def plain_number(text: str) -> str:
    """A number as the calculator writes it: "2.50" -> "2.5", "10.0" -> "10"; else unchanged."""
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.10g}"


def choice_question(question: str, choices: Sequence[str]) -> str:
    """The user turn of a multiple-choice question; nanochat's wording (reference/evaluation.md 2).

    The letter stands after the choice, so that a small model has read the choice when it reads the
    letter.
    """
    options = [f"- {choice}={letter}" for choice, letter in zip(choices, LETTERS, strict=False)]
    ask = "Respond only with the letter of the correct answer."
    return "\n".join([f"Multiple Choice question: {question}", *options, "", ask])


def choice_conversation(
    kind: str, question: str, choices: Sequence[str], gold: int
) -> Conversation:
    """A multiple-choice question answered with the letter alone."""
    return {
        "kind": kind,
        "messages": [
            user(choice_question(question, choices)),
            {"role": "assistant", "content": LETTERS[gold]},
        ],
    }


def mc_parts(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """(question, choices, gold index) of a row of any file in mc_train/, arc/ or mmlu/."""
    if "passage" in row:  # BoolQ
        question = f"{row['passage']}\n{row['question'].rstrip('?').capitalize()}?"
        return question, ["no", "yes"], int(row["answer"])
    if "sol1" in row:  # PIQA
        return row["goal"], [row["sol1"], row["sol2"]], int(row["label"])
    if "option1" in row:  # WinoGrande
        return row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1
    return row["question"], list(row["choices"]), int(row["gold" if "gold" in row else "answer"])


def user(text: str) -> dict[str, str]:
    """A user message."""
    return {"role": "user", "content": text}


# ----------------------------------------------------------------------------- what stages train on


class Conversations(Sequence[Conversation]):
    """Rows seen through `make` in a fixed shuffled order; `picked` are the rows that take part."""

    def __init__(
        self,
        rows: Sequence[Any],
        make: Callable[[Any], Conversation],
        salt: str,
        picked: Sequence[int] | None = None,
    ) -> None:
        self._rows, self._make = rows, make
        chosen = range(len(rows)) if picked is None else picked
        self._order = sorted(chosen, key=lambda i: _digest(f"{salt}|{i}"))

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self._make(self._rows[i]) for i in self._order[index]]
        return self._make(self._rows[self._order[index]])


class Joined(Sequence[Any]):
    """Several sequences one after another."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = list(parts)
        self._ends: list[int] = []
        for part in self._parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(part))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        return self._parts[which][index - (self._ends[which - 1] if which else 0)]


class _FromWorld(Sequence[Conversation]):
    """`size` conversations of a kind of a world, from number `first` on."""

    def __init__(self, world: WorldLike, stage: str, kind: str, first: int, size: int) -> None:
        self._make = lambda i: world.conversation(stage, kind, first + i)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(index)
        return self._make(index % self._size)


def chat_sources(
    data: TaskData,
    stage: str,
    *,
    split: Split = "train",
    world: WorldLike | None = None,
    calculator: Calculator | None = None,
    world_size: int = 100_000,
    solutions: Solutions = "whole",
    longest_reply: int | None = None,
) -> dict[str, Sequence[Conversation]]:
    """kind -> conversations of what this machine has for the stage "mid" or "sft".

    Kinds: chat, gsm8k, arc, mc (other multiple choice), mmlu (its auxiliary_train), and from
    `world` spell, count and identity. What is "val" in one stage is so in every stage. What is
    missing is told by `data.missing()`. `longest_reply` leaves out the chats in which the assistant
    says more characters than that at once; solutions "steps" leaves out those of GSM8K that
    calculate nothing.
    """
    found: dict[str, Sequence[Conversation]] = {}
    chats = _chats(data, stage, split, longest_reply)
    if chats:
        found["chat"] = chats
    gsm8k = data.rows("gsm8k/train")
    if gsm8k:
        picked = split_rows(len(gsm8k), split)
        found["gsm8k"] = Conversations(
            gsm8k,
            lambda row: gsm8k_conversation(row, calculator, solutions=solutions),
            f"gsm8k|{stage}",
            picked if solutions == "whole" else _that_calculate(gsm8k, picked),
        )
    groups = {
        "arc": ["arc/arc_easy_train", "arc/arc_challenge_train"],
        "mc": data.names("mc_train"),
        "mmlu": ["mmlu/auxiliary_train"],
    }
    for kind, names in groups.items():
        rows = Joined([rows for rows in map(data.rows, names) if rows])
        if len(rows):
            make = functools.partial(_choice, kind)
            picked = split_rows(len(rows), split)
            found[kind] = Conversations(rows, make, f"{kind}|{stage}", picked)
    if world is not None:
        first = 0 if split == "train" else WORLD_VAL_OFFSET
        for kind in sorted(set(WORLD_KINDS) & set(world.kinds(stage))):
            found[kind] = _FromWorld(world, stage, kind, first, world_size)
    return found


def split_rows(n: int, split: Split) -> list[int]:
    """The row numbers of a split: about 2 % validate, at least one; the same for every caller."""
    order = sorted(range(n), key=lambda i: _digest(f"split|{i}"))
    cut = max(1, round(n * VAL_SHARE))
    picked = order[:cut] if split == "val" else order[cut:] or order
    return sorted(picked)


def _that_calculate(rows: Sequence[Mapping[str, Any]], picked: Sequence[int]) -> list[int]:
    return [i for i in picked if "<<" in rows[i]["answer"]] or list(picked)


def _chats(
    data: TaskData, stage: str, split: Split, longest_reply: int | None
) -> Sequence[Conversation]:
    if split == "val":
        return held_out_chats(data)
    rows = Joined([rows for rows in map(data.rows, chat_names(data, stage)) if rows])
    kept = [i for i, row in enumerate(rows) if not is_held_out(row)]
    if longest_reply is not None:
        short = [i for i in kept if _longest_reply(rows[i]) <= longest_reply]
        if kept and not short:
            raise UserError(
                f"{stage}.longest_reply = {longest_reply}",
                "the assistant says more than that in every chat that there is",
                "give a larger number of characters, or leave the key out",
            )
        kept = short
    return Conversations(rows, clean_chat, f"chat|{stage}", kept)


def default_weights(stage: str, kinds: Sequence[str]) -> dict[str, float]:
    """The stage's share of each of `kinds`; the shares sum to 1."""
    picked = {k: DEFAULT_MIXTURE[stage].get(k, 0.05) for k in kinds}
    total = sum(picked.values())
    return {kind: weight / total for kind, weight in picked.items()}


def gsm8k_problems(data: TaskData, *, split: Split = "train") -> Sequence[dict[str, Any]]:
    """Problems for rl from GSM8K's training file, shuffled; empty where it is missing.

    "val" are those that no stage trains on (the test file is for `evals` alone).
    """
    rows = data.rows("gsm8k/train")
    if not rows:
        return []
    return Conversations(rows, gsm8k_problem, "rl", split_rows(len(rows), split))


def chat_names(data: TaskData, stage: str | None = None) -> list[str]:
    """The chat files that there are; without those that a stage leaves out."""
    left_out = NOT_FOR_CHAT + (MID_ONLY_CHATS if stage == "sft" else ())
    return [name for name in data.names("sft") if name.rpartition("/")[2] not in left_out]


def held_out_chats(data: TaskData) -> Sequence[Conversation]:
    """The chats that no stage trains on, for examination; one per opening message, shuffled."""
    openings: dict[str, Conversation] = {}
    for name in chat_names(data, "sft"):
        for row in data.rows(name) or ():
            if is_held_out(row):
                openings.setdefault(_opening(row), clean_chat(row))
    return Conversations(list(openings.values()), lambda row: row, "held out")


def is_held_out(conversation: Mapping[str, Any]) -> bool:
    """Whether the opening message is among the 1 % kept for examination, by its hash."""
    return _digest("exam|" + _opening(conversation)) < CHAT_EXAM_SHARE * 2**64


def _longest_reply(conversation: Mapping[str, Any]) -> int:
    """Characters of the assistant's longest message."""
    said = [m.get("content") for m in conversation["messages"] if m["role"] == "assistant"]
    return max((len(text) for text in said if isinstance(text, str)), default=0)


def clean_chat(row: Mapping[str, Any]) -> Conversation:
    """A chat as conversation: its messages without other models' end marks."""
    messages = [
        {**m, "content": m["content"].replace("<|endoftext|>", "").strip()}
        if isinstance(m.get("content"), str)
        else m
        for m in row["messages"]
    ]
    return {"kind": "chat", "messages": messages, "source": row.get("source", "")}


def _choice(kind: str, row: Mapping[str, Any]) -> Conversation:
    return choice_conversation(kind, *mc_parts(row))


def _opening(conversation: Mapping[str, Any]) -> str:
    """The first user message in lower case without blanks at its ends."""
    first = next((m for m in conversation["messages"] if m["role"] == "user"), {"content": ""})
    return str(first["content"]).strip().lower()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
