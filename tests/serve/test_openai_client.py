"""The real `openai` client, sync and async, against a live server."""

from __future__ import annotations

import asyncio
import threading

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion

from fledge.serve.settings import Limits, Settings
from tests.serve.fake import fake_server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(text: str) -> list:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def client(fake):
    with OpenAI(base_url=f"{fake.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake", "other"]
    one = client.models.retrieve("other")
    assert one.id == "other" and one.object == "model" and one.max_model_len == 4096
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("absent")
    assert caught.value.code == "model_not_found"


def test_chat(client):
    reply = client.chat.completions.create(model="fake", messages=user("say good day"))
    (choice,) = reply.choices
    assert choice.message.content == "good day" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop" and choice.message.refusal is None
    assert reply.object == "chat.completion" and reply.model == "fake"
    assert reply.id.startswith("chatcmpl-") and reply.system_fingerprint
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == len(b"good day") + 1 - merged(client, "good day")


def merged(client, text: str) -> int:
    """How many bytes of a text the tokenizer has merged away."""
    tokens = client.post("/../tokenize", body={"prompt": text, "add_special_tokens": False},
                         cast_to=dict)["tokens"]  # fmt: skip
    return len(text.encode()) - len(tokens)


def test_no_model_means_the_first(client):
    reply = client.post("/chat/completions", body={"messages": user("say a")},
                        cast_to=ChatCompletion)  # fmt: skip
    assert reply.model == "fake"


def test_text_parts_and_system(client):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "say "},
                                     {"type": "text", "text": "parts"}]},
    ]  # fmt: skip
    reply = client.chat.completions.create(model="fake", messages=messages)
    assert reply.choices[0].message.content == "parts"


def test_stream(client):
    stream = client.chat.completions.create(model="fake", messages=user("count 30"), stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == " ".join(
        str(i + 1) for i in range(30)
    )
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_stream_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=user("say x"), stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_choices(client):
    reply = client.chat.completions.create(model="fake", messages=user("say hm"), n=3)
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert {c.message.content for c in reply.choices} == {"hm"}
    seen: dict[int, str] = {}
    for chunk in client.chat.completions.create(
        model="fake", messages=user("say hm"), n=3, stream=True
    ):
        choice = chunk.choices[0]
        seen[choice.index] = seen.get(choice.index, "") + (choice.delta.content or "")
    assert seen == {0: "hm", 1: "hm", 2: "hm"}


def test_stop_string_across_tokens(client, fake):
    reply = client.chat.completions.create(
        model="fake", messages=user("count 1000"), stop=["4 5", "never"]
    )
    assert reply.choices[0].message.content == "1 2 3 "
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 20


def test_max_tokens(client):
    reply = client.chat.completions.create(
        model="fake", messages=user("count 1000"), max_completion_tokens=3
    )
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 3


def test_logprobs(client):
    reply = client.chat.completions.create(
        model="fake", messages=user("say ab"), logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["a", "b"]
    assert [entry.bytes for entry in content] == [[97], [98]]
    assert all(entry.logprob == -0.25 and len(entry.top_logprobs) == 2 for entry in content)
    chunks = client.chat.completions.create(
        model="fake", messages=user("say ab"), logprobs=True, stream=True
    )
    entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [entry.token for entry in entries] == ["a", "b"]
    assert entries[0].top_logprobs == []


def test_python_tool_runs_here_and_is_shown(client):
    reply = client.chat.completions.create(model="fake", messages=user("python (3+4)*5"))
    message = reply.choices[0].message
    assert message.content == "so:  done" and not message.tool_calls
    code, output = message.tool_events
    assert code == {"index": 0, "type": "python", "at": 4, "code": "(3+4)*5"}
    assert output["output"] == "35" and output["ok"] is True and output["ms"] >= 0
    events = [
        event
        for chunk in client.chat.completions.create(
            model="fake", messages=user("python 1/0"), stream=True
        )
        for event in getattr(chunk.choices[0].delta, "tool_events", None) or []
    ]
    assert [event["type"] for event in events] == ["python", "output"]
    assert events[1]["ok"] is False and "ZeroDivisionError" in events[1]["output"]


def test_python_tool_can_be_switched_off(client, fake):
    client.chat.completions.create(
        model="fake", messages=user("python 3*4"), extra_body={"python_tool": False}
    )
    request = list(fake.engine.requests.values())[-1]
    banned = fake.engine.tokenizer.special_tokens["<|python_start|>"]
    assert request.tools is None and request.params.logit_bias == {banned: -100.0}


@pytest.mark.parametrize("stream", [False, True])
def test_declared_tools_become_tool_calls(client, fake, stream):
    text = 'call weather {"city": "Oslo"}'
    asked = {"model": "fake", "messages": user(text), "tools": [WEATHER]}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            final = events.get_final_completion()
    else:
        final = client.chat.completions.create(**asked)
    (choice,) = final.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and call.function.arguments == '{"city": "Oslo"}'
    assert call.id.startswith("call_") and call.type == "function"
    assert not choice.message.content


def test_tool_results_go_back(client):
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}  # fmt: skip
    messages = [
        *user("say thanks"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    reply = client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER])
    assert reply.choices[0].message.content == "thanks"


def test_tool_choice(client, fake):
    named = {"type": "function", "function": {"name": "weather"}}
    client.chat.completions.create(
        model="fake", messages=user("say x"), tools=[WEATHER], tool_choice=named
    )
    tok = fake.engine.tokenizer
    prompt = list(fake.engine.requests.values())[-1].prompt
    forced = [tok.special_tokens["<|python_start|>"], *tok.encode("weather")]
    assert prompt[-len(forced) :] == forced
    client.chat.completions.create(
        model="fake", messages=user("say x"), tools=[WEATHER], tool_choice="none"
    )
    text = tok.decode(list(fake.engine.requests.values())[-1].prompt)
    assert "weather" not in text


def test_the_tools_are_told_to_the_model(client, fake):
    client.chat.completions.create(
        model="fake",
        messages=[{"role": "system", "content": "Hello."}, *user("say x")],
        tools=[WEATHER],
    )
    text = fake.engine.tokenizer.decode(list(fake.engine.requests.values())[-1].prompt)
    assert "Hello.\n\nYou can call these functions" in text
    assert "- weather: The weather of a city {" in text


def test_sampling_reaches_the_engine(client, fake):
    client.chat.completions.create(
        model="fake", messages=user("say x"), temperature=0.5, top_p=0.9, seed=7, n=2,
        presence_penalty=1, frequency_penalty=-1, logit_bias={"65": 5},
        extra_body={"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2, "dry_multiplier": 0.8,
                    "ignore_eos": True},
    )  # fmt: skip
    params = list(fake.engine.requests.values())[-1].params
    assert (params.temperature, params.top_p, params.seed, params.n) == (0.5, 0.9, 7, 2)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.dry_multiplier == 0.8
    assert (params.top_k, params.min_p, params.repetition_penalty) == (40, 0.1, 1.2)
    assert params.logit_bias == {65: 5} and params.ignore_eos is True


def test_a_fresh_seed_each_time(client, fake):
    for _ in range(2):
        client.chat.completions.create(model="fake", messages=user("say x"))
    first, second = list(fake.engine.requests.values())[-2:]
    assert first.params.seed != second.params.seed and first.params.temperature == 1.0


def test_raw_response(client):
    raw = client.chat.completions.with_raw_response.create(
        model="fake", messages=user("say x"), extra_body={"chat_id": "open-webui sends its own"}
    )
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["x-ignored-parameters"] == "chat_id"
    assert raw.parse().choices[0].message.content == "x"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": ["a" * 129]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"384": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 1 << 63}, "seed"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages[0].content[0].type"),
    ],
)  # fmt: skip
def test_bad_fields(client, more, param):
    asked = {"model": "fake", "messages": user("say x"), **more}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == param, caught.value
    assert caught.value.type == "invalid_request_error" and caught.value.code
    assert caught.value.request_id


def test_context_overflow(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=user("x y " * 4000))
    assert caught.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 4096 tokens" in str(caught.value)


def test_model_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=user("x"))
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "invalid_request_error"


def test_timeout_cancels(client, fake):
    fake.gate.clear()
    try:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(
                model="fake", messages=user("count 9")
            )
    finally:
        fake.gate.set()
    wait_until(lambda: fake.pool.running == 0 and fake.engine.in_flight == 0)


def test_closing_a_stream_cancels(toy):
    fake = fake_server(toy, delay=0.005)
    with fake.server, OpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="fake", messages=user("count 1000"), stream=True
        )
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        stream.close()
        wait_until(lambda: fake.engine.in_flight == 0 and fake.pool.running == 0)
        assert fake.engine.cancelled


def test_error_in_a_stream(toy):
    fake = fake_server(toy)
    with fake.server, OpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:
        text = ""
        with pytest.raises(openai.APIError) as caught:
            for chunk in client.chat.completions.create(
                model="fake", messages=user("crash"), stream=True
            ):
                text += chunk.choices[0].delta.content or ""
        assert "all is well".startswith(text) and caught.value.code == "engine_failure"
        with pytest.raises(openai.InternalServerError) as whole:
            client.chat.completions.create(model="fake", messages=user("crash"))
        assert whole.value.code == "engine_failure"
        reply = client.chat.completions.create(model="fake", messages=user("say alive"))
        assert reply.choices[0].message.content == "alive"
        assert len(fake.engines) == 3  # two crashed


def test_retry_after_is_honoured(toy):
    """The client comes back after a 503 by itself, and then is served."""
    fake = fake_server(toy, Settings(limits=Limits(waiting_rows=1)), slots=1)
    with fake.server, OpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=2) as client:
        fake.gate.clear()
        threads = [
            threading.Thread(
                target=client.chat.completions.create,
                kwargs={"model": "fake", "messages": user("say x")},
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: fake.pool.running == 1 and fake.pool.waiting == 1)
        threading.Timer(0.3, fake.gate.set).start()
        reply = client.chat.completions.create(model="fake", messages=user("say late"))
        assert reply.choices[0].message.content == "late"
        for thread in threads:
            thread.join()
        assert 'status="503"' in fake.server.context.metrics.text()


def test_async_clients_at_once(fake):
    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:

            async def ask(i: int) -> str:
                if i % 2:
                    reply = await client.chat.completions.create(
                        model="fake", messages=user(f"say number {i}")
                    )
                    return reply.choices[0].message.content or ""
                text = ""
                async for chunk in await client.chat.completions.create(
                    model="fake", messages=user(f"say number {i}"), stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*map(ask, range(40)))

    assert asyncio.run(all_at_once()) == [f"number {i}" for i in range(40)]


def test_split_utf8(client):
    """A character of four tokens comes whole; bytes that are none become U+FFFD."""
    text = "\U0001f600 \u00e9".encode()
    chunks = client.chat.completions.create(
        model="fake", messages=user(f"bytes {text.hex()}ff"), stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == "\U0001f600 \u00e9\ufffd"
    assert not any("\ufffd" in piece for piece in pieces[:-2])


def wait_until(condition, seconds: float = 10) -> None:
    """Polls: the server's threads tell of a change to nobody else."""
    import time

    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)
