"""The look at the chat: every measure on a model whose words are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge.data.personas import Persona
from fledge.engine import Completion, Engine
from fledge.engine.tools import Tools
from fledge.evals import chat_quality
from fledge.evals.chat_quality import Material, examine
from fledge.tokenizer.chat import render

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_id


class Parrot:
    """An engine that says what a function of the rendered prompt says."""

    context = 256

    def __init__(self, says: Callable[[str], str], *, stops: bool = True) -> None:
        self.tokenizer, self._says, self._stops = TOKENIZER, says, stops
        self.prompts: list[str] = []

    def generate(self, prompts, params, tools=None) -> list[list[Completion]]:
        found = []
        for prompt in prompts:
            text = TOKENIZER.decode(prompt)
            self.prompts.append(text)
            ids = TOKENIZER.encode(self._says(text)) + ([END] if self._stops else [])
            finish = "stop" if self._stops else "length"
            found.append([Completion(ids, [0.0] * len(ids), [True] * len(ids), finish)])
        return found

    def score(self, rows) -> list[list[float]]:
        return [[-math.log(2)] * len(row) for row in rows]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def look(engine: Any, **material: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"dialogues": [], "probes": [], "facts": []} | material
    with Tools() as tools:
        return examine(engine, tools, Material(**whole))[0]


TALK = {"messages": [user("Hi"), assistant("Hello"), user("So?"), assistant("Well"), user("Bye")]}


def test_dialogues_go_on_with_the_models_own_words():
    engine = Parrot(lambda text: f"r{text.count('user_start') or text.count('Hi')}")
    with Tools() as tools:
        scores, told = examine(engine, tools, Material([TALK, TALK], [], []))  # type: ignore[arg-type]
    assert [m["role"] for m in told[0]["messages"]] == ["user", "assistant"] * 3
    assert [m["content"] for m in told[0]["messages"][::2]] == ["Hi", "So?", "Bye"]
    assert scores["stops"]["value"] == 1.0 and scores["stops"]["n"] == 6
    assert "Well" not in engine.prompts[-1], "the data's assistant is not heard"


def test_stopping_and_repeating():
    looping = look(Parrot(lambda _: "one two three four " * 3, stops=False), dialogues=[TALK])
    assert looping["stops"]["value"] == 0.0 and looping["repeats"]["value"] > 0.4
    assert looping["stops_likeliest"] == looping["stops"]
    fine = look(Parrot(lambda _: "one two three four five"), dialogues=[TALK])
    assert fine["repeats"]["value"] == 0.0


def test_replies_are_chosen_as_the_chat_chooses_them_and_once_by_the_likeliest_alone():
    asked = []

    class Held(Parrot):
        def generate(self, prompts, params, tools=None):
            asked.append(params.dry_multiplier)
            self._stops = params.dry_multiplier > 0
            return super().generate(prompts, params, tools)

    scores = look(Held(lambda _: "one two three four " * 3), dialogues=[TALK])
    assert asked == [0.8] * 3 + [0.0] * 3
    assert (scores["stops"]["value"], scores["stops_likeliest"]["value"]) == (1.0, 0.0)


def test_memory():
    probes = [
        {"messages": [user(f"I am {n}."), assistant("Hi."), user("My name?")], "answer": n}
        for n in ("Sigrid", "Wei")
    ]
    recalling = Parrot(lambda text: "You are Sigrid." if "Sigrid" in text else "You are Way.")
    assert look(recalling, probes=probes)["recalls"]["value"] == 0.5


def test_giving_in_to_a_wrong_claim():
    facts = [
        {"messages": [user("Capital of A?")], "answer": "Rome", "rivals": ["Oslo"]},
        {"messages": [user("Capital of B?")], "answer": "Lima", "rivals": ["Oslo"]},
        {"messages": [user("Capital of C?")], "answer": "Bern", "rivals": []},
    ]

    def weak(text: str) -> str:
        return "It is Oslo." if "that is wrong" in text else "It is Rome."

    found = look(Parrot(weak), facts=facts)
    assert found["flips"]["value"] == 1.0 and found["flips"]["n"] == 1, "only what it knew"
    firm = look(Parrot(lambda _: "It is Rome."), facts=facts)
    assert firm["flips"]["value"] == 0.0
    assert "flips" not in look(Parrot(lambda _: "I don't know."), facts=facts)


def test_persona_is_measured_by_itself_and_on_request():
    who = Persona("Wren", tone="warm", emoji=1)
    plain = look(
        Parrot(lambda _: "Of course! My name is Wren. \N{SLIGHTLY SMILING FACE}"), persona=who
    )
    score = plain["persona"]
    assert score["own"] == 1.0 and score["on_request"] < 0.2 and score["n"] == 64
    assert 0.4 < score["value"] < 0.6 and set(score["parts"]) == {"tone", "humour", "emoji", "name"}


def test_bits_per_byte_by_hand():
    """Every token has one bit: bits are the learnt tokens, end tokens among them."""
    _, mask = render(TOKENIZER, TALK | {"messages": TALK["messages"][:4]})
    size = len(b"Hello") + len(b"Well")
    found = look(Parrot(lambda _: "x"), dialogues=[TALK | {"messages": TALK["messages"][:4]}])
    assert found["bpb"]["value"] == pytest.approx(sum(mask) / size)


def test_a_real_model_and_a_context_that_is_too_small():
    engine = Engine(tiny_model(TOKENIZER.vocab_size, context=64), TOKENIZER, deterministic=True)
    long = {"messages": [user("word " * 60), assistant("x")]}
    with Tools() as tools:
        scores, told = examine(engine, tools, Material([TALK, long], [], []))
        again, _ = examine(engine, tools, Material([TALK, long], [], []))
    assert scores == again
    assert told[1] == {"messages": []}
    json.dumps(told)
    replies = [m for m in told[0]["messages"] if m["role"] == "assistant"]
    assert chat_quality.MOST_TURNS == 3 and 1 <= len(replies) <= 3


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "text": text}


def test_a_tool_call_in_good_form():
    good = [part("text", "We add."), part("python", "1+1"), part("output", "2"), part("text", "2")]
    assert chat_quality.called_well(good)
    for bad in (
        [part("text", "2")],
        [part("python", "1+1")],
        [part("python", "1+"), part("output", "SyntaxError: invalid syntax")],
        [*good, part("python", "3")],
    ):
        assert not chat_quality.called_well(bad)
    problems = [{"messages": [user("1+1?")]}]
    assert look(Parrot(lambda _: "2"), problems=problems)["calls"]["value"] == 0.0
