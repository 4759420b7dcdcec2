"""Whatever happens around a row, its greedy answer is that of a twenty-line generator.

The scheduler is driven by random arrivals, lengths, numbers of choices, stops, cancels, chunk
sizes, overlapping prompts and tools, with NaN in every place that is not a row's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge.engine import Engine, Request, SamplingParams, TokenEvent, packed, scheduler
from fledge.engine.native import can_step
from fledge.engine.tools import Tools
from fledge.model import ModelConfig, Transformer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(TOKENIZER.vocab_size, context=160)
SPECIAL = TOKENIZER.special_tokens
START, END = SPECIAL["<|python_start|>"], SPECIAL["<|python_end|>"]
STOPS = {SPECIAL["<|assistant_end|>"], SPECIAL["<|bos|>"]}


@torch.inference_mode()
def naive_and_certain(
    prompt: list[int], params: SamplingParams, tools: Tools | None
) -> tuple[list[int], int]:
    """The readable twin: the whole sequence through the model for every token.

    Also how many tokens come before the first whose lead over the second best is within 1e-4.
    """
    ids, sampled, close = list(prompt), 0, 10**9
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else STOPS)
    state = tools.new_state() if tools else None
    while True:
        logits = MODEL(torch.tensor([ids]))[0, -1]
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        best = logits.topk(2).values
        if best[0] - best[1] <= 1e-4:
            close = min(close, len(ids) - len(prompt))
        ids.append(int(logits.argmax()))
        sampled += 1
        if ids[-1] in stops or sampled == params.max_tokens or len(ids) >= 160:
            return ids[len(prompt) :], close
        if tools and ids[-1] == END and START in ids[len(prompt) : -1]:
            begin = len(ids) - 1 - ids[::-1].index(START)
            text = tools.run(TOKENIZER.decode(ids[begin + 1 : -1]), state).text
            output = [SPECIAL["<|output_start|>"], *TOKENIZER.encode(text)]
            ids += [*output, SPECIAL["<|output_end|>"]][: 160 - len(ids)]
            if len(ids) >= 160:
                return ids[len(prompt) :], close


def naive(prompt: list[int], params: SamplingParams, tools: Tools | None) -> list[int]:
    return naive_and_certain(prompt, params, tools)[0]


@dataclass
class Client:
    """What one request has heard so far."""

    request: Request
    answers: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def hear(self, event: TokenEvent) -> None:
        assert event.choice not in self.reasons, "an event after the end"
        if event.token >= 0:
            self.answers.setdefault(event.choice, []).append(event.token)
        assert event.logprob == event.logprob, "NaN leaked"
        if event.finish_reason:
            self.reasons[event.choice] = event.finish_reason


def random_request(rng: random.Random, tools: Tools, stems: list[list[int]]) -> Request:
    prompt = [rng.randrange(256) for _ in range(rng.randint(1, 30))]
    if rng.random() < 0.5:
        stem = rng.choice(stems)
        prompt = stem[: rng.randint(1, len(stem))] + prompt
    with_tools = rng.random() < 0.4
    # python_start and python_end are made likely, so that tools do get called
    bias = {START: 4.0, END: 3.5} if with_tools else {}
    params = SamplingParams(
        max_tokens=rng.randint(1, 25),
        n=rng.choice([1, 1, 1, 2, 5]),
        seed=rng.randrange(9),
        stop_token_ids=[rng.randrange(256) for _ in range(20)] if rng.random() < 0.3 else (),
        ignore_eos=rng.random() < 0.2,
        top_logprobs=rng.choice([0, 3]),
        logit_bias=bias,
    )
    return Request(prompt, params, tools if with_tools else None)


def drive(engine: Engine, rng: random.Random, tools: Tools, count: int) -> list[Client]:
    """Adds requests at random times, cancels some, and listens until all is quiet."""
    stems = [[rng.randrange(256) for _ in range(90)] for _ in range(3)]
    clients: dict[int, Client] = {}
    steps = 0
    while len(clients) < count or engine.in_flight:
        while len(clients) < count and rng.random() < 0.4:
            request = random_request(rng, tools, stems)
            clients[engine.add(request)] = Client(request)
        if clients and rng.random() < 0.02:
            engine.cancel(rng.choice([*clients]))
        for event in engine.step():
            clients[event.request_id].hear(event)
        steps += 1
        assert steps < 5000, "the engine does not come to an end"
    for event in engine.step():
        clients[event.request_id].hear(event)
    return [*clients.values()]


@pytest.mark.parametrize("way", ["native", "packed", "module"])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    ("seed", "slots", "chunk"), [(0, 4, 7), (1, 9, 64), (2, 3, 5), (3, 16, 33)]
)
def test_any_interleaving_gives_the_naive_answers(
    seed, slots, chunk, deterministic, way, monkeypatch
):
    if way == "native" and not can_step("float32"):
        pytest.skip("there are no native steps here")
    if way == "packed":
        monkeypatch.setattr(packed, "can_step", lambda weights: False)
    monkeypatch.setattr(scheduler, "DETERMINISTIC_SHARE", 48)
    rng = random.Random(seed)
    subject = Engine(
        MODEL,
        TOKENIZER,
        slots=slots,
        chunk_tokens=chunk,
        deterministic=deterministic,
        packed=way != "module",
        poison=True,
    )
    with Tools() as tools:
        clients = drive(subject, rng, tools, 25)
        reasons = [r for c in clients for r in c.reasons.values()]
        assert len({*reasons}) >= 2
        for client in clients:
            params = client.request.params
            assert sorted(client.reasons) == [*range(params.n)]
            expected, certain = naive_and_certain(
                client.request.prompt, params, client.request.tools
            )
            if deterministic:
                certain = len(expected)
            for choice, reason in client.reasons.items():
                got = client.answers.get(choice, [])
                if reason == "cancelled":
                    assert got[:certain] == expected[: len(got)][:certain]
                else:
                    assert got[:certain] == expected[:certain]
                    assert certain < len(expected) or len(got) == len(expected)
    assert (getattr(subject.runner, "_native", None) is not None) == (way == "native")
    pool = subject._live.pool  # type: ignore[union-attr]
    assert pool.free == slots and all(s.readers == 0 for s in pool.slots)
    subject.close()


def live(**options) -> Engine:
    return Engine(MODEL, TOKENIZER, poison=True, **options)


def run(engine: Engine, *requests: Request) -> list[Client]:
    clients = {engine.add(r): Client(r) for r in requests}
    while engine.in_flight:
        for event in engine.step():
            clients[event.request_id].hear(event)
    return [*clients.values()]


def test_a_cancelled_request_is_gone_within_one_step():
    subject = live(slots=4)
    first = subject.add(Request([1, 2, 3], SamplingParams(max_tokens=100, n=3, ignore_eos=True)))
    for _ in range(4):
        subject.step()
    subject.cancel(first)
    assert subject.in_flight == 0
    events = subject.step()
    assert [(e.choice, e.token, e.finish_reason) for e in events] == [
        (i, -1, "cancelled") for i in range(3)
    ]
    assert subject.step() == [] and subject._live.pool.free == 4  # type: ignore[union-attr]
    subject.cancel(first)
    subject.cancel(12345)
    assert subject.step() == []


def test_a_request_joins_while_another_is_answering():
    subject = live()
    long = Client(Request([1, 2, 3], SamplingParams(max_tokens=30, ignore_eos=True)))
    late = Client(Request([9, 8, 7], SamplingParams(max_tokens=5, ignore_eos=True)))
    clients = {subject.add(long.request): long}
    finished = []
    for step in range(80):
        if step == 3:
            clients[subject.add(late.request)] = late
        for event in subject.step():
            clients[event.request_id].hear(event)
            if event.finish_reason:
                finished.append(event.request_id)
    assert finished == [2, 1]
    assert late.answers[0] == naive([9, 8, 7], late.request.params, None)
    assert long.answers[0] == naive([1, 2, 3], long.request.params, None)


class Counting:
    """Counts the prompt tokens that a runner reads."""

    def __init__(self, engine: Engine) -> None:
        runner = engine._scheduler().runner
        self.read, original = 0, runner.prefill

        def prefill(parts, pieces, ends, total):
            self.read += sum(len(part) for part in parts)
            return original(parts, pieces, ends, total)

        runner.prefill = prefill  # type: ignore[method-assign]


def test_the_next_turn_reads_only_what_is_new():
    subject = live(slots=4)
    count = Counting(subject)
    prompt, params = [*range(50)], SamplingParams(max_tokens=8, ignore_eos=True)
    (first,) = run(subject, Request(prompt, params))
    assert count.read == 50
    longer = prompt + first.answers[0] + [7, 7, 7]
    (second,) = run(subject, Request(longer, params))
    assert count.read == 50 + 3 + 1  # the last token of the answer was never read
    assert second.answers[0] == naive(longer, params, None)


def test_choices_and_shared_prefixes_read_their_prompt_once():
    subject = live(slots=12)
    count = Counting(subject)
    stem, params = [*range(60)], SamplingParams(max_tokens=6, n=4, ignore_eos=True)
    run(subject, Request([*stem, 1, 2], params))
    assert count.read == 62
    (client,) = run(subject, Request([*stem, 3, 4], params))
    assert count.read == 62 + 2
    assert [*client.answers.values()] == [naive([*stem, 3, 4], params, None)] * 4


def test_choices_outnumber_the_slots():
    for length in (3, 70):
        subject = live(slots=2)
        prompt, params = [5] * length, SamplingParams(max_tokens=4, n=7, ignore_eos=True)
        clients = run(subject, *[Request([*prompt, i], params) for i in range(4)])
        for i, client in enumerate(clients):
            assert [client.answers[c] for c in range(7)] == [naive([*prompt, i], params, None)] * 7


@pytest.mark.parametrize("share_from", [48, 512])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "choices"), [(4, 2), (1, 1)])
def test_a_deterministic_row_is_bitwise_the_same_in_any_company(
    heads, choices, threads, share_from, monkeypatch
):
    """Log-probabilities are compared as bits: one bucket, one chunk size, own cuts.

    A model of one head, as a depth of 1 has it, alone in a pass is a product of a single matrix.
    """
    monkeypatch.setattr(scheduler, "DETERMINISTIC_SHARE", share_from)
    before = torch.get_num_threads()
    rng = random.Random(5)
    config = ModelConfig(384, 128, 2, heads, heads, 64, 96, 320, tie_word_embeddings=False)
    model = Transformer(config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=choices, ignore_eos=True)
    prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 200))] for _ in range(9)]
    try:
        torch.set_num_threads(threads)
        subject = Engine(model, TOKENIZER, deterministic=True, chunk_tokens=32)
        together = subject.generate(prompts, params)
        for prompt, expected in zip(prompts, together, strict=True):
            assert subject.generate([prompt], params) == [expected]
    finally:
        torch.set_num_threads(before)


def test_new_weights_end_what_was_remembered():
    model = tiny_model(TOKENIZER.vocab_size, context=160)
    subject = Engine(model, TOKENIZER, poison=True)
    prompt, params = [*range(40)], SamplingParams(max_tokens=6)
    before = subject.generate([prompt], params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    subject.weights_changed()
    after = subject.generate([prompt], params)
    assert after == Engine(model, TOKENIZER).generate([prompt], params) != before


def test_leaving_a_stream_early_frees_its_row():
    subject = live()
    stream = subject.stream([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
    assert next(stream) >= 0
    assert subject.in_flight == 1
    stream.close()
    assert subject.in_flight == 0 and subject.step() == []
    assert len(subject.generate([[1, 2]], SamplingParams(max_tokens=3))[0][0].ids) <= 3


def test_log_probabilities_are_left_out_where_nobody_wants_them():
    subject = live()
    wanted = SamplingParams(max_tokens=4, top_logprobs=2, ignore_eos=True)
    unwanted = SamplingParams(max_tokens=4, logprobs=False, ignore_eos=True)
    ids = [subject.add(Request([1, 2, 3], p)) for p in (wanted, unwanted)]
    seen = {i: [] for i in ids}
    while subject.in_flight:
        for event in subject.step():
            seen[event.request_id].append(event)
    assert [e.token for e in seen[ids[0]]] == [e.token for e in seen[ids[1]]]
    assert all(e.logprob < 0 and len(e.top_logprobs) == 2 for e in seen[ids[0]])
    assert all(e.top_logprobs[0] == (e.token, e.logprob) for e in seen[ids[0]])
    assert all(e.logprob == 0 and e.top_logprobs == [] for e in seen[ids[1]])


def test_the_engine_tells_what_a_server_asks():
    subject = live(slots=4)
    assert subject.slots == 4 and subject.cached_tokens(1) is None
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    first = subject.add(Request([*range(60)], params))
    while subject.in_flight:
        subject.step()
    second = subject.add(Request([*range(60), 9], params))
    subject.step()
    assert subject.cached_tokens(first) == 0 and subject.cached_tokens(second) == 60
    states = subject.runner.hidden_of(torch.tensor([[1, 2, 3]]))
    logits = subject.runner.head(states[0])
    torch.testing.assert_close(logits, MODEL(torch.tensor([[1, 2, 3]]))[0], rtol=1e-4, atol=1e-4)
