"""Facts as tables: read CSV and grammar, check them, and split what is asked from what is held out.

A table has entities in its first column and one relation per further column; an empty cell is no
fact. The grammar gives every relation its statements (the first is canonical: the prose uses it
most) and its questions. About 30 % of the facts are held out: the prose states them as often as
all others, but no conversation asks them. Called by `world`; never draws random text and never
writes a file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fledge.data.worlds.choices import digest
from fledge.errors import UserError

HELD_OUT = 0.30
MIN_FACTS = 8
MAX_CELL = 120  # characters; longer cells are prose, not values
MAX_FILE = 64 * 2**20


@dataclass(frozen=True)
class Relation:
    """One column: how it is called, stated and asked."""

    name: str
    noun: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Entities of one kind with their values; `possessive` is the word of follow-up questions."""

    name: str
    kind: str
    plural: str
    possessive: str
    relations: dict[str, Relation]
    rows: dict[str, dict[str, str]] = field(repr=False)  # entity -> relation -> value


@dataclass(frozen=True)
class Fact:
    """One cell. `asked` is False for the held-out facts, which only the prose states."""

    id: str
    table: str
    entity: str
    relation: str
    value: str
    asked: bool


def fill(text: str, entity: str, value: str = "") -> str:
    """`text` with {e}, {E}, {v}, {V} replaced in one pass; braces inside values stay."""
    out = []
    rest = text
    slots = {"{e}": entity, "{E}": capital(entity), "{v}": value, "{V}": capital(value)}
    while rest:
        at = rest.find("{")
        if at < 0:
            break
        out.append(rest[:at])
        known = slots.get(rest[at : at + 3])
        out.append(rest[at] if known is None else known)
        rest = rest[at + (1 if known is None else 3) :]
    return "".join(out) + rest


def capital(text: str) -> str:
    """The text with its first letter upper-cased and the rest left alone."""
    return text[:1].upper() + text[1:]


def default_relation(name: str) -> Relation:
    """The grammar of a column of a user's table that has none of its own."""
    noun = name.replace("_", " ")
    return Relation(
        name=name,
        noun=noun,
        statements=(
            f"The {noun} of {{e}} is {{v}}.",
            f"{{E}} has the {noun} {{v}}.",
            f"For {{e}}, the {noun} is {{v}}.",
            f"If you ask for the {noun} of {{e}}, it is {{v}}.",
            f"{{V}} is the {noun} of {{e}}.",
        ),
        questions=(
            f"What is the {noun} of {{e}}?",
            f"Tell me the {noun} of {{e}}.",
            f"Which {noun} does {{e}} have?",
            f"Do you know the {noun} of {{e}}?",
        ),
    )


def read_csv(path: Path) -> tuple[list[str], dict[str, dict[str, str]], str]:
    """(relation names, rows, sha256) of a CSV file; UserError for whatever is wrong with it."""
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text",
            f"byte {error.start} is {data[error.start]:#04x}",
            "save the table as UTF-8 (in a spreadsheet: CSV UTF-8)",
        ) from None
    if "\x00" in text:
        raise UserError(f"{path} holds a zero byte", "it is no text file", "give a CSV table")
    csv.field_size_limit(2**20)
    try:
        lines = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(row)]
    except csv.Error as error:
        raise UserError(
            f"{path} is not a CSV table", str(error), "close every quote; one row per line"
        ) from None
    if not lines:
        raise UserError(
            f"{path} is empty", "there is no header line", "first line: entity,relation,relation"
        )
    header = [cell.strip() for cell in lines[0]]
    _check_header(path, header)
    return header[1:], _rows(path, header, lines[1:]), hashlib.sha256(data).hexdigest()


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder", "a CSV file is needed", "give the file's path")
        if path.stat().st_size > MAX_FILE:
            raise UserError(
                f"{path} is larger than 64 MiB", "a world is held in memory", "give fewer facts"
            )
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the table {path}",
            error.strerror or str(error),
            "give a readable CSV file",
        ) from None
    if not data.strip():
        raise UserError(
            f"{path} is empty", "there is no header line", "first line: entity,relation,relation"
        )
    return data


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) < 2:
        raise UserError(
            f"{path} has only one column",
            "facts need an entity and at least one relation",
            "separate the columns by commas: entity,relation,relation",
        )
    twice = [name for name, n in Counter(name.casefold() for name in header).items() if n > 1]
    if twice:
        raise UserError(
            f"{path} has two columns called {twice[0]!r}",
            "every relation needs a name of its own",
            "rename or remove one of them",
        )
    for name in header:
        if not name or len(name) > MAX_CELL or any(ord(c) < 32 or c in "{}" for c in name):
            raise UserError(
                f"{path} has a column with the name {name[:40]!r}",
                "a column name is a short text without braces or line breaks",
                "name the column after its relation, such as capital",
            )


def _rows(path: Path, header: list[str], lines: list[list[str]]) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(lines, start=2):
        if len(cells) > len(header):
            raise UserError(
                f"row {number} of {path} has {len(cells)} cells",
                f"the header names {len(header)} columns",
                'put a value that holds a comma into double quotes: "a, b"',
            )
        cells = [" ".join(cell.split()) for cell in cells]
        for cell in cells:
            if len(cell) > MAX_CELL or any(ord(c) < 32 for c in cell):
                raise UserError(
                    f"row {number} of {path} has a cell of {len(cell)} characters",
                    f"a value is a short text of at most {MAX_CELL} characters",
                    "shorten it, or check for a quote that is never closed",
                )
        if not cells[0]:
            raise UserError(
                f"row {number} of {path} has no entity",
                "its first cell is empty",
                "name the thing that the row is about in the first column",
            )
        if cells[0] in rows:
            raise UserError(
                f"{path} lists {cells[0]!r} twice (row {number})",
                "one entity has one row",
                "merge the two rows",
            )
        found = zip(header[1:], cells[1:], strict=False)
        rows[cells[0]] = {name: value for name, value in found if value}
    return rows


def table_from_csv(path: Path) -> tuple[Table, str]:
    """A user's table with the default grammar, and the file's sha256."""
    names, rows, sha = read_csv(path)
    facts = sum(len(row) for row in rows.values())
    if facts < MIN_FACTS:
        raise UserError(
            f"{path} holds {facts} facts",
            f"a world needs at least {MIN_FACTS} to have something to learn and something to ask",
            "add rows: one entity per line, one value per column",
        )
    kind = " ".join(path.stem.replace("_", " ").replace("-", " ").split()) or "thing"
    kind = "".join(c for c in kind if c not in "{}")
    relations = {name: default_relation(name) for name in names}
    return Table("facts", kind, kind, "its", relations, rows), sha


def tables_from_folder(folder: Path) -> tuple[list[Table], dict[str, str]]:
    """The tables of a folder (NAME.csv, grammar.toml) in order of name; every file's sha256."""
    grammar_bytes = (folder / "grammar.toml").read_bytes()
    grammar: dict[str, Any] = tomllib.loads(grammar_bytes.decode("utf-8"))
    shas = {"grammar.toml": hashlib.sha256(grammar_bytes).hexdigest()}
    tables = []
    for path in sorted(folder.glob("*.csv")):
        names, rows, sha = read_csv(path)
        shas[path.name] = sha
        if path.stem not in grammar:
            raise UserError(
                f"{path.name} has no grammar", f"[{path.stem}] is not in grammar.toml", "add it"
            )
        tables.append(table_from_grammar(path.stem, grammar[path.stem], names, rows))
    return tables, shas


def table_from_grammar(
    name: str, grammar: Mapping[str, Any], columns: Iterable[str], rows: dict[str, dict[str, str]]
) -> Table:
    """The table `name` with its section of grammar.toml; a column without one gets the default."""
    relations = {}
    for column in columns:
        section = grammar.get("relations", {}).get(column)
        if section is None:
            relations[column] = default_relation(column)
        else:
            relations[column] = Relation(
                column,
                section.get("noun", column.replace("_", " ")),
                tuple(section["statements"]),
                tuple(section["questions"]),
            )
    kind = grammar.get("kind", name)
    return Table(
        name,
        kind,
        grammar.get("plural", kind + "s"),
        grammar.get("possessive", "its"),
        relations,
        rows,
    )


def split_facts(tables: Iterable[Table], seed: int) -> list[Fact]:
    """Every fact in table order, about 30 % of each relation held out, by hash of id and seed.

    Facts that join the same two names (capital of France = Paris, country of Paris = France) share
    one fate, so that no question gives another's answer away. An entity with several facts keeps at
    least one that is asked.
    """
    facts = [
        Fact(f"{t.name}/{entity}/{relation}", t.name, entity, relation, value, True)
        for t in tables
        for entity, row in t.rows.items()
        for relation, value in row.items()
    ]
    pair_of = {f.id: "\n".join(sorted((f.entity.casefold(), f.value.casefold()))) for f in facts}
    rank = {f.id: digest(f"split|{seed}|{f.id}") for f in facts}
    leader: dict[str, str] = {}
    by_relation: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    by_entity: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    for f in facts:
        leader.setdefault(pair_of[f.id], f.id)
        by_relation[f.table, f.relation].append(f)
        by_entity[f.table, f.entity].append(f)
    held: set[str] = set()
    for members in by_relation.values():
        ordered = sorted(members, key=lambda f: rank[f.id])
        held.update(f.id for f in ordered[: round(HELD_OUT * len(ordered))])
    held = {f.id for f in facts if leader[pair_of[f.id]] in held}
    for members in by_entity.values():
        if len(members) > 1 and all(f.id in held for f in members):
            saved = pair_of[max(members, key=lambda f: rank[f.id]).id]
            held -= {f.id for f in facts if pair_of[f.id] == saved}
    return [replace(f, asked=f.id not in held) for f in facts]
