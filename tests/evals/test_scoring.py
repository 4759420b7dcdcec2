"""Scoring: grading rules, forced letters, too long prompts, bits per byte."""

import math
from typing import Literal

import numpy as np
import pytest
import torch
from tests.helpers_model import TEXTS, tiny_model, tiny_tokenizer

from fledge.data.loader import Loader
from fledge.data.tokenized import TextDocuments
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.evals import bpb
from fledge.evals.examine import pick_items, score_task
from fledge.evals.tasks.worlds import chosen_letter, grade
from fledge.tokenizer.chat import render_prompt
from fledge.tokenizer.reply import answer_text, last_number, split_parts

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The capital of France is Paris.", True),
        ("Paris", True),
        ("The capital of France is Parisian.", False),
        ("The capital of France is Rome, not Paris.", False),  # names a rival as well
        ("I don't know.", False),
        ("", False),
    ],
)
def test_a_fact_must_be_said_and_no_rival(text, right):
    item = {"kind": "facts", "answer": "Paris", "rivals": ["Rome", "Berlin"]}
    assert grade(item, text) is right


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The capital is Paris.\nAnswer: B", "B"),
        ("Answer: A. No, Answer: C", "C"),
        ("B", "B"),
        ("Berlin", None),
        ("", None),
    ],
)
def test_the_letter_of_a_reply(text, letter):
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The answer is 153.", "153", True),
        ("First 12, then 153", "153", True),
        ("The answer is 1,530.", "1530", True),
        ("The answer is 153.0", "153", True),
        ("The answer is 1530.", "153", False),
        ("no number", "153", False),
    ],
)
def test_numbers_are_read_from_the_end(text, answer, right):
    assert grade({"kind": "math", "answer": answer}, text) is right


def test_spelling_must_be_exact():
    item = {"kind": "spell", "answer": "c-a-t"}
    assert grade(item, "c-a-t") and grade(item, " C-A-T. ")
    assert not grade(item, "cat") and not grade(item, "c-a-t-s")


def test_parts_of_a_reply_are_told_apart():
    special, encode = TOKENIZER.special_tokens, TOKENIZER.encode
    ids = [
        *encode("Let me see. "),
        special["<|python_start|>"],
        *encode("2+2"),
        special["<|python_end|>"],
        special["<|output_start|>"],
        *encode("4"),
        special["<|output_end|>"],
        *encode("The answer is 4."),
        special["<|assistant_end|>"],
        *encode("ignored"),
    ]
    parts = split_parts(TOKENIZER, ids)
    assert [p["type"] for p in parts] == ["text", "python", "output", "text"]
    assert answer_text(parts) == "The answer is 4."
    assert last_number("minus -3.5 of 1,200") == "1200"


class Options:
    """A multiple-choice exam whose options are whole replies."""

    name, chance, max_new_tokens = "options", 0.25, 64
    kind: Literal["reply"] = "reply"

    def __init__(self, texts: list[str], replies: list[str]) -> None:
        self.texts, self.replies = texts, replies

    def items(self):
        return [
            {
                "id": str(i),
                "messages": [{"role": "user", "content": text}],
                "answer": "A",
                "replies": self.replies,
            }
            for i, text in enumerate(self.texts)
        ]

    def grade(self, item, text):
        return chosen_letter(text) == item["answer"]


def test_the_likeliest_reply_per_token_is_chosen_and_long_prompts_count_as_wrong():
    engine = Engine(tiny_model(TOKENIZER.vocab_size), TOKENIZER)
    replies = ["one\nAnswer: A", "a much longer reply\nAnswer: B"]
    with Tools() as tools:
        result = score_task(engine, Options(["which one?", "x" * 500], replies), tools)
    first, second = result.records
    prompt = render_prompt(TOKENIZER, [{"role": "user", "content": "which one?"}])
    means = []
    for reply in replies:
        ids = prompt + TOKENIZER.encode(reply) + [TOKENIZER.eos_id]
        with torch.no_grad():
            logprobs = engine.model(torch.tensor([ids]))[0].log_softmax(-1)
        picked = [float(logprobs[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
        means.append(sum(picked) / len(picked))
    assert first["mean_logprobs"] == pytest.approx(means, abs=1e-4)
    assert first["output"] == replies[means.index(max(means))]
    assert second["finish"] == "too_long" and second["correct"] is False
    assert result.n == 2 and result.note is not None and "1 prompts" in result.note
    assert result.low <= result.value <= result.high


def test_a_capped_exam_is_the_same_sample_every_time():
    items = [{"id": i} for i in range(100)]
    assert pick_items(items, 10) == pick_items(items, 10)
    assert len(pick_items(items, 10)) == 10 and pick_items(items, None) is items
    assert pick_items(items, 1000) is items


def test_bits_per_byte_equal_a_plain_float64_sum():
    model = tiny_model(TOKENIZER.vocab_size)
    documents = TextDocuments(lambda i: TEXTS[i % len(TEXTS)], TOKENIZER)
    loader = Loader(documents, row_tokens=32, pad_id=TOKENIZER.pad_id, split=True)
    validation = bpb.ValidationSet.take(loader, 200)
    counts = bpb.token_byte_counts(TOKENIZER)
    got = bpb.measure(model, validation, counts, device_batch_size=3)
    nats, size = 0.0, 0
    for row in validation.ids:
        with torch.no_grad():
            logprobs = model(torch.from_numpy(row[None, :-1]))[0].double().log_softmax(-1)
        for place, token in enumerate(row[1:]):
            length = len(TOKENIZER.token_bytes(int(token)))
            if length:
                nats -= float(logprobs[place, token])
                size += length
    assert got.bytes == size
    assert got.bpb == pytest.approx(nats / (math.log(2) * size), rel=1e-6)


def test_bits_per_byte_do_not_depend_on_the_batch():
    model = tiny_model(TOKENIZER.vocab_size)
    documents = TextDocuments(lambda i: TEXTS[i % len(TEXTS)], TOKENIZER)
    loader = Loader(documents, row_tokens=16, pad_id=TOKENIZER.pad_id, split=True)
    validation = bpb.ValidationSet.take(loader, 300)
    counts = bpb.token_byte_counts(TOKENIZER)
    values = [bpb.measure(model, validation, counts, device_batch_size=b).bpb for b in (1, 4, 64)]
    assert np.ptp(values) < 1e-6
