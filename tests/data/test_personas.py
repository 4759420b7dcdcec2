"""Personas: the file, the manner, what is trained on, and the measure that tells them apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.data import personas
from fledge.data.personas import Persona, PersonaConversations, load_persona, parse_persona
from fledge.data.worlds import load_world
from fledge.data.worlds.choices import Choices
from fledge.errors import UserError

WORLD = load_world("village", 3)
MANNERS = st.builds(
    Persona,
    st.just("Ada"),
    st.just("a small model"),
    st.sampled_from(personas.TONES),
    st.integers(0, 2),
    st.integers(0, 3),
)


def made(persona: Persona, count: int = 200) -> list[dict]:
    maker = PersonaConversations(
        persona, lambda kind, i: WORLD.conversation("sft", kind, i), "test"
    )
    return [maker(i) for i in range(count)]


@pytest.mark.parametrize("name", personas.BUILT_IN)
def test_built_in_personas_load(name):
    who = load_persona(name)
    assert who.tone == name and who.control().startswith(f"You are {who.name}, ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tone = 'warm'", "has no name"),
        ("name = 3", "a line of text"),
        ("name = ' '", "a line of text"),
        ("name = 'A'\ntone = 'angry'", "one of plain, warm, terse, playful"),
        ("name = 'A'\nhumour = 3", "from 0 to 2"),
        ("name = 'A'\nemoji = true", "from 0 to 3"),
        ("name = 'A'\nemojis = 1", "is it emoji?"),
        ("name = ", "not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text, said):
    with pytest.raises(UserError) as caught:
        parse_persona(text, where="x.toml")
    assert said in f"{caught.value.what} {caught.value.why}"


def test_a_persona_that_is_nowhere(tmp_path):
    with pytest.raises(UserError, match="there is no persona") as caught:
        load_persona("playfull")
    assert caught.value.fix == "did you mean playful?"
    path = tmp_path / "own.toml"
    path.write_text('name = "Ada"\nemoji = 2\n')
    assert load_persona(str(path)) == Persona("Ada", emoji=2)


@settings(max_examples=200, deadline=None)
@given(MANNERS, MANNERS, st.integers(0, 10_000), st.integers(0, 2))
def test_a_reply_in_one_manner_is_in_that_manner_alone(who, other, key, turn):
    choices = Choices(str(key))
    plain = personas.identity_exchange(choices, who)[1]["content"]
    reply = who.says(plain, choices, turn=turn)
    kept = personas.keeps(who, reply, turn=turn, about_itself="Ada" in plain)
    assert all(kept.values()), (reply, kept)
    apart = personas.keeps(other, reply, turn=turn)
    if other.emoji != who.emoji:
        assert not apart["emoji"]
    wanted = [p.humour > 0 and (turn == 0 or p.humour == 2) for p in (who, other)]
    assert apart["humour"] is (wanted[0] == wanted[1])
    loud = set(personas.OPENERS)
    if who.tone != other.tone and {who.tone, other.tone} & loud:
        assert not apart["tone"]


def test_what_is_trained_on():
    who = load_persona("playful")
    found = made(who)
    heads = [c["messages"][0] for c in found]
    controlled = [c for c, head in zip(found, heads, strict=True) if head["role"] == "system"]
    assert 80 < len(controlled) < 160
    names = {c["messages"][0]["content"].split(",")[0] for c in controlled}
    assert len(names) > 20 and f"You are {who.name}" not in names
    for conversation in found:
        messages = conversation["messages"]
        assert messages[-1]["role"] == "assistant"
        if messages[0]["role"] != "system":
            replies = [m["content"] for m in messages if m["role"] == "assistant"]
            for turn, reply in enumerate(replies):
                assert all(personas.keeps(who, reply, turn=turn, about_itself=False).values())
    assert made(who, 20) == found[:20]  # the same every time


def test_names_and_manners_kept_for_measuring_are_never_trained_on():
    who = Persona("Wren", tone="warm")
    trained = {c["messages"][0]["content"] for c in made(who, 600) if len(c["messages"]) > 1}
    probes = personas.probes(who, 64)
    assert [p for p, _ in probes[::2]] == [who] * 32
    for other, messages in probes[1::2]:
        assert personas.is_held_out(other)
        assert messages[0]["content"] == other.control() and other.control() not in trained
    assert all(who.name not in messages[-1]["content"] for _, messages in probes[::2])


def test_terse_says_the_thing_alone():
    who = Persona("Swift", tone="terse")
    for plain, short in (
        ("The answer is 46.", "46."),
        ("My name is Swift.", "Swift."),
        ("Hello! How can I help you?", "Hello!"),
    ):
        assert who.says(plain, Choices("x"), turn=0) == short
