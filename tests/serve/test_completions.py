"""POST /v1/completions: prompts of every form, echo, log-probabilities, offsets, streams."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from fledge.serve.completions_api import TokenLog, token_text


@pytest.fixture(scope="module")
def client(fake):
    with OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(client, prompt, **more):
    return client.completions.create(model="fake", prompt=prompt, **more)


def last_prompt(fake) -> list[int]:
    return list(fake.engine.requests.values())[-1].prompt


def test_text_gets_a_bos_and_ids_do_not(client, fake, toy):
    assert complete(client, "say hey").choices[0].text == "hey"
    assert last_prompt(fake) == [toy.bos_id, *toy.encode("say hey")]
    ids = toy.encode("say ids")
    assert complete(client, ids).choices[0].text == "ids"
    assert last_prompt(fake) == ids


def test_a_special_token_in_text_stays_text(client, fake, toy):
    complete(client, "say <|assistant_end|>")
    assert toy.eos_id not in last_prompt(fake)


def test_several_prompts_and_choices(client, toy):
    reply = complete(client, ["say one", "say two"], n=2)
    assert [(c.index, c.text) for c in reply.choices] == [
        (0, "one"), (1, "one"), (2, "two"), (3, "two"),
    ]  # fmt: skip
    reply = complete(client, [toy.encode("say p"), toy.encode("say q")])
    assert [c.text for c in reply.choices] == ["p", "q"]
    assert reply.usage.prompt_tokens == sum(len(toy.encode(f"say {c}")) for c in "pq")


def test_default_length_is_openais(client):
    reply = complete(client, "count 100")
    assert reply.usage.completion_tokens == 16 and reply.choices[0].finish_reason == "length"


def test_stream_of_several_prompts(client):
    texts = {0: "", 1: ""}
    ends = {}
    for chunk in complete(client, ["count 20", "say b"], max_tokens=100, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == {0: " ".join(str(i + 1) for i in range(20)), 1: "b"}
    assert ends == {0: "stop", 1: "stop"}


def test_stop_text_is_left_out(client):
    reply = complete(client, "count 50", stop=[" 7", "<|assistant_end|>"], max_tokens=100)
    assert reply.choices[0].text == "1 2 3 4 5 6" and reply.choices[0].finish_reason == "stop"
    assert complete(client, "say x", stop=[]).choices[0].text == "x"


def test_log_probabilities_and_offsets(client):
    logprobs = complete(client, "say aXb", logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "X", "b", "<|assistant_end|>"]
    assert logprobs.text_offset == [0, 1, 2, 3]
    assert logprobs.token_logprobs == [-0.25] * 4
    assert logprobs.top_logprobs[0] == {"a": -0.25, "b": -1.5}


def test_log_probabilities_in_a_stream_are_the_same(client):
    whole = complete(client, "count 12", logprobs=3, max_tokens=50).choices[0].logprobs
    tokens, offsets = [], []
    for chunk in complete(client, "count 12", logprobs=3, max_tokens=50, stream=True):
        logged = chunk.choices[0].logprobs
        if logged is not None:
            tokens += logged.tokens
            offsets += logged.text_offset
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)


def test_offsets_count_characters_not_bytes(client):
    data = "\u00e9\U0001f600!".encode().hex()
    logprobs = complete(client, f"bytes {data}", logprobs=0, max_tokens=50).choices[0].logprobs
    assert logprobs.text_offset == [0, 0, 1, 1, 1, 1, 2, 3]
    assert logprobs.tokens[0] == "bytes:\\xc3"
    assert logprobs.top_logprobs[0] == {"bytes:\\xc3": -0.25}


def test_echo_as_lm_eval_asks(client, toy, fake):
    ids = toy.encode("abc def")
    before = len(fake.engine.requests)
    reply = complete(client, [ids, ids[:2]], max_tokens=1, logprobs=1, echo=True, temperature=0,
                     seed=1234)  # fmt: skip
    assert len(fake.engine.requests) == before  # scored, not decoded
    for choice, prompt in zip(reply.choices, (ids, ids[:2]), strict=True):
        logged = choice.logprobs
        assert len(logged.tokens) == len(logged.token_logprobs) == len(prompt) + 1
        assert logged.token_logprobs[0] is None and logged.top_logprobs[0] is None
        assert logged.token_logprobs[1:-1] == [-1.0] * (len(prompt) - 1)
        for value, text, top in list(
            zip(logged.token_logprobs, logged.tokens, logged.top_logprobs, strict=True)
        )[1:]:
            assert top[text] == value
        assert choice.text == toy.decode(prompt) + "!"
    assert reply.usage.completion_tokens == 2
    # what changes the choice of the token must be decoded
    complete(client, ids, max_tokens=1, logprobs=1, echo=True, temperature=0,
             extra_body={"dry_multiplier": 0.8})  # fmt: skip
    assert len(fake.engine.requests) == before + 1


def test_echo_of_a_whole_context(client, fake):
    reply = complete(client, [65] * 4096, max_tokens=1, logprobs=1, echo=True, temperature=0)
    assert len(reply.choices[0].logprobs.tokens) == 4097
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, [65] * 4097, max_tokens=1, logprobs=1, echo=True, temperature=0)
    assert caught.value.code == "context_length_exceeded"


def test_echo_without_generation(client, toy):
    reply = complete(client, "abc", max_tokens=0, echo=True)
    assert reply.choices[0].text == "abc" and reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 0
    logged = complete(client, "abc", max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert logged.tokens == ["a", "b", "c"]  # the bos in front is not shown,
    assert logged.token_logprobs == [-1.0] * 3  # but it is what the first follows
    assert logged.text_offset == [0, 1, 2]


def test_echo_with_generation(client):
    reply = complete(client, "say hi", max_tokens=5, echo=True, logprobs=1)
    choice = reply.choices[0]
    assert choice.text == "say hihi"
    assert choice.logprobs.tokens[-3:] == ["h", "i", "<|assistant_end|>"]
    assert choice.logprobs.text_offset[-3:] == [6, 7, 8]
    text = "".join(c.choices[0].text for c in complete(client, "say hi", echo=True, stream=True))
    assert text == "say hihi"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [384]}, "prompt"),
        ({"prompt": [[1], [2 << 40]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 16}, "n"),
        ({"prompt": [65] * 4096}, "prompt"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_bad_fields(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "fake", "prompt": "say x", **more})
    assert (caught.value.param or "").partition("[")[0] == param, caught.value


def test_an_empty_text_is_the_beginning_of_one(client, fake, toy):
    complete(client, "")
    assert last_prompt(fake) == [toy.bos_id]


def test_two_ids_with_one_text_keep_the_likelier(toy):
    log = TokenLog(toy, 5)
    log.add(65, -2.0, [(65, -2.0), (66, -1.0)], 0)
    assert log.top_logprobs == [{"A": -2.0, "B": -1.0}]
    log.add(66, float("-inf"), [(65, -1.0)], 1)
    assert log.token_logprobs[-1] == -9999.0  # JSON has no infinity
    assert token_text(toy, 255) == "bytes:\\xff"
    assert token_text(toy, toy.bos_id) == "<|bos|>"


def test_the_remote_tokenizer(client, toy):
    def post(path, body):
        return client.post(f"/../{path}", body=body, cast_to=dict)

    info = client.get("/../tokenizer_info", cast_to=dict)
    assert info["eos_token"] == "<|assistant_end|>" and info["bos_token"] == "<|bos|>"
    assert "generation" in info["chat_template"] and info["pad_token"] == "<|pad|>"
    eos = post("tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})
    assert eos["tokens"] == [toy.eos_id]
    plain = post("tokenize", {"prompt": "The answer", "add_special_tokens": False})
    assert plain["tokens"] == toy.encode("The answer") and plain["count"] == len(plain["tokens"])
    assert post("tokenize", {"prompt": "a"})["tokens"] == [toy.bos_id, 97]
    assert post("detokenize", {"tokens": plain["tokens"]})["prompt"] == "The answer"
    with pytest.raises(openai.BadRequestError):
        post("detokenize", {"tokens": [384]})
    with pytest.raises(openai.NotFoundError):
        client.get("/../tokenizer_info?model=absent", cast_to=dict)
