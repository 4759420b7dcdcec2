"""The likelihood primitive: equal to the plain computation under any batching; sabotage shows."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers_model import tiny_model, tiny_tokenizer
from tests.model.test_extras import ALL, speedrun
from torch import Tensor, nn

from fledge.engine import Engine
from fledge.errors import UserError
from fledge.evals import scoring, tries
from fledge.evals.core import BY_NAME
from fledge.evals.core_exam import examine_core_task
from fledge.evals.scoring import Likelihood, Request, loglikelihood, loglikelihood_one_by_one
from fledge.stats import wilson_interval

TOKENIZER = tiny_tokenizer()
ENGINE = Engine(tiny_model(TOKENIZER.vocab_size), TOKENIZER)


def some_requests(seed: int = 0, n: int = 40) -> list[Request]:
    """Questions with 1 to 5 choices, some with a common few-shot beginning, one request twice."""
    draw = random.Random(seed)
    ids = lambda k: [draw.randrange(300) for _ in range(k)]  # noqa: E731
    shots, requests = ids(30), []
    for i in range(n):
        before = (shots if i % 3 == 0 else []) + ids(draw.randrange(1, 60))
        for _ in range(draw.randrange(1, 6)):
            requests.append(Request(before + ids(draw.randrange(1, 9)), len(before)))
    return [*requests, requests[0]]


REQUESTS = some_requests()
PLAIN = loglikelihood_one_by_one(ENGINE, REQUESTS)


def furthest(a: list[Likelihood], b: list[Likelihood]) -> float:
    """The largest difference of two log-probabilities of the same token."""
    pairs = zip(a, b, strict=True)
    return max(abs(x - y) for p, q in pairs for x, y in zip(p.logprobs, q.logprobs, strict=True))


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 64, None])
def test_any_batching_gives_the_plain_numbers(batch_size: int | None, share_prefixes: bool) -> None:
    got = loglikelihood(ENGINE, REQUESTS, batch_size=batch_size, share_prefixes=share_prefixes)
    assert furthest(got, PLAIN) <= 1e-5
    assert [x.greedy for x in got] == [x.greedy for x in PLAIN]


def test_a_folded_row_of_a_network_with_every_extra_gives_the_plain_numbers() -> None:
    """Windows, smear and pairs go back along a path, not to the node stored before."""
    sizes = {"vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 128}
    engine = Engine(speedrun(**(ALL | sizes)), TOKENIZER)
    plain = loglikelihood_one_by_one(engine, REQUESTS)
    got = loglikelihood(engine, REQUESTS)
    assert furthest(got, plain) <= 1e-5


def test_deterministic_is_bitwise_the_same_under_any_batch_size() -> None:
    runs = [
        loglikelihood(ENGINE, REQUESTS, batch_size=size, deterministic=True) for size in (1, 7, 64)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_order_and_company_do_not_matter() -> None:
    order = list(range(len(REQUESTS)))
    random.Random(3).shuffle(order)
    got = loglikelihood(ENGINE, [REQUESTS[i] for i in order])
    back: list[Any] = [None] * len(order)
    for place, i in enumerate(order):
        back[i] = got[place]
    assert furthest(back, PLAIN) <= 1e-5
    alone = [loglikelihood(ENGINE, [request])[0] for request in REQUESTS[:20]]
    assert furthest(alone, PLAIN[:20]) <= 1e-5


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=25))
def test_a_folded_row_holds_every_sequence_and_sees_only_its_own_past(
    sequences: list[list[int]],
) -> None:
    rows = tries.fold(sequences)
    assert sorted(m for row in rows for m in row.members) == list(range(len(sequences)))
    for row in rows:
        seen = row.mask(len(row) + 2)
        assert seen.diagonal().all()  # padding too: a softmax over nothing is not a number
        for member, path in zip(row.members, row.paths, strict=True):
            assert [row.ids[i] for i in path] == sequences[member]
            assert [row.depth[i] for i in path] == list(range(len(path)))
            for depth, node in enumerate(path):
                assert set(np.flatnonzero(seen[node])) == set(path[: depth + 1])
    nodes = sum(len(row) for row in rows)
    assert nodes <= sum(len(s) for s in sequences)


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    plain = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert tries.common_prefix(a, b) == (min(len(a), len(b)) if plain is None else plain)


@pytest.mark.parametrize("window", [None, 3])
def test_a_tree_attends_to_ancestors_only_also_in_a_window(window: int | None) -> None:
    (row,) = tries.fold([[1, 2, 3, 4, 5], [1, 2, 3, 9, 8, 7]])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, len(row), 8, generator=generator) for heads in (4, 2, 2))
    view = scoring.TreeView([row], len(row), torch.device("cpu"))
    got = view.attend(0, q, k, v, window=window, scale=0.5)[0]  # [N, H, K]
    for path in row.paths:
        for depth, node in enumerate(path):
            past = path[max(0, depth + 1 - window) if window else 0 : depth + 1]
            for head in range(4):
                scores = 0.5 * k[0, head // 2, past] @ q[0, head, node]
                plain = scores.softmax(-1) @ v[0, head // 2, past]
                torch.testing.assert_close(got[node, head], plain, atol=1e-6, rtol=1e-5)


def test_the_token_before_a_node_is_its_parent() -> None:
    (row,) = tries.fold([[1, 2, 3, 4, 5], [1, 2, 3, 9, 8, 7]])
    view = scoring.TreeView([row], len(row) + 2, torch.device("cpu"))  # two of padding
    ids = torch.tensor([[*row.ids, 0, 0]])
    previous = view.previous_ids(ids)[0]
    for path in row.paths:
        assert [int(previous[node]) for node in path] == [0, *(row.ids[n] for n in path[:-1])]


def test_choices_are_read_once() -> None:
    question = list(range(1, 41))
    requests = [Request([*question, 50 + i, 60], 40) for i in range(4)]
    (row,) = tries.fold([request.ids[:-1] for request in requests])
    assert len(row) == 40 + 4  # the question once, then one token of each choice


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([1, 2], 0), "nothing to score"),
        (Request([1, 2], 2), "nothing to score"),
        (Request([1] * 130, 3), "130 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(request_: Request, words: str) -> None:
    with pytest.raises(UserError, match=words):
        loglikelihood(ENGINE, [request_])


# -- models whose answers are known ----------------------------------------------------------------


class CountsOn(nn.Module):
    """After token t it expects t + step: right about texts that count, and only about them."""

    def __init__(self, vocab_size: int, step: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=256)
        self.register_buffer("cos", torch.zeros(1))
        self.lm_head = nn.Linear(vocab_size, vocab_size, bias=False)
        targets = (torch.arange(vocab_size) + step) % vocab_size
        with torch.no_grad():
            self.lm_head.weight.zero_()
            self.lm_head.weight[targets, torch.arange(vocab_size)] = 20.0

    def hidden(self, ids: Tensor, view: object = None) -> Tensor:
        return nn.functional.one_hot(ids, self.lm_head.in_features).float()


class Alphabet:
    """Words c0 c1 ... become tokens; bos is 0."""

    bos_id = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.replace("Answer:", "").split()]


def counting_engine(step: int = 1) -> Any:
    return SimpleNamespace(model=CountsOn(140, step), tokenizer=Alphabet())


def counting_questions(n: int, *, shuffled: bool = False) -> list[dict[str, Any]]:
    """The choice that goes on counting is right, others jump. With `shuffled` gold is chance."""
    draw = random.Random(11)
    rows = []
    for _ in range(n):
        first, gold = draw.randrange(1, 90), draw.randrange(4)
        choices = [f"{first + 30 + j} {first + 20 + j}" for j in range(4)]
        choices[gold] = f"{first + 3} {first + 4}"
        if shuffled:
            gold = draw.randrange(4)
        rows.append({"query": f"{first} {first + 1} {first + 2}", "choices": choices, "gold": gold})
    return rows


def test_a_model_that_knows_the_answers_scores_one() -> None:
    for name in ("arc_easy", "copa"):
        result = examine_core_task(counting_engine(), BY_NAME[name], counting_questions(60))
        assert result.value == 1.0
    rows = [{"context": f"{i} {i + 1}", "continuation": f"{i + 2} {i + 3}"} for i in range(60)]
    result = examine_core_task(counting_engine(), BY_NAME["lambada_openai"], rows)
    assert result.value == 1.0 and all(r["output"] == "greedy" for r in result.records)


def test_shuffled_answers_score_chance() -> None:
    rows = counting_questions(800, shuffled=True)
    result = examine_core_task(counting_engine(), BY_NAME["copa"], rows)
    low, high = wilson_interval(round(result.value * 800), 800, z=3.3)
    assert low <= 0.25 <= high and result.details["guessing"] == 0.25


class OneTooEarly:
    """A runner that gives the states of the token before."""

    def __init__(self, real: Any) -> None:
        self.model, self.head, self._real = real.model, real.head, real

    def states_at(self, ids: Tensor, view: Any, places: Tensor) -> Tensor:
        return self._real.states_at(ids, view, (places - 1).clamp(min=0))


def test_looking_one_token_too_far_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would fail if the scorer read the logits one position off."""
    real: Callable[..., Any] = scoring._runner
    monkeypatch.setattr(scoring, "_runner", lambda engine: OneTooEarly(real(engine)))
    got = loglikelihood(ENGINE, REQUESTS)
    assert furthest(got, PLAIN) > 0.1
    rows = [{"context": f"{i} {i + 1}", "continuation": f"{i + 2} {i + 3}"} for i in range(60)]
    assert examine_core_task(counting_engine(), BY_NAME["lambada_openai"], rows).value == 0.0


# -- ranks and interruptions -----------------------------------------------------------------------


def real_rows(n: int) -> list[dict[str, Any]]:
    draw = random.Random(2)
    words = ("plus", "answer", "The", "is", "7", "12")

    def some(k: int) -> str:
        return " ".join(draw.choice(words) for _ in range(k))

    return [{"query": some(5), "choices": [some(2) for _ in range(4)], "gold": 0} for _ in range(n)]


def test_an_interrupted_exam_goes_on_and_ends_the_same(tmp_path: Any) -> None:
    task, rows, partial = BY_NAME["copa"], real_rows(700), tmp_path / "copa.partial.jsonl"
    whole = examine_core_task(ENGINE, task, rows).records
    scored: list[int] = []

    def stop(done: int) -> None:
        scored.append(done)
        if len(scored) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine_core_task(ENGINE, task, rows, partial=partial, key="k", after_chunk=stop)
    with open(partial, "a") as file:
        file.write('{"index": 3, "record": {"id": "core/co')  # a line that a crash cut short
    calls: list[int] = []
    real = scoring._score
    try:
        scoring._score = lambda *a: calls.append(1) or real(*a)  # type: ignore[assignment]
        again = examine_core_task(ENGINE, task, rows, partial=partial, key="k")
        assert again.records == whole
        first = len(calls)
        other = examine_core_task(ENGINE, task, rows, partial=partial, key="another model")
    finally:
        scoring._score = real
    assert other.records == whole
    assert 0 < first < len(calls) - first  # the resumed one had only the rest to do
