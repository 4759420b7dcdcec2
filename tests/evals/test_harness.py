"""The lm-eval adapter beside lm-eval's own HFLM on the same folder: ids, log-probabilities, scores.

Needs lm-eval (the `harness` extra) and the data folder; lm-eval's tasks are its own formats over
local files, since it has no network here. FLEDGE_PARITY_MODEL names a further model folder or run
(the quickstart's, say) to repeat the comparison on.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip: fledge[harness])")

from lm_eval.models.huggingface import HFLM  # noqa: E402  # pyright: ignore[reportMissingImports]
from tests.helpers_lm_eval import local_tasks  # noqa: E402
from tests.helpers_model import tiny_model  # noqa: E402

from fledge.data.overlap import read_texts  # noqa: E402
from fledge.evals.harness import FledgeLM  # noqa: E402
from fledge.run import find_checkpoint  # noqa: E402
from fledge.tokenizer import Tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # lm-eval's and its libraries' own
    pytest.mark.timeout(3000),
    pytest.mark.slow,
]
EXAMPLES = 200


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> list[dict[str, Any]]:
    if not (data_root / "core").is_dir():
        pytest.skip("needs core/eval_data")
    folder = tmp_path_factory.mktemp("lm_eval")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    return local_tasks(data_root, folder, EXAMPLES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    """A random two-layer Qwen3 whose context cuts some prompts, with a tokenizer of real text."""
    val = data_root / "pretrain" / "val.jsonl.zst"
    if not val.is_file():
        pytest.skip(f"needs {val}")
    texts = itertools.islice(read_texts(val), 60)
    tokenizer = Tokenizer.train(texts, vocab_size=4096, pattern="qwen2")
    path = tmp_path_factory.mktemp("model")
    tiny_model(tokenizer.vocab_size, context=512).save(path)
    tokenizer.save(path)
    return path


def record_tokens(lm: Any) -> list[Any]:
    """Collects the (context ids, continuation ids) that reach the model."""
    seen: list[Any] = []
    real = lm._loglikelihood_tokens

    def recording(requests: Any, **kwargs: Any) -> Any:
        seen.extend((tuple(context), tuple(continuation)) for _, context, continuation in requests)
        return real(requests, **kwargs)

    lm._loglikelihood_tokens = recording
    return seen


def evaluate(lm: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=lm, tasks=[dict(task) for task in tasks], log_samples=True, bootstrap_iters=0
    )


def compare(folder: Path, tasks: list[dict[str, Any]]) -> None:
    """Asserts that both models answer alike, for every one of the tasks."""
    theirs = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    ours = FledgeLM(folder)
    seen_theirs, seen_ours = record_tokens(theirs), record_tokens(ours)
    expected, got = evaluate(theirs, tasks), evaluate(ours, tasks)
    assert seen_ours == seen_theirs and len(seen_ours) > 8 * EXAMPLES
    furthest, ties = 0.0, 0
    for task in tasks:
        name = task["task"]
        samples = list(zip(expected["samples"][name], got["samples"][name], strict=True))
        assert len(samples) >= EXAMPLES
        for theirs_sample, ours_sample in samples:
            assert theirs_sample["doc_hash"] == ours_sample["doc_hash"]
            pairs = list(zip(responses(theirs_sample), responses(ours_sample), strict=True))
            for (logprob, greedy), (our_logprob, our_greedy) in pairs:
                # sums of many float32 numbers, theirs summed in float32 too: 1e-6 of a large one
                allowed = max(1e-4, 1e-6 * abs(logprob))
                assert abs(logprob - our_logprob) < allowed, (name, logprob, our_logprob)
                furthest = max(furthest, abs(logprob - our_logprob) / max(1.0, abs(logprob)))
                assert greedy is our_greedy, name
            ordered = sorted((logprob for (logprob, _), _ in pairs), reverse=True)
            ties += len(ordered) > 1 and ordered[0] - ordered[1] < 1e-3
        for metric in ("acc,none", "acc_norm,none", "perplexity,none"):
            if metric in expected["results"][name]:
                near = got["results"][name][metric]
                assert near == pytest.approx(expected["results"][name][metric], rel=1e-5), name
    print(f"{folder}: largest difference, relative above 1: {furthest:.1e}; ties {ties}")


def responses(sample: dict[str, Any]) -> list[tuple[float, bool]]:
    """(log-probability, is_greedy) of a sample's requests."""
    found = sample["filtered_resps"]
    found = found if isinstance(found[0], list | tuple) else [found]
    return [(float(logprob), str(greedy) == "True") for logprob, greedy in found]


def test_a_random_model_answers_as_in_transformers(
    folder: Path, tasks: list[dict[str, Any]]
) -> None:
    compare(folder, tasks)


def test_a_trained_model_answers_as_in_transformers(tasks: list[dict[str, Any]]) -> None:
    named = os.environ.get("FLEDGE_PARITY_MODEL")
    if not named:
        pytest.skip("FLEDGE_PARITY_MODEL names no run or model folder")
    compare(find_checkpoint(Path(named))[0], tasks)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_empty_contexts_and_trailing_blanks(folder: Path) -> None:
    theirs = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    ours = FledgeLM(folder)
    seen_theirs, seen_ours = record_tokens(theirs), record_tokens(ours)
    asked = [
        ("", "The answer"),
        ("3 plus 4 is ", "7."),
        ("a  ", " b"),
        ("The answer is 5" * 99, "."),
    ]
    for lm in (theirs, ours):
        lm.loglikelihood([SimpleNamespace(args=pair) for pair in asked], disable_tqdm=True)
    assert seen_theirs == seen_ours


def test_rolling_likelihood_is_theirs(folder: Path) -> None:
    texts = ["3 plus 4 is 7.", "12 plus 15 is 27. The answer is 27. " * 120]
    theirs = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    expected = theirs.loglikelihood_rolling([request(t) for t in texts], disable_tqdm=True)
    got = FledgeLM(folder).loglikelihood_rolling([request(t) for t in texts])
    assert got == pytest.approx(expected, rel=1e-5)


def test_greedy_generation_is_theirs_up_to_the_stop(folder: Path) -> None:
    options = {"until": ["7", "an"], "max_gen_toks": 40, "do_sample": False}
    asked = [request(f"{i} plus 4 is", dict(options)) for i in range(12)]
    theirs = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert FledgeLM(folder).generate_until(asked) == expected


def test_conversations_are_rendered_and_encoded_as_by_transformers(folder: Path) -> None:
    history = [{"role": "user", "content": "What is 3 plus 4?"}]
    theirs = HFLM(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu")
    ours = FledgeLM(folder)
    text = ours.apply_chat_template(history)
    assert text == theirs.apply_chat_template(history)
    assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_unknown_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not know dtyp"):
        FledgeLM(folder, dtyp="float32")
