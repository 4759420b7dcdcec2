"""What mid and sft are about to train on: the table of the mixture, and rows to look at.

`measure` renders a few conversations of every kind and says how many of each the training will
read, in tokens and in passes; `show` packs rows exactly as training does and marks what is learnt.
Called by `stages.chats` and `fledge data show`. It trains nothing and changes no loader's state.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fledge.config import Recipe
from fledge.data.loader import Documents, Loader, Mixture
from fledge.stages.material import open_material
from fledge.stages.own_files import ChatStage
from fledge.tokenizer import Tokenizer

SAMPLE = 32  # conversations of each kind that are rendered for the table
_LEARNT, _READ, _END = "\x1b[32m", "\x1b[2m", "\x1b[0m"  # green, faint


@dataclass(frozen=True)
class Kind:
    """One kind of a mixture; the last two are expected of the whole stage."""

    weight: float  # share of the conversations
    rows: int | None  # different conversations; None: made anew without end
    tokens: float  # of one conversation, on average
    trained: float  # of these
    token_share: float
    conversations: int
    epochs: float | None


def measure(mixture: Documents, shares: Mapping[str, float], stage_tokens: int) -> dict[str, Kind]:
    """The table of a mixture; `shares` are its kinds in the order of its sources."""
    assert isinstance(mixture, Mixture)
    tokens, trained = {}, {}
    for kind, source in zip(shares, mixture.sources, strict=True):
        pieces = [source.piece(i) for i in range(SAMPLE)]
        tokens[kind] = sum(len(ids) for ids, _ in pieces) / SAMPLE
        trained[kind] = sum(int(mask.sum()) for _, mask in pieces) / SAMPLE
    mean = sum(shares[kind] * tokens[kind] for kind in shares)
    found = {}
    for kind, source in zip(shares, mixture.sources, strict=True):
        rows = getattr(getattr(source, "conversation", None), "items", None)
        read = round(stage_tokens * shares[kind] / mean) if mean else 0
        found[kind] = Kind(
            weight=shares[kind],
            rows=len(rows) if rows is not None else None,
            tokens=tokens[kind],
            trained=trained[kind],
            token_share=shares[kind] * tokens[kind] / mean if mean else 0.0,
            conversations=read,
            epochs=read / len(rows) if rows is not None else None,
        )
    return found


def as_json(table: Mapping[str, Kind]) -> dict[str, Any]:
    """For mixture.json."""
    return {kind: dataclasses.asdict(row) for kind, row in table.items()}


def lines(table: Mapping[str, Kind]) -> list[str]:
    """The table as text, one line per kind."""
    header = ("kind", "weight", "of tokens", "rows", "tokens", "learnt", "to read", "passes")
    cells: list[tuple[str, ...]] = [header]
    for kind, row in table.items():
        cells.append(
            (
                kind,
                f"{row.weight:.1%}",
                f"{row.token_share:.1%}",
                "endless" if row.rows is None else f"{row.rows:,}",
                f"{row.tokens:.0f}",
                f"{row.trained:.0f}",
                f"{row.conversations:,}",
                "-" if row.epochs is None else f"{row.epochs:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]


# ---------------------------------------------------------------------------------- rows to see


def rows_of(
    recipe: Recipe, tokenizer: Tokenizer, stage: ChatStage, *, context: int, count: int
) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, mask) of the first rows that the stage trains on, padding left out."""
    documents, _ = open_material(recipe).chats(stage, "train", tokenizer, max_tokens=context)
    loader = Loader(documents, row_tokens=context, pad_id=tokenizer.pad_id, split=False)
    for _ in range(count):
        ids, mask = (a[0].tolist() for a in loader.batch(1))
        end = max(i for i, token in enumerate(ids) if token != tokenizer.pad_id) + 1
        yield ids[:end], mask[:end]


def spans(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> Iterator[tuple[str, bool]]:
    """A row as (text, learnt or only read), special tokens written out."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    start = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and mask[end] == mask[start]:
            continue
        text, plain = "", []
        for token in [*ids[start:end], None]:
            if token is not None and token not in names:
                plain.append(token)
                continue
            text += tokenizer.decode(plain)
            plain = []
            text += names[token] if token is not None else ""
        yield text, bool(mask[start])
        start = end


def as_text(tokenizer: Tokenizer, ids: list[int], mask: list[int], *, colour: str) -> str:
    """colour: "ansi" (green is learnt), "marks" (what is learnt stands in [+ +]) or "html"."""
    found = ""
    for text, learnt in spans(tokenizer, ids, mask):
        if colour == "ansi":
            found += f"{_LEARNT if learnt else _READ}{text}{_END}"
        elif colour == "html":
            found += f"<{'b' if learnt else 'i'}>{html.escape(text)}</{'b' if learnt else 'i'}>"
        else:
            found += f"[+{text}+]" if learnt else text
    return found
