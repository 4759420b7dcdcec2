"""A tiny real model behind the server: text, scores and streams equal those in process."""

from __future__ import annotations

import threading

import pytest
from openai import OpenAI

from fledge.engine import Engine, Request, SamplingParams
from fledge.engine.tools import Tools
from fledge.serve import scoring
from fledge.serve.context import Context
from fledge.serve.metrics import Metrics
from fledge.serve.models import Models, served_models
from fledge.serve.server import LiveServer, make_context
from fledge.serve.settings import Limits, Settings
from fledge.tokenizer.chat import render_prompt
from tests.helpers_model import tiny_model
from tests.serve.browser import a_page, answered, press, say
from tests.serve.test_http import ask, chat

CONTEXT = 128


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    """A checkpoint folder of random weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    path.mkdir()
    tiny_model(toy.vocab_size, context=CONTEXT).save(path)
    toy.save(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_folder(folder)


@pytest.fixture(scope="module")
def server(folder):
    context, servers = make_context([f"small={folder}"], Settings())
    live = LiveServer(context)
    servers.append(live.server)
    with live:
        yield live


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=100) as made:
        yield made


def test_greedy_chat_equals_the_engine(client, engine, toy):
    messages = [{"role": "user", "content": "3 plus 4 is"}]
    prompt = render_prompt(toy, messages)
    with Tools() as tools:
        ((expected,),) = engine.generate([prompt], SamplingParams(max_tokens=40), tools)
    reply = client.chat.completions.create(
        model="small", messages=messages, temperature=0, max_tokens=40, logprobs=True
    )
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.completion_tokens == len(expected.ids)
    assert reply.choices[0].finish_reason == expected.finish_reason
    logged = reply.choices[0].logprobs.content
    assert logged
    for entry in logged:
        assert any(abs(entry.logprob - value) < 1e-5 for value in expected.logprobs)


def test_seeded_samples_do_not_depend_on_company(client):
    def sample(out: list[str], seed: int) -> None:
        reply = client.completions.create(
            model="small", prompt="The answer", seed=seed, max_tokens=30, temperature=1
        )
        out.append(reply.choices[0].text)

    alone: list[str] = []
    sample(alone, 7)
    crowd: list[list[str]] = [[] for _ in range(12)]
    threads = [
        threading.Thread(target=sample, args=(out, 7 if i % 2 else i))
        for i, out in enumerate(crowd)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {out[0] for out in crowd[1::2]} == set(alone)
    assert len({out[0] for out in crowd}) > 2


def test_echoed_log_probabilities_equal_scoring_in_process(client, engine, toy):
    texts = ["3 plus 4 is 7. The answer is 7.", "x", "The answer", "11 plus 12 is 23"]
    rows = [toy.encode(text) for text in texts]
    rows.append((rows[0] * 20)[:CONTEXT])
    expected = engine.score([row for row in rows if len(row) < CONTEXT])
    reply = client.completions.create(
        model="small", prompt=rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1
    )
    largest = 0.0
    for choice, row, scores in zip(reply.choices, rows, expected, strict=False):
        logged = choice.logprobs
        assert len(logged.token_logprobs) == len(row) + 1
        pairs = zip(logged.token_logprobs[1:-1], scores[1:], strict=True)
        largest = max([largest, *(abs(a - b) for a, b in pairs)])
        assert logged.token_logprobs[-1] == max(logged.top_logprobs[-1].values())
    assert largest < 1e-5
    assert len(reply.choices[-1].logprobs.tokens) == CONTEXT + 1


def test_scores_are_those_of_the_weights_that_decode(folder, engine, toy):
    rounded = Engine(engine.model, toy, weights="int8")
    rows = [toy.encode("3 plus 4 is 7."), toy.encode("The answer is 7.")]
    found = [scored.logprobs[1:] for scored in scoring.score_top(rounded, rows, 1)]
    for row, values in zip(found, rounded.score(rows), strict=True):
        assert row == pytest.approx(values[1:], abs=1e-5)
    exact = [value for row in engine.score(rows) for value in row[1:]]
    ours = [value for row in rounded.score(rows) for value in row[1:]]
    assert max(abs(a - b) for a, b in zip(ours, exact, strict=True)) > 1e-4


def test_scoring_and_generation_agree_on_the_next_token(client):
    asked = {"model": "small", "prompt": "12 plus 5 is", "max_tokens": 1, "temperature": 0}
    scored = client.completions.create(**asked, logprobs=5, echo=True).choices[0].logprobs
    decoded = client.completions.create(**asked, logprobs=5).choices[0].logprobs
    assert scored.tokens[-1] == decoded.tokens[-1]
    assert scored.token_logprobs[-1] == pytest.approx(decoded.token_logprobs[-1], abs=1e-5)
    first, second = scored.top_logprobs[-1], decoded.top_logprobs[-1]
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert second[key] == pytest.approx(value, abs=1e-5)


def test_stream_equals_whole(client):
    asked = {"model": "small", "messages": [{"role": "user", "content": "5 plus 6?"}],
             "temperature": 0.9, "seed": 11, "max_tokens": 50, "n": 2}  # fmt: skip
    whole = client.chat.completions.create(**asked)
    texts, reasons = ["", ""], [None, None]
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]


def test_max_tokens_beyond_the_context_are_cut(client):
    reply = client.completions.create(
        model="small", prompt="1 plus", max_tokens=100_000, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == CONTEXT


def test_the_fake_engine_speaks_the_protocol_of_the_real_one(engine, toy):
    """What the other tests stand on: the same calls, the same events."""
    from tests.serve.fake import FakeEngine

    fake = FakeEngine(toy)
    fake.gate.set()
    for one in (engine, fake):
        request = Request(toy.encode("say abc"), SamplingParams(max_tokens=5, n=2, top_logprobs=2))
        request_id = one.add(request)
        events = []
        while one.in_flight:
            events += one.step()
        assert {event.request_id for event in events} == {request_id}
        for choice in (0, 1):
            own = [event for event in events if event.choice == choice]
            assert [e.finish_reason is not None for e in own] == [False] * (len(own) - 1) + [True]
            assert all(len(event.top_logprobs) == 2 and event.sampled for event in own)
        other = one.add(request)
        one.cancel(other)
        assert one.in_flight == 0
        one.step()


def test_names_and_faults_of_checkpoints(folder, toy, tmp_path):
    from fledge.errors import UserError

    def made(*words):
        return served_models(words, limits=Limits(), metrics=Metrics(), on_fatal=lambda error: None)

    assert [model.name for model in made(str(folder), f"b={folder}")] == ["tiny", "b"]
    with pytest.raises(UserError, match="two models"):
        made(str(folder), str(folder))
    with pytest.raises(UserError):
        made(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match="not a complete"):
        made(str(tmp_path))


def test_broken_weights_end_the_server_with_their_error(folder, tmp_path):
    import shutil

    from fledge.errors import UserError

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    context, servers = make_context([str(broken)], Settings())
    live = LiveServer(context)
    servers.append(live.server)
    live._thread.start()
    live._thread.join(60)
    assert isinstance(live.server.fatal, UserError)


def test_a_foreign_template_is_used(folder, toy, tmp_path):
    import shutil

    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign)
    (foreign / "chat_template.jinja").write_text(
        "{{ bos_token }}<|user_start|>{{ messages[-1].content }}<|user_end|><|assistant_start|>"
    )
    models = served_models(
        [str(foreign)], limits=Limits(), metrics=Metrics(), on_fatal=lambda error: None
    )
    with LiveServer(Context(Models(models), Settings(), Metrics(), None)) as server:
        body = chat("hello", max_tokens=2, temperature=0)
        status, _, reply = ask(server.url, "POST", "/v1/chat/completions", body)
        assert status == 200, reply
        expected = [toy.bos_id, toy.special_tokens["<|user_start|>"], *toy.encode("hello"),
                    toy.special_tokens["<|user_end|>"],
                    toy.special_tokens["<|assistant_start|>"]]  # fmt: skip
        assert f'"prompt_tokens":{len(expected)}'.encode() in reply


@pytest.mark.browser
def test_the_page_with_a_real_engine(browser, server):
    """Random weights write nonsense; it streams, stops, goes on, and every token has its odds."""
    with a_page(browser, server.url, models=1) as page:
        press(page, "Settings")
        page.fill("#s-max_tokens", "8")
        press(page, "Done")
        say(page, "3 plus 4 is")
        tools = page.locator(".message.assistant .tools")
        assert "8 tokens" in tools.inner_text() or "tokens" in tools.inner_text()
        if "cut at its longest" in tools.inner_text():
            before = page.locator(".message.assistant [data-kind]").all_inner_texts()
            press(page, "Continue")
            answered(page)
            after = page.locator(".message.assistant [data-kind]").all_inner_texts()
            assert "".join(after).startswith("".join(before)[:-1])
        press(page, "How sure the model was of each token")
        assert page.locator(".heat span").count() > 0
        press(page, "Regenerate")
        answered(page)
        assert page.locator(".switch").inner_text() == "\u20392/2\u203a"
