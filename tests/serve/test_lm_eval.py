"""lm-eval's own local-completions client with our remote tokenizer, against a live server."""

from __future__ import annotations

import warnings

import pytest

from fledge.engine import Engine, SamplingParams
from fledge.serve.server import LiveServer, make_context
from fledge.serve.settings import Settings
from tests.helpers_model import tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports deprecate much
    pytest.importorskip("lm_eval", reason="needs pip install lm-eval[api]")
    pytest.importorskip("tenacity", reason="needs pip install lm-eval[api]")
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.openai_completions import (  # pyright: ignore[reportMissingImports]
        LocalCompletionsAPI,
    )

pytestmark = pytest.mark.filterwarnings("default")
CONTEXT = 128


@pytest.fixture(scope="module")
def pair(toy, tmp_path_factory):
    """(lm-eval's model over HTTP, our engine in process)"""
    folder = tmp_path_factory.mktemp("lm_eval")
    tiny_model(toy.vocab_size, context=CONTEXT).save(folder)
    toy.save(folder)
    context, servers = make_context([f"tiny={folder}"], Settings())
    live = LiveServer(context)
    servers.append(live.server)
    with live:
        model = LocalCompletionsAPI(
            base_url=f"{live.url}/v1/completions", model="tiny", max_length=CONTEXT,
            batch_size=3, num_concurrent=1,
        )  # fmt: skip
        yield model, Engine.from_folder(folder)


def asked(kind: str, arguments: list) -> list:
    return [
        Instance(kind, {}, pair_of, i, metadata=("t", i, 1)) for i, pair_of in enumerate(arguments)
    ]


def test_loglikelihood_equals_scoring_in_process(pair, toy):
    model, engine = pair
    assert model.tokenizer_backend == "remote"
    pairs = [
        ("3 plus 4 is", " 7"),
        ("3 plus 4 is", " 8. The answer is 8."),
        ("The answer", " is"),
        ("11 plus 12 is 23. The answer", " \u00e9\U0001f600"),
        ("", "12 plus 1 is 13"),
    ]
    # what the model itself would say is greedy, and must be found to be
    prompt = toy.encode("5 plus 5 is")
    ((greedy,),) = engine.generate([prompt], SamplingParams(max_tokens=3))
    said = toy.decode(greedy.ids, skip_special=True)
    found = model.loglikelihood(asked("loglikelihood", pairs))
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        # an empty context is the token that begins a text, our bos
        start = toy.encode(context) if context else [model.prefix_token_id]
        whole = toy.encode(context + continuation)
        row = whole if context else start + whole
        (scores,) = engine.score([row])
        expected = sum(scores[len(start) :])
        assert logprob == pytest.approx(expected, abs=1e-5 * len(row)), (context, continuation)
        tails = engine.next_logprobs(
            [row[:i] for i in range(len(start), len(row))], list(range(toy.vocab_size))
        )
        best = [max(range(len(t)), key=t.__getitem__) for t in tails]
        assert is_greedy == (best == row[len(start) :])
    if toy.encode("5 plus 5 is" + said) == prompt + greedy.ids:
        ((_, is_greedy),) = model.loglikelihood(asked("loglikelihood", [("5 plus 5 is", said)]))
        assert is_greedy


def test_generate_until(pair, toy):
    model, engine = pair
    arguments = {"until": [". "], "max_gen_toks": 20, "temperature": 0.0, "do_sample": False}
    texts = ["3 plus 4 is", "The answer", "7 plus 7"]
    found = model.generate_until(asked("generate_until", [(text, arguments) for text in texts]))
    for text, said in zip(texts, found, strict=True):
        ((completion,),) = engine.generate([toy.encode(text)], SamplingParams(max_tokens=20))
        expected = toy.decode(completion.ids, skip_special=True).split(". ")[0]
        assert said == expected


def test_rolling(pair, toy):
    model, engine = pair
    text = " ".join(f"{i} plus {i} is {2 * i}." for i in range(6))
    (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,)]))
    (scores,) = engine.score([[model.prefix_token_id, *toy.encode(text)]])
    assert found == pytest.approx(sum(scores), abs=1e-3)
