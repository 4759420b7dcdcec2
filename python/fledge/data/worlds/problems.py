"""Word problems whose solution is one arithmetic expression.

Half need one step, half two. The numbers stand in the expression in the order of the text, so that
solving is recognising the story and copying digits; python does the arithmetic. Expressions whose
hash is 0 modulo 8 belong to the exam; no document, chat or rl problem uses them. Called by prose,
conversations and exams; never evaluates an expression from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from fledge.data.worlds.choices import Choices, Template, Weighted, digest, templates
from fledge.data.worlds.vocabulary import CONTAINERS, Lexicon

Part = Literal["train", "exam"]
Numbers = tuple[int, int, int]  # (a, b, c); c is 0 in one-step problems


@dataclass(frozen=True)
class Problem:
    """A word problem: its text ends in the question; `expression` gives `answer`."""

    text: str
    expression: str
    answer: int


@dataclass(frozen=True)
class Shape:
    """One form of calculation with its ways of being told; `draw` picks operands and answer."""

    expression: str
    draw: Callable[[Choices], tuple[Numbers, int]]
    texts: Sequence[Template]


def is_exam_expression(expression: str) -> bool:
    """True for the eighth of all expressions that only the exam asks."""
    return digest(f"math|{expression}") % 8 == 0


def make_problem(choices: Choices, lexicon: Lexicon, part: Part) -> Problem:
    """A random problem of the training part or of the exam part."""
    one, two = _shapes()
    shape = choices.weighted(one if choices.chance(0.5) else two)
    while True:
        mark = choices.bits
        (a, b, c), answer = shape.draw(choices)
        expression = shape.expression.replace("a", str(a)).replace("b", str(b)).replace("c", str(c))
        if is_exam_expression(expression) == (part == "exam"):
            break
        choices.bits = mark  # a rejected draw is not in the text
    first, second = choices.sample(lexicon.people, 2)
    thing, things = choices.choice(lexicon.things)
    box, boxes = choices.choice(CONTAINERS)
    bound = {
        "p": first, "q": second, "thing": thing, "things": things, "box": box, "boxes": boxes,
        "a": str(a), "b": str(b), "c": str(c),
    }  # fmt: skip
    text = choices.choice(shape.texts).fill(choices, bound, lexicon.slots)
    return Problem(text, expression, answer)


def _number(choices: Choices) -> int:
    low, high = choices.weighted(_sizes())
    return choices.integer(low, high)


@cache
def _sizes() -> Weighted[tuple[int, int]]:
    return Weighted({(2, 9): 0.15, (10, 99): 0.6, (100, 999): 0.25})


def _plus(ch: Choices) -> tuple[Numbers, int]:
    a, b = _number(ch), _number(ch)
    return (a, b, 0), a + b


def _minus(ch: Choices) -> tuple[Numbers, int]:
    a = ch.integer(10, 99) if ch.chance(0.6) else ch.integer(100, 999)
    b = ch.integer(2, a - 1)
    return (a, b, 0), a - b


def _times(ch: Choices) -> tuple[Numbers, int]:
    a, b = ch.integer(2, 40), ch.integer(2, 60)
    return (a, b, 0), a * b


def _over(ch: Choices) -> tuple[Numbers, int]:
    b, answer = ch.integer(2, 12), ch.integer(2, 80)
    return (b * answer, b, 0), answer


def _plus_plus(ch: Choices) -> tuple[Numbers, int]:
    a, b, c = _number(ch), ch.integer(2, 99), ch.integer(2, 99)
    return (a, b, c), a + b + c


def _plus_minus(ch: Choices) -> tuple[Numbers, int]:
    a, b = _number(ch), ch.integer(2, 99)
    c = ch.integer(2, a + b - 1)
    return (a, b, c), a + b - c


def _minus_plus(ch: Choices) -> tuple[Numbers, int]:
    (a, b, _), left = _minus(ch)
    c = ch.integer(2, 99)
    return (a, b, c), left + c


def _minus_minus(ch: Choices) -> tuple[Numbers, int]:
    b, c, left = ch.integer(2, 99), ch.integer(2, 99), ch.integer(1, 300)
    return (b + c + left, b, c), left


def _times_plus(ch: Choices) -> tuple[Numbers, int]:
    a, b, c = ch.integer(2, 20), ch.integer(2, 40), ch.integer(2, 99)
    return (a, b, c), a * b + c


def _times_minus(ch: Choices) -> tuple[Numbers, int]:
    a, b = ch.integer(2, 20), ch.integer(3, 40)
    c = ch.integer(2, a * b - 1)
    return (a, b, c), a * b - c


def _sum_times(ch: Choices) -> tuple[Numbers, int]:
    a, b, c = ch.integer(2, 50), ch.integer(2, 50), ch.integer(2, 20)
    return (a, b, c), (a + b) * c


def _rest_times(ch: Choices) -> tuple[Numbers, int]:
    a = ch.integer(10, 99)
    b, c = ch.integer(2, a - 1), ch.integer(2, 20)
    return (a, b, c), (a - b) * c


def _sum_over(ch: Choices) -> tuple[Numbers, int]:
    c, answer = ch.integer(2, 9), ch.integer(3, 99)
    a = ch.integer(2, c * answer - 2)
    return (a, c * answer - a, c), answer


def _rest_over(ch: Choices) -> tuple[Numbers, int]:
    c, answer, b = ch.integer(2, 9), ch.integer(3, 99), ch.integer(2, 60)
    return (c * answer + b, b, c), answer


def _over_plus(ch: Choices) -> tuple[Numbers, int]:
    b, share, c = ch.integer(2, 9), ch.integer(2, 99), ch.integer(2, 99)
    return (b * share, b, c), share + c


def _over_minus(ch: Choices) -> tuple[Numbers, int]:
    b, share = ch.integer(2, 9), ch.integer(4, 99)
    c = ch.integer(2, share - 1)
    return (b * share, b, c), share - c


def _plus_product(ch: Choices) -> tuple[Numbers, int]:
    a, b, c = _number(ch), ch.integer(2, 20), ch.integer(2, 40)
    return (a, b, c), a + b * c


def _minus_product(ch: Choices) -> tuple[Numbers, int]:
    b, c, left = ch.integer(2, 12), ch.integer(2, 20), ch.integer(1, 300)
    return (b * c + left, b, c), left


_HAVE = (
    "{p} has {a} {things}.",
    "{p} owns {a} {things}.",
    "There are {a} {things} on the table of {p}.",
)
_MORE = (
    "{p} buys {X} more.",
    "{p} finds {X} more.",
    "{q} gives {p} {X} more.",
    "{p} wins {X} more.",
)
_LESS = (
    "{p} loses {X} of them.",
    "{p} sells {X} of them.",
    "{p} gives {X} of them to {q}.",
    "{X} of them break.",
)
_NOW = ("How many {things} are there now?", "How many {things} does {p} have now?")

_ONE = {
    "a+b": (
        "{p} picked {a} {things} in the morning and {b} {things} in the evening. "
        "How many {things} did {p} pick altogether?",
        "{p} has {a} {things} and {q} has {b} {things}. How many {things} do they have together?",
        "In one room there are {a} {things}, in the next room {b}. How many {things} are "
        "there in all?",
        "A shop sold {a} {things} on {day} and {b} on the day after. How many {things} did "
        "it sell in all?",
    ),
    "a-b": (
        "{p} has {a} {things} and {q} has {b}. How many more {things} does {p} have than {q}?",
        "{p} wants {a} {things} but has only {b}. How many {things} are missing?",
        "Of {a} {things}, {b} are {colour}. How many {things} are not {colour}?",
    ),
    "a*b": (
        "There are {a} {boxes} with {b} {things} in each {box}. How many {things} are there "
        "in all?",
        "{p} buys {a} {boxes} of {things}. Each {box} holds {b} {things}. How many {things} "
        "does {p} buy?",
        "{a} children carry {b} {things} each. How many {things} do they carry in all?",
        "{p} makes {a} {things} every day. How many {things} does {p} make in {b} days?",
        "One {thing} costs {a} coins. How many coins do {b} {things} cost?",
    ),
    "a/b": (
        "{p} shares {a} {things} equally among {b} friends. How many {things} does each "
        "friend get?",
        "{p} puts {a} {things} into {b} {boxes}, the same number in each. "
        "How many {things} are in each {box}?",
        "{a} {things} are packed into {boxes} of {b}. How many {boxes} are filled?",
        "{a} coins pay for {b} {things} of the same price. How many coins does one {thing} cost?",
    ),
}  # fmt: skip

_TWO = {
    "a*b+c": (
        "{p} has {a} {boxes} with {b} {things} each and {c} loose {things}. "
        "How many {things} does {p} have?",
        "There are {a} {boxes} with {b} {things} in each {box}. {q} brings {c} more. "
        "How many {things} are there now?",
        "{p} makes {a} {things} a day for {b} days and then {c} more. How many {things} is that?",
    ),
    "a*b-c": (
        "There are {a} {boxes} with {b} {things} in each {box}. {p} takes {c} away. "
        "How many {things} are left?",
        "{p} buys {a} packs of {b} {things} and gives {c} of them to {q}. "
        "How many {things} does {p} keep?",
        "{a} rows of {b} {things} stand in the hall. {c} of them fall over. "
        "How many {things} are still standing?",
    ),
    "(a+b)*c": (
        "Every {box} holds {a} red {things} and {b} blue {things}. "
        "How many {things} are in {c} {boxes}?",
        "{p} packs {a} {things} and {q} packs {b} {things} every day. "
        "How many {things} do they pack in {c} days?",
        "A {thing} costs {a} coins and a cover for it {b} coins. "
        "How many coins do {c} of both cost together?",
    ),
    "(a-b)*c": (
        "Every {box} held {a} {things}, but {b} were taken out of each. "
        "How many {things} are left in {c} {boxes}?",
        "A {thing} used to cost {a} coins. Now it is {b} coins cheaper. "
        "How many coins do {c} {things} cost now?",
        "{p} earns {a} coins a day and spends {b} of them. "
        "How many coins does {p} save in {c} days?",
    ),
    "(a+b)/c": (
        "{p} has {a} {things} and {q} has {b}. They share them all equally among {c} friends. "
        "How many {things} does each friend get?",
        "{p} mixes {a} red and {b} blue {things} and puts them into {c} equal {boxes}. "
        "How many {things} are in each {box}?",
        "{a} girls and {b} boys form {c} teams of the same size. How many children are in "
        "each team?",
    ),
    "(a-b)/c": (
        "{p} had {a} {things}, lost {b} and shared the rest equally among {c} friends. "
        "How many {things} did each friend get?",
        "Of {a} {things}, {b} are broken. The others fill {c} equal {boxes}. "
        "How many {things} are in each {box}?",
        "{p} has {a} coins and keeps {b}. The others buy {c} {things} of the same price. "
        "How many coins does one {thing} cost?",
    ),
    "a/b+c": (
        "{p} and friends share {a} {things} equally among {b} people. Then {p} finds {c} more. "
        "How many {things} does {p} have?",
        "{a} {things} are put into {b} equal {boxes}. {p} adds {c} more to the first {box}. "
        "How many {things} are in the first {box}?",
    ),
    "a/b-c": (
        "{a} {things} are shared equally among {b} children. {p} is one of them and loses {c}. "
        "How many {things} does {p} have left?",
        "{a} {things} are put into {b} equal {boxes}. {p} takes {c} out of the first {box}. "
        "How many {things} are left in the first {box}?",
    ),
    "a+b*c": (
        "{p} has {a} {things} and buys {b} {boxes} with {c} {things} each. "
        "How many {things} does {p} have now?",
        "There are {a} {things} on the floor and {b} {boxes} with {c} {things} each on the table. "
        "How many {things} are there in all?",
    ),
    "a-b*c": (
        "{p} has {a} {things} and fills {b} {boxes} with {c} {things} each. "
        "How many {things} are left over?",
        "{p} has {a} coins and buys {b} {things} for {c} coins each. How many coins are left?",
    ),
}  # fmt: skip


@cache
def _shapes() -> tuple[Weighted[Shape], Weighted[Shape]]:
    """The one-step and the two-step forms; built once, on first use."""
    one = dict(_ONE)
    two = dict(_TWO)
    one["a+b"] += tuple(f"{h} {_x(m, 'b')} {_NOW[1]}" for h in _HAVE[:2] for m in _MORE)
    one["a-b"] += tuple(f"{h} {_x(m, 'b')} {n}" for h, n in _have_now() for m in _LESS)
    for name, first, then in (
        ("a+b+c", _MORE, _MORE),
        ("a+b-c", _MORE, _LESS),
        ("a-b+c", _LESS, _MORE),
        ("a-b-c", _LESS, _LESS),
    ):
        two[name] = tuple(
            f"{h} {_x(s, 'b')} Then {_x(t, 'c')} {n}"
            for h, n in _have_now()
            for s in first
            for t in then
            if s != t
        )
    draws = {
        "a+b": _plus, "a-b": _minus, "a*b": _times, "a/b": _over,
        "a+b+c": _plus_plus, "a+b-c": _plus_minus, "a-b+c": _minus_plus, "a-b-c": _minus_minus,
        "a*b+c": _times_plus, "a*b-c": _times_minus, "(a+b)*c": _sum_times, "(a-b)*c": _rest_times,
        "(a+b)/c": _sum_over, "(a-b)/c": _rest_over, "a/b+c": _over_plus, "a/b-c": _over_minus,
        "a+b*c": _plus_product, "a-b*c": _minus_product,
    }  # fmt: skip
    built = [
        Weighted([(Shape(name, draws[name], templates(t)), 1.0) for name, t in group.items()])
        for group in (one, two)
    ]
    return built[0], built[1]


def _have_now() -> list[tuple[str, str]]:
    return [(_HAVE[0], _NOW[1]), (_HAVE[1], _NOW[1]), (_HAVE[2], _NOW[0])]


def _x(text: str, letter: str) -> str:
    return text.replace("{X}", "{" + letter + "}")
