"""From a row of a CORE task to the token ids that are scored, in two named ways.

`nanochat` (the default: comparable with nanochat's tables) and `dclm` (llm-foundry's, with which
the published CORE results were made) differ in the order and draw of the few-shot examples, in
their delimiter, and in how text becomes tokens; the table is in decisions/040. Transcribed from
karpathy/nanochat 92d63d4 nanochat/core_eval.py and scripts/base_eval.py, and from
mosaicml/llm-foundry 8c8dd48 llmfoundry/eval/datasets. Called by `evals.core_exam`; pure functions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from fledge.evals.core import CoreTask

Profile = Literal["nanochat", "dclm"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
Row = Mapping[str, Any]


class Encoder(Protocol):
    """What of a tokenizer is needed here."""

    @property
    def bos_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Span:
    """One candidate: token ids and from where on they are scored (to the end)."""

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class Example:
    """One row ready to be scored. `place` is its line in the file, `prompt` its readable text."""

    place: int
    prompt: str
    spans: list[Span]
    gold: int | None
    category: str | None
    truncated: int = 0  # tokens that were cut off so that it fits the context


def examples(
    task: CoreTask,
    rows: Sequence[Row],
    encoder: Encoder,
    *,
    profile: Profile,
    max_examples: int | None,
    context: int,
) -> Iterator[Example]:
    """The examples of a task, cut to `context` tokens where they are longer.

    nanochat: the rows shuffled, the first `max_examples` of them kept, shots drawn from those.
    dclm: rows in their order, shots from all of them, so that a capped exam (a fixed random sample)
    asks exactly what the full one asks.
    """
    make = _nanochat if profile == "nanochat" else _dclm
    for example in make(task, rows, encoder, max_examples):
        yield cut(example, context)


def cut(example: Example, context: int) -> Example:
    """The example's last `context` tokens; all its candidates lose the same leading tokens.

    nanochat (for GPT-2) and llm-foundry cut each candidate by itself, so that candidates of unlike
    length are judged after unlike beginnings; here they share one, and one reading of it.
    Scored tokens that fall off are not scored; `truncated` says how many tokens went.
    """
    excess = max(len(span.ids) for span in example.spans) - context
    if excess <= 0:
        return example
    spans = [Span(s.ids[excess:], max(1, s.start - excess)) for s in example.spans]
    return Example(
        example.place, example.prompt, spans, example.gold, example.category, truncated=excess
    )


def split_at_common(sequences: Sequence[Sequence[int]], *, end: bool) -> int:
    """How many tokens all sequences share at their beginning (or at their end)."""
    shortest = min(len(s) for s in sequences)
    first = sequences[0]
    for i in range(shortest):
        at = -1 - i if end else i
        if any(s[at] != first[at] for s in sequences):
            return i
    return shortest


# -- nanochat ------------------------------------------------------------------------------------


def _nanochat(
    task: CoreTask, rows: Sequence[Row], encoder: Encoder, max_examples: int | None
) -> Iterator[Example]:
    order = list(range(len(rows)))
    random.Random(1337).shuffle(order)
    order = order[:max_examples]
    for index, place in enumerate(order):
        shots = _nanochat_shots(order, index, task.shots)
        preamble = "".join(
            _context(task, rows[s], trim=True) + task.delimiter + _answer(task, rows[s]) + "\n\n"
            for s in shots
        )
        yield _nanochat_example(task, rows[place], place, preamble, encoder)


def _nanochat_shots(order: Sequence[int], index: int, shots: int) -> list[int]:
    """Random(1234 + index) draws from all others; fewer where there are fewer (#550)."""
    others = [i for i in range(len(order)) if i != index]
    drawn = random.Random(1234 + index).sample(others, min(shots, len(others)))
    return [order[i] for i in drawn]


def _nanochat_example(
    task: CoreTask, row: Row, place: int, preamble: str, encoder: Encoder
) -> Example:
    if task.kind == "language_modeling":
        shown = preamble + row["context"].strip() + task.delimiter
        # a trailing blank would melt into the continuation's first token
        before = [encoder.bos_id, *encoder.encode(shown.strip())]
        ids = [encoder.bos_id, *encoder.encode(shown + row["continuation"])]
        # nanochat asserts that `before` is a prefix; with other tokenizers the seam may move
        start = split_at_common([before, ids], end=False)
        return Example(place, shown.strip(), [Span(ids, start)], None, row.get("category"))
    if task.kind == "multiple_choice":
        shown = preamble + row["query"] + task.delimiter
        texts = [shown + choice for choice in row["choices"]]
        sequences = [[encoder.bos_id, *encoder.encode(text)] for text in texts]
        start = split_at_common(sequences, end=False)
        # one choice may begin another: then nothing of it is left, and its last token is scored
        spans = [Span(ids, max(1, min(start, len(ids) - 1))) for ids in sequences]
        return Example(place, shown, spans, row["gold"], row.get("category"))
    texts = [
        preamble + option + task.delimiter + row["continuation"]
        for option in row["context_options"]
    ]
    sequences = [[encoder.bos_id, *encoder.encode(text)] for text in texts]
    shared = split_at_common(sequences, end=True)
    spans = [Span(ids, min(max(1, len(ids) - shared), len(ids) - 1)) for ids in sequences]
    return Example(place, "\n".join(texts), spans, row["gold"], row.get("category"))


# -- DCLM, by llm-foundry ------------------------------------------------------------------------


def _dclm(
    task: CoreTask, rows: Sequence[Row], encoder: Encoder, max_examples: int | None
) -> Iterator[Example]:
    parts: dict[str | None, list[int]] = {}
    for place, row in enumerate(rows):
        category = row.get("category") if task.name == "jeopardy" else None
        parts.setdefault(category, []).append(place)
    kept = set(range(len(rows)))
    if max_examples is not None and max_examples < len(rows):
        kept = set(random.Random(1337).sample(range(len(rows)), max_examples))
    for places in parts.values():
        draw = random.Random(1234)  # one generator, consumed in the order of the rows
        stripped = [_stripped(rows[place]) for place in places]
        for index, place in enumerate(places):
            shots = _dclm_shots(len(places), task.shots, index, draw)
            if place not in kept:
                continue
            preamble = ""
            for shot in shots:
                before = "\n" if preamble else ""
                shown = _context(task, stripped[shot], trim=False)
                preamble += before + shown + task.delimiter + _answer(task, stripped[shot])
            yield _dclm_example(task, stripped[index], place, preamble, encoder)


def _dclm_shots(size: int, shots: int, index: int, draw: random.Random) -> Iterator[int]:
    """llm-foundry's draw; the order is that of a Python set of ints, as there."""
    shots = min(size - 1, shots)
    if not shots:
        return iter(())
    chosen = set(draw.sample(range(size), shots))
    if index in chosen:
        chosen.remove(index)
        if len(chosen) < size - 1:
            other = draw.choice(range(size))
            while other in chosen or other == index:
                other = draw.choice(range(size))
            chosen.add(other)
    return iter(chosen)


def _stripped(row: Row) -> Row:
    return {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}


def _dclm_example(task: CoreTask, row: Row, place: int, preamble: str, encoder: Encoder) -> Example:
    """Few-shot text, context and answer are encoded one by one and joined."""
    head = [encoder.bos_id, *encoder.encode(preamble)]  # our tokenizer's default puts bos in front
    seam = "\n" if preamble else ""
    category = row.get("category")

    def span(context: str, answer: str) -> Span:
        before = head + encoder.encode(context)
        answer = answer if answer.startswith(" ") else " " + answer
        return Span(before + encoder.encode(answer), len(before))

    if task.kind == "schema":
        delimiter = task.delimiter.rstrip() if preamble else ""
        contexts = [seam + option + delimiter for option in row["context_options"]]
        spans = [span(context, row["continuation"]) for context in contexts]
        return Example(place, preamble + "\n".join(contexts), spans, row["gold"], category)
    context = (seam + _context(task, row, trim=False) + task.delimiter).rstrip()
    if task.kind == "language_modeling":
        return Example(
            place, preamble + context, [span(context, row["continuation"])], None, category
        )
    spans = [span(context, choice) for choice in row["choices"]]
    return Example(place, preamble + context, spans, row["gold"], category)


# -- both ----------------------------------------------------------------------------------------


def _context(task: CoreTask, row: Row, *, trim: bool) -> str:
    """What stands before the delimiter; of a schema row the right one of its contexts."""
    if task.kind == "multiple_choice":
        return row["query"]
    if task.kind == "schema":
        return row["context_options"][row["gold"]]
    return row["context"].strip() if trim else row["context"]


def _answer(task: CoreTask, row: Row) -> str:
    if task.kind == "multiple_choice":
        return row["choices"][row["gold"]]
    return row["continuation"]
