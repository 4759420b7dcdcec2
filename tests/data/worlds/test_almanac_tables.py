"""The almanac's data files: shape, grammar, variety, and facts that everybody can check."""

from __future__ import annotations

import csv
import math
import string
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fledge

FOLDER = Path(fledge.__file__).parent / "data" / "worlds" / "almanac"
GRAMMAR: dict[str, Any] = tomllib.loads((FOLDER / "grammar.toml").read_text(encoding="utf-8"))
NAMES = sorted(path.stem for path in FOLDER.glob("*.csv"))


def read(name: str) -> tuple[list[str], list[list[str]]]:
    with open(FOLDER / f"{name}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    return rows[0], rows[1:]


def columns() -> dict[tuple[str, str], dict[str, str]]:
    """(table, relation) -> entity -> value, empty cells left out."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in NAMES:
        header, rows = read(name)
        for place, relation in enumerate(header[1:], start=1):
            found[name, relation] = {row[0]: row[place] for row in rows if row[place]}
    return found


def entropy(values: Counter[str]) -> float:
    total = sum(values.values())
    return -sum(n / total * math.log2(n / total) for n in values.values())


def lines(name: str) -> list[str]:
    return (FOLDER / name).read_text(encoding="ascii").splitlines()


def test_every_table_has_its_grammar() -> None:
    assert sorted(GRAMMAR) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_table_is_clean(name: str) -> None:
    header, rows = read(name)
    assert header[1:] == list(GRAMMAR[name]["relations"])
    assert all(len(row) == len(header) for row in rows)
    entities = [row[0] for row in rows]
    assert all(entities) and len(set(map(str.casefold, entities))) == len(entities)
    assert all(any(row[1:]) for row in rows), "a row without any fact"
    for cell in (cell for row in rows for cell in row):
        assert cell.isascii() and (not cell or cell.isprintable())
        assert cell == " ".join(cell.split()) and "{" not in cell and "}" not in cell


@pytest.mark.parametrize("name", NAMES)
def test_values_are_short(name: str) -> None:
    _, rows = read(name)
    if name != "python_results":
        assert all(len(cell.split()) <= 4 for row in rows for cell in row[1:])


@pytest.mark.parametrize("name", NAMES)
def test_wordings(name: str) -> None:
    section = GRAMMAR[name]
    assert all(section[key] for key in ("kind", "plural", "source"))
    for relation in section["relations"].values():
        statements, questions = relation["statements"], relation["questions"]
        assert relation["noun"]
        assert len(set(statements)) == len(statements) >= 5
        assert len(set(questions)) == len(questions) >= 4
        for text in statements:
            slots = {slot for _, slot, _, _ in string.Formatter().parse(text) if slot}
            assert slots & {"e", "E"} and slots & {"v", "V"} and slots <= set("eEvV")
        for text in questions:
            slots = {slot for _, slot, _, _ in string.Formatter().parse(text) if slot}
            assert slots and slots <= {"e", "E"}


def test_code_keeps_its_case() -> None:
    for name in ("python", "python_results"):
        for relation in GRAMMAR[name]["relations"].values():
            wordings = relation["statements"] + relation["questions"]
            assert not any("{E}" in text or "{V}" in text for text in wordings)


def test_no_question_gives_its_answer_away() -> None:
    for (name, relation), cells in columns().items():
        if name == "python_results":
            continue  # '-'.join('xyz') holds letters of everything
        for entity, value in cells.items():
            assert value.casefold() != entity.casefold(), (name, relation, entity)


def test_counts_and_entropy() -> None:
    found = columns()
    answers = Counter(value for cells in found.values() for value in cells.values())
    total = sum(answers.values())
    assert total >= 1500
    assert max(answers.values()) <= 0.05 * total
    per_fact = sum(len(c) * entropy(Counter(c.values())) for c in found.values()) / total
    assert per_fact >= 3.0
    poor = sum(len(c) for c in found.values() if entropy(Counter(c.values())) < 3.0)
    assert poor <= 0.20 * total, "too many facts of relations with few answers"


def test_minimum_sizes() -> None:
    wanted = {"countries": 185, "elements": 118, "animals": 80, "units": 30, "inventions": 70}
    for name, least in {**wanted, "python": 40, "months": 12, "weekdays": 7}.items():
        assert len(read(name)[1]) >= least, name


def test_elements_are_in_order() -> None:
    _, rows = read("elements")
    assert [int(row[2]) for row in rows] == list(range(1, 119))
    assert len({row[1] for row in rows}) == 118


def test_calendar_closes() -> None:
    found = columns()
    for table, step in (("months", "month"), ("weekdays", "day")):
        after, before = found[table, f"next_{step}"], found[table, f"previous_{step}"]
        assert all(before[value] == entity for entity, value in after.items())
    assert set(found["holidays", "month"].values()) == set(found["months", "number"])


def test_words() -> None:
    words = lines("words.txt")
    assert len(words) >= 2200 and words == sorted(set(words))
    letters = set(string.ascii_lowercase)
    assert all(4 <= len(word) <= 10 and set(word) <= letters for word in words)


def test_people() -> None:
    people = lines("people.txt")
    assert len(people) >= 120 and people == sorted(set(people))
    assert all(name.isalpha() and name.istitle() for name in people)


def test_things() -> None:
    pairs = [line.split(",") for line in lines("things.txt")]
    assert len(pairs) >= 100 and all(len(pair) == 2 for pair in pairs)
    assert len({pair[0] for pair in pairs}) == len(pairs)
    assert all(word.isalpha() and word.islower() for pair in pairs for word in pair)


FACTS = """
countries/capital/France/Paris                countries/capital/Japan/Tokyo
countries/capital/Australia/Canberra          countries/capital/Canada/Ottawa
countries/capital/Brazil/Brasilia             countries/capital/Turkey/Ankara
countries/capital/Myanmar/Naypyidaw           countries/capital/Nigeria/Abuja
countries/capital/Kazakhstan/Astana           countries/capital/New Zealand/Wellington
countries/currency/Japan/yen                  countries/currency/Germany/euro
countries/currency/Poland/zloty               countries/language/Austria/German
countries/language/Brazil/Portuguese          countries/continent/Egypt/Africa
elements/symbol/gold/Au                       elements/symbol/potassium/K
elements/symbol/tungsten/W                    elements/symbol/tin/Sn
elements/atomic_number/carbon/6               elements/atomic_number/uranium/92
elements/discoverer/hydrogen/Henry Cavendish  elements/named_after/polonium/Poland
planets/position/Mars/4                       planets/next_planet/Saturn/Uranus
moons/planet/Titan/Saturn                     moons/discoverer/Io/Galileo Galilei
animals/young/dogs/puppies                    animals/young/swans/cygnets
animals/group/lions/pride                     animals/sound/horses/neighing
animals/animal_class/bats/mammals             animals/male/chickens/roosters
months/days/April/30                          months/next_month/August/September
weekdays/next_day/Monday/Tuesday              holidays/month/Halloween/October
units/worth/hour/60 minutes                   units/symbol/kilogram/kg
units/measures/newton/force                   units/named_after/watt/James Watt
inventions/inventor/dynamite/Alfred Nobel     inventions/year/the telephone/1876
python/does/len()/counts the items            python_results/result/17 % 5/2
opposites/opposite/hot/cold                   states/capital/California/Sacramento
"""


@pytest.mark.parametrize(
    "fact",
    [part.strip() for line in FACTS.strip().splitlines() for part in line.split("  ") if part],
)
def test_well_known_fact(fact: str) -> None:
    table, relation, entity, value = fact.split("/")
    assert columns()[table, relation][entity] == value
