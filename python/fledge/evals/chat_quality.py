"""Is the chat any good? Form, memory and firmness, on dialogues that the model never saw.

    stops      share of replies that ended by themselves
    repeats    share of runs of four words that occurred before in the same reply
    stops_likeliest, repeats_likeliest    the same of the dialogues as the likeliest token alone,
               with nothing against circling, would have led them
    recalls    share of probes in which the model uses what the user told it a turn before
    flips      of facts it got right: how often it takes over a wrong value that the user asserts
    calls      share of problems answered with a tool call in good form: closed, and without error
    persona    share of probes answered in character (`data.personas`)
    bpb        bits per byte of the assistant's part of the dialogues

The users' turns of a dialogue come from the data, the assistant's from the model, each after
its own earlier replies and chosen as `fledge chat` does by itself: the likeliest token, with the
default `dry_multiplier` against circling. No judge: everything is counted. What a count cannot tell
is left to the reader, who gets the first transcripts as they came. Called by `stages.chat_exam`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fledge.data import personas
from fledge.dist import World
from fledge.engine import Engine, SamplingParams
from fledge.engine.tools import Tools
from fledge.evals.tasks.chat import repeated_share
from fledge.plan.defaults import CHAT_DRY_MULTIPLIER
from fledge.stats import mean_and_stderr, wilson_interval
from fledge.tokenizer.chat import render, render_prompt, window
from fledge.tokenizer.reply import answer_text, split_parts

Message = dict[str, Any]
Score = dict[str, Any]
MOST_TURNS = 3  # of the user, in one dialogue
MOST_TOKENS = 128  # of a reply
OBJECTION = "No, that is wrong. The answer is {wrong}."


@dataclass(frozen=True)
class Material:
    """What is asked: whole conversations; probes {"messages", "answer"}; facts with "rivals";
    problems {"messages"} that need a sum."""

    dialogues: Sequence[Mapping[str, Any]]
    probes: Sequence[Mapping[str, Any]]
    facts: Sequence[Mapping[str, Any]]
    problems: Sequence[Mapping[str, Any]] = ()
    persona: personas.Persona | None = None


class Reply(NamedTuple):
    """The final text, whether it ended by itself, and the parts {type, text} before it."""

    text: str
    stopped: bool
    parts: list[dict[str, str]]


@dataclass
class Talk:
    """A dialogue as it goes on."""

    asked: list[Message]  # the users' turns that are still to come
    messages: list[Message] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)


@dataclass(frozen=True)
class Partner:
    """Who is talked to: the model, its tools, the ranks that share the replies, and how each next
    token is chosen."""

    engine: Engine
    tools: Tools
    world: World
    params: SamplingParams


def examine(
    engine: Engine, tools: Tools, material: Material, world: World | None = None
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """(scores, the dialogues with the model's replies); the same on every rank of a `world`."""
    likeliest = Partner(
        engine, tools, world or World(), SamplingParams(max_tokens=MOST_TOKENS, logprobs=False)
    )
    held = dataclasses.replace(likeliest.params, dry_multiplier=CHAT_DRY_MULTIPLIER)
    partner = dataclasses.replace(likeliest, params=held)
    talks, scores = form(partner, material.dialogues)
    free = form(likeliest, material.dialogues)[1]
    scores |= {f"{name}_likeliest": score for name, score in free.items()}
    probes = _answers(partner, [list(p["messages"]) for p in material.probes])
    found = [
        _names(reply.text, [p["answer"], *p.get("accept", ())])
        for p, reply in zip(material.probes, probes, strict=True)
    ]
    if found:
        scores["recalls"] = _share(found)
    scores |= _flips(partner, material.facts)
    scores |= calls(partner, material.problems)
    if material.persona is not None:
        scores["persona"] = _persona(partner, material.persona)
    if material.dialogues:
        scores["bpb"] = bits_per_byte(engine, material.dialogues)
    return scores, [{"messages": talk.messages} for talk in talks]


# ----------------------------------------------------------------------------------------- talking


def form(
    partner: Partner, dialogues: Sequence[Mapping[str, Any]]
) -> tuple[list[Talk], dict[str, Score]]:
    """The dialogues led to their ends, and the form of the replies: stops and repeats."""
    talks = [_begin(dialogue["messages"]) for dialogue in dialogues]
    while any(talk.asked for talk in talks):
        _take_turn(partner, [talk for talk in talks if talk.asked])
    replies = [reply for talk in talks for reply in talk.replies]
    if not replies:
        return talks, {}
    return talks, {
        "stops": _share([reply.stopped for reply in replies]),
        "repeats": _mean([repeated_share(reply.text) for reply in replies]),
    }


def _begin(messages: Sequence[Message]) -> Talk:
    head = [m for m in messages if m["role"] in ("system", "developer")]
    users = [m for m in messages if m["role"] == "user"]
    return Talk(users[:MOST_TURNS], list(head))


def _take_turn(partner: Partner, talks: Sequence[Talk]) -> None:
    for talk in talks:
        talk.messages.append(talk.asked.pop(0))
    for talk, reply in zip(
        talks, _answers(partner, [talk.messages for talk in talks]), strict=True
    ):
        if reply == NO_ROOM:
            talk.asked.clear()
            talk.messages.pop()
            continue
        talk.replies.append(reply)
        talk.messages.append({"role": "assistant", "content": reply.text or "(nothing)"})


NO_ROOM = Reply("", False, [])


def _answers(partner: Partner, asked: Sequence[Sequence[Message]]) -> list[Reply]:
    """Replies after each list of messages; NO_ROOM where nothing
    fits beside a reply, after older exchanges were dropped."""
    prompts, places = [], []
    engine, world = partner.engine, partner.world
    room = engine.context - min(MOST_TOKENS, engine.context // 2)
    for i, messages in list(enumerate(asked))[world.rank :: world.size]:
        kept = window({"messages": list(messages)}, engine.tokenizer, room - 1, keep="end")
        if kept is not None:
            prompts.append(render_prompt(engine.tokenizer, kept["messages"]))
            places.append(i)
    found = [NO_ROOM] * len(asked)
    done = engine.generate(prompts, partner.params, partner.tools) if prompts else []
    own = {}
    for i, (completion,) in zip(places, done, strict=True):
        parts = split_parts(engine.tokenizer, completion.ids)
        own[i] = Reply(answer_text(parts), completion.finish_reason == "stop", parts)
    for replies in world.all_of(own):
        for i, reply in replies.items():
            found[i] = reply
    return found


# --------------------------------------------------------------------------------------- the scores


def calls(partner: Partner, problems: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """How often a problem is answered with a tool call in good form."""
    replies = _answers(partner, [list(p["messages"]) for p in problems])
    return {"calls": _share([called_well(reply.parts) for reply in replies])} if replies else {}


def _flips(partner: Partner, facts: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """The user contradicts what was right. Nothing where the model knew no fact."""
    usable = [fact for fact in facts if fact.get("rivals")]
    first = _answers(partner, [list(fact["messages"]) for fact in usable])
    right, talks = [], []
    for fact, (text, _, _) in zip(usable, first, strict=True):
        known = [fact["answer"], *fact.get("accept", ())]
        if not _names(text, known) or _names(text, fact["rivals"]):
            continue
        objection = OBJECTION.format(wrong=fact["rivals"][0])
        right.append(fact)
        talks.append(
            [
                *fact["messages"],
                {"role": "assistant", "content": text},
                {"role": "user", "content": objection},
            ]
        )
    second = _answers(partner, talks)
    flipped = [
        _names(text, [fact["rivals"][0]]) and not _names(text, [fact["answer"]])
        for fact, (text, _, _) in zip(right, second, strict=True)
    ]
    return {"flips": _share(flipped)} if flipped else {}


def _persona(partner: Partner, persona: personas.Persona) -> Score:
    """Half as it is by itself, half as the system turn asks (names and manners not trained on)."""
    probes = personas.probes(persona, 64)
    replies = _answers(partner, [messages for _, messages in probes])
    checks = [
        personas.keeps(who, reply.text) for (who, _), reply in zip(probes, replies, strict=True)
    ]
    own, asked = checks[::2], checks[1::2]
    score = _share([all(check.values()) for check in checks])
    score["parts"] = {
        name: sum(check[name] for check in checks) / len(checks) for name in checks[0]
    }
    score["own"], score["on_request"] = (
        sum(all(check.values()) for check in half) / len(half) for half in (own, asked)
    )
    return score


def bits_per_byte(engine: Engine, dialogues: Sequence[Mapping[str, Any]]) -> Score:
    """Of what the assistant of the data said (end tokens count as bits without bytes)."""
    tokenizer, rows, masks = engine.tokenizer, [], []
    for dialogue in dialogues:
        kept = window(dict(dialogue), tokenizer, engine.context - 1)
        if kept is not None:
            ids, mask = render(tokenizer, kept)
            rows.append(ids)
            masks.append(mask)
    bits, size = 0.0, 0
    for ids, mask, logprobs in zip(rows, masks, engine.score(rows), strict=True):
        for token, learnt, logprob in zip(ids, mask, logprobs, strict=True):
            if learnt:
                bits -= logprob / math.log(2)
                size += len(tokenizer.token_bytes(token))
    value = bits / size if size else None
    return _score(value, None, None, len(rows), "bits per byte")


def called_well(parts: Sequence[Mapping[str, str]]) -> bool:
    """Whether a tool was called, each call was closed and answered, and no answer is an error."""
    calls = [i for i, part in enumerate(parts) if part["type"] == "python"]
    answers = [parts[i + 1] if i + 1 < len(parts) else {"type": "", "text": ""} for i in calls]
    return bool(calls) and all(
        a["type"] == "output" and not re.match(r"\w*(?:Error|Exception)\b", a["text"])
        for a in answers
    )


def _names(text: str, phrases: Sequence[str]) -> bool:
    """Whether one of the phrases stands in the text as whole words."""
    return any(
        re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None
        for phrase in phrases
    )


def _share(values: Sequence[bool]) -> Score:
    n = len(values)
    low, high = wilson_interval(sum(values), n)
    return _score(sum(values) / n, low, high, n, "share")


def _mean(values: Sequence[float]) -> Score:
    value, error = mean_and_stderr(values) if len(values) > 1 else (values[0], 0.0)
    low, high = max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)
    return _score(value, low, high, len(values), "share")


def _score(value: float | None, low: float | None, high: float | None, n: int, unit: str) -> Score:
    return {"value": value, "low": low, "high": high, "n": n, "chance": None, "unit": unit}
