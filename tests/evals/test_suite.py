"""Exams of a folder by the command line: stored, resumed, compared; tasks of one's own; bpb."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers_mini import assert_three_parts
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge import cli
from fledge.data.task_files import TaskData
from fledge.engine import Engine
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.evals import bpb, scoring, suite
from fledge.evals.compare import compare
from fledge.evals.core import CORE_TASKS
from fledge.evals.examine import Sampling, score_task, task_result
from fledge.evals.records import Store
from fledge.evals.suite import Options, chatcore, take
from fledge.evals.tasks.registry import find_tasks
from fledge.evals.tasks.user import user_task
from fledge.stats import pass_at_k, resampled_differences

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "a"
    path.mkdir()
    tiny_model(TOKENIZER.vocab_size).save(path)
    TOKENIZER.save(path)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "b"
    path.mkdir()
    tiny_model(TOKENIZER.vocab_size, seed=8).save(path)
    TOKENIZER.save(path)
    return path


def rows_of(kind: str, n: int = 12) -> list[dict[str, Any]]:
    draw = random.Random(1)
    words = ("plus", "answer", "The", "is", "7", "12")

    def some(k: int) -> str:
        return " ".join(draw.choice(words) for _ in range(k))

    if kind == "multiple_choice":
        return [{"query": some(4), "choices": [some(2), some(3)], "gold": i % 2} for i in range(n)]
    if kind == "schema":
        return [
            {"context_options": [some(3), some(3)], "continuation": some(2), "gold": i % 2}
            for i in range(n)
        ]
    return [{"context": some(4), "continuation": some(1), "category": "c"} for _ in range(n)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CORE bundle in miniature, in the layout of nanochat's."""
    root = tmp_path_factory.mktemp("data")
    for task in CORE_TASKS:
        path = root / "eval_bundle" / "eval_data" / f"{task.file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task.kind)))
    return root


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_core_by_the_command_line(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("eval", model, "--tasks", "core", "--data-root", data, "--out", tmp_path / "o")
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    table = json.loads(out)
    scores = table["stages"]["model"]["scores"]
    assert {"core_v1", "core_v2"} < set(scores) and len(scores) == 24
    for score in scores.values():
        assert {"value", "low", "high", "n", "chance", "unit"} <= set(score)
    assert scores["core_v1"]["low"] < scores["core_v1"]["value"] < scores["core_v1"]["high"]
    centred = [scores[f"core/{t.name}"]["centred_v2"] for t in CORE_TASKS]
    assert scores["core_v2"]["value"] == pytest.approx(sum(centred) / 22)
    code, text, _ = call(capsys, *words)
    assert "core_v1" in text and "core_v2" in text and "CORE by task" in text
    assert "centred v1 | centred v2" in text
    kept = json.loads((tmp_path / "o" / "core.json").read_text())
    assert kept["profile"] == "nanochat" and kept["missing"] == [] and len(kept["tasks"]) == 22


def test_a_missing_task_is_told_and_the_mean_is_named_partial(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    less = shutil.copytree(data, tmp_path / "less")
    (less / "eval_bundle/eval_data/reading_comprehension/boolq.jsonl").unlink()
    words = ("eval", model, "--tasks", "core", "--data-root", less, "--no-store")
    _, out, _ = call(capsys, *words, "--json")
    table = json.loads(out)
    scores = table["stages"]["model"]["scores"]
    assert "core_v1" not in scores and "missing: boolq" in scores["core_v1_partial"]["note"]
    assert any("core/boolq is left out" in note for note in table["notes"])
    _, text, _ = call(capsys, *words)
    assert "core/boolq is left out" in text and "21 of 22 tasks" in text


def test_what_was_taken_before_is_read_back(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store = Engine.from_folder(model), Store(tmp_path / "s", "model-1")
    (task,), _ = find_tasks(data, ["core/copa"])
    first = take(engine, task, Options(), store=store)
    assert not list((tmp_path / "s").rglob("*.partial.jsonl"))
    monkeypatch.setattr(scoring, "_score", None)  # nothing may be computed now
    again = take(engine, task, Options(), store=store)
    assert (again.value, again.low, again.high, again.n, again.stderr, again.note) == (
        first.value, first.low, first.high, first.n, first.stderr, first.note,
    )  # fmt: skip
    assert again.records == first.records and again.details == first.details
    for changed in (Options(profile="dclm"), Options(max_examples=5)):
        with pytest.raises(TypeError):
            take(engine, task, changed, store=store)
    with pytest.raises(TypeError):
        take(engine, task, Options(), store=Store(tmp_path / "s", "model-2"))


def test_a_record_holds_what_a_score_can_be_recomputed_from(model: Path, data: Path) -> None:
    (task,), _ = find_tasks(data, ["core/arc_easy"])
    result = take(Engine.from_folder(model), task, Options())
    for record in result.records:
        assert {"id", "prompt_hash", "ids", "logprobs", "output", "score"} <= set(record)
        means = [sum(logprobs) / len(logprobs) for logprobs in record["logprobs"]]
        assert record["picked"] == means.index(max(means))
        assert [len(i) for i in record["ids"]] == [len(x) for x in record["logprobs"]]
    assert result.value == sum(r["score"] for r in result.records) / result.n


# -- two models ------------------------------------------------------------------------------------


def test_two_models_are_compared_on_shared_examples(
    model: Path, other: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("eval", model, "--tasks", "core", "--data-root", data, "--no-store")
    _, out, _ = call(capsys, *words, "--compare", other, "--json")
    rows = json.loads(out)["comparison"]["tasks"]
    assert len(rows) == 24 and rows["core/copa"]["n"] == 12
    for row in rows.values():
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
    _, text, _ = call(capsys, *words, "--compare", model)
    assert "+0.0 (+0.0 to +0.0)" in text and "Paired bootstrap" in text


def record(i: int, score: float) -> dict[str, Any]:
    return {"id": f"t/{i}", "score": score}


def test_pairing_sees_what_two_intervals_hide() -> None:
    draw = random.Random(0)
    hard = [float(draw.random() < 0.5) for _ in range(400)]
    better = [1.0 if s == 0 and i % 10 == 0 else s for i, s in enumerate(hard)]
    rows = compare(
        {"t": [record(i, s) for i, s in enumerate(hard)]},
        {"t": [record(i, s) for i, s in enumerate(better)][::-1]},  # the order does not matter
        {"t": 0.5},
    )
    row = rows["t"]
    assert row["significant"] and row["low"] > 0
    assert row["high"] - row["low"] < 0.05  # unpaired it would be about 0.14
    same = compare({"t": [record(1, 1.0)]}, {"t": [record(2, 1.0)]}, {})
    assert same == {}


def test_the_multinomial_bootstrap_is_the_bootstrap() -> None:
    values = np.array([1.0] * 30 + [0.0] * 60 + [-1.0] * 10)
    fast = resampled_differences([0.0] * 100, values.tolist(), resamples=20_000)
    draw = np.random.default_rng(1)
    slow = draw.choice(values, (20_000, 100)).mean(axis=1)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.003)
    assert np.percentile(fast, [2.5, 97.5]) == pytest.approx(
        np.percentile(slow, [2.5, 97.5]), abs=0.011
    )


def test_the_interval_of_a_difference_covers_the_truth() -> None:
    random_ = np.random.default_rng(5)
    inside = 0
    for trial in range(200):
        a, b = random_.random(150) < 0.4, random_.random(150) < 0.5
        rows = compare(
            {"t": [record(i, float(x)) for i, x in enumerate(a)]},
            {"t": [record(i, float(x)) for i, x in enumerate(b)]},
            {},
            resamples=1000,
            seed=trial,
        )
        inside += rows["t"]["low"] <= 0.1 <= rows["t"]["high"]
    assert 180 <= inside <= 199  # 95 % of 200, within its own noise


# -- composites ------------------------------------------------------------------------------------


def score(value: float, chance: float) -> dict[str, Any]:
    return {"value": value, "chance": chance, "n": 100, "stderr": 0.05}


def test_chatcore_is_the_mean_over_its_own_list() -> None:
    five = {
        "arc_easy": score(0.4, 0.2502), "arc_challenge": score(0.25, 0.2502),
        "mmlu": score(0.3, 0.25), "gsm8k": score(0.1, 0.0), "humaneval": score(0.05, 0.0),
        "chat": score(0.9, 0.0),
    }  # fmt: skip
    table = chatcore(five)
    assert table is not None
    centred = [(0.4 - 0.25) / 0.75, 0.0, (0.3 - 0.25) / 0.75, 0.1, 0.05]
    assert table["value"] == pytest.approx(sum(centred) / 5)
    assert set(table["tasks"]) == {*suite.CHATCORE} and table["missing"] == []
    assert table["low"] < table["value"] < table["high"]
    less = chatcore({k: v for k, v in five.items() if k != "humaneval"})
    assert less is not None and less["missing"] == ["humaneval"]
    assert "mean of 4 of 5 tasks; missing: humaneval" in less["note"]
    world = chatcore({"world_facts": score(0.6, 0.0), "chat": score(1.0, 0.0)})
    assert world is not None and set(world["tasks"]) == {"world_facts"}
    assert chatcore({"chat": score(1.0, 0.0)}) is None


def test_letters_leave_a_histogram(model: Path) -> None:
    path = model.parent / "letters.jsonl"
    rows = [{"question": f"Q{i}?", "choices": ["a", "b", "c"], "gold": i % 3} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = take(Engine.from_folder(model), user_task(path), Options())
    assert sum(result.details["predicted"].values()) == 9
    assert result.details["answers"] == {"A": 3, "B": 3, "C": 3}


# -- several replies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (10, 0, 4), (10, 10, 1), (4, 1, 4)]
)
def test_pass_at_k_counts_the_draws(n: int, c: int, k: int) -> None:
    from itertools import combinations

    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_several_replies_give_pass_at_k(model: Path) -> None:
    class Coin:
        name, chance, max_new_tokens = "coin", 0.0, 4
        kind: Any = "generate"

        def items(self) -> list[dict[str, Any]]:
            return [
                {"id": str(i), "messages": [{"role": "user", "content": f"{i}"}], "answer": ""}
                for i in range(20)
            ]

        def grade(self, item: dict[str, Any], text: str) -> bool:
            return len(text) % 2 == 0

    engine = Engine.from_folder(model)
    with Tools() as tools:
        result = score_task(engine, Coin(), tools, sampling=Sampling(5, 1.0, 3))
    passed = [record["passed"] for record in result.records]
    assert all(len(p) == 5 for p in passed) and result.details["pass_at_k"].keys() == {
        "1",
        "2",
        "5",
    }
    assert result.value == pytest.approx(result.details["pass_at_k"]["1"])
    assert result.details["pass_at_k"]["5"] == sum(map(any, passed)) / 20
    assert result.low < result.value < result.high


def test_samples_need_a_temperature(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "eval", model, "--samples", 4)
    assert code == 1 and "add --temperature" in err


# -- tasks of one's own ----------------------------------------------------------------------------


def own(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_ones_own_is_a_task(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own(
        tmp_path, {"question": "2 plus 3?", "answer": 5}, {"question": "Who?", "answer": "I"}
    )
    code, out, _ = call(capsys, "eval", model, "--tasks", path, "--no-store", "--json")
    assert code == 0
    assert json.loads(out)["stages"]["model"]["scores"]["mine"]["n"] == 2
    task = user_task(path)
    number, word = task.items()
    assert task.grade(number, "It is 4, no, 5.") and not task.grade(number, "5 or 6")
    assert task.grade(word, "i am") and not task.grade(word, "in")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no rows"),
        ([{"question": "?"}], "lacks 'answer'"),
        ([{"answer": "x"}], "neither 'question'"),
        ([{"question": "?", "answer": ""}], "neither text nor a number"),
        ([{"question": "?", "answer": None}], "neither text nor a number"),
        ([{"question": "?", "choices": ["a", "b"]}], "lacks 'gold'"),
        ([{"question": "?", "choices": ["a", "b"], "gold": 2}], "not an index"),
        ([{"question": "?", "choices": ["a"], "gold": 0}], "has 1 entries"),
        ([{"question": "?", "answer": "x", "id": 1}] * 2, "also that of row 1"),
        ([{"question": "x" * 10_000_000, "answer": "x"}], "characters"),
        ([{"messages": [{"role": "assistant", "content": "hi"}], "answer": "x"}], "does not end"),
        ([[1]], "not an object"),
    ],
)
def test_a_broken_file_is_refused_in_three_parts(
    model: Path, tmp_path: Path, rows: list[Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "eval", model, "--tasks", own(tmp_path, *rows), "--no-store")
    assert code == 1 and words in err
    assert_three_parts(err)


def test_real_task_files_are_checked_too(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(UserError, match="row 1 of gsm8k/test"):
        find_tasks(TaskData(tmp_path, use_hub=False), ["gsm8k"])


def test_a_misspelt_task_of_core(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "eval", model, "--tasks", "core/copaa")
    assert code == 1 and "did you mean core/copa?" in err


def test_a_question_longer_than_the_context_counts_as_wrong_and_is_counted() -> None:
    engine = Engine(tiny_model(TOKENIZER.vocab_size), TOKENIZER)

    class Long:
        name, chance, max_new_tokens = "long", 0.25, 1
        kind: Any = "choice"

        def items(self) -> list[dict[str, Any]]:
            asked = ["short?", "x" * 600]
            return [
                {"id": t[:3], "messages": [{"role": "user", "content": t}], "answer": "A",
                 "letters": ["A"]} for t in asked
            ]  # fmt: skip

        def grade(self, item: dict[str, Any], text: str) -> bool:
            return text == item["answer"]

    with Tools() as tools:
        result = score_task(engine, Long(), tools)
    assert [r["correct"] for r in result.records] == [True, False]
    assert result.details["truncated"] == 1 and result.n == 2
    assert result.note is not None and "1 prompts longer than 128 tokens" in result.note


def test_no_examples_have_no_score_to_divide_by() -> None:
    class Empty:
        name, chance, max_new_tokens = "empty", 0.25, 1
        kind: Any = "choice"

        def items(self) -> list[dict[str, Any]]:
            return []

        def grade(self, item: dict[str, Any], text: str) -> bool:
            return False

    result = task_result(Empty(), [], 128, seconds=0.0)
    assert (result.n, result.value, result.low, result.high) == (0, 0.0, 0.0, 1.0)


# -- bits per byte ---------------------------------------------------------------------------------


def test_bits_per_byte_of_whole_documents_score_every_byte_once() -> None:
    engine = Engine(tiny_model(TOKENIZER.vocab_size, context=48), TOKENIZER)
    texts = ["3 plus 4 is 7. " * 30, "", "\u00e9\u4e16\u754c", "7"]
    got = bpb.full_documents(engine, texts)
    assert got.bytes == sum(len(text.encode()) for text in texts)
    nats = 0.0
    for text in texts:  # the same windows, written out
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
        done = 1
        while done < len(ids):
            begin = max(0, done - 24) if done > 1 else 0
            window = ids[begin : begin + 48]
            with torch.no_grad():
                logprobs = engine.model(torch.tensor([window]))[0].double().log_softmax(-1)
            for place in range(done - begin, len(window)):
                nats -= float(logprobs[place - 1, window[place]])
            done = begin + len(window)
    assert got.bpb == pytest.approx(nats / (math.log(2) * got.bytes), rel=1e-6)


def test_every_token_has_its_own_bytes_and_specials_none() -> None:
    counts = bpb.token_byte_counts(TOKENIZER)
    ordinary = [i for i in range(TOKENIZER.vocab_size) if counts[i]]
    assert len(ordinary) == TOKENIZER.num_ordinary_tokens
    assert all(counts[i] == 0 for i in TOKENIZER.special_tokens.values())
    for i in range(256):  # single bytes, most of them no UTF-8 by themselves
        assert counts[TOKENIZER.encode(chr(i))[0]] >= 1
    text = "na\u00efve \U0001f600 \u4e16"
    assert int(counts[TOKENIZER.encode(text)].sum()) == len(text.encode())


def test_bits_per_byte_by_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("3 plus 4 is 7. The answer is 7.")
    code, out, _ = call(capsys, "eval", model, "--bpb", tmp_path / "t.txt", "--json")
    assert code == 0
    row = json.loads(out)["stages"]["model"]["scores"]["bpb_full"]
    assert row["n"] == 31 and row["value"] > 0 and row["unit"] == "bits per byte"
    (tmp_path / "e.txt").write_text("")
    code, _, err = call(capsys, "eval", model, "--bpb", tmp_path / "e.txt")
    assert code == 1 and "holds no text" in err


# -- models of other makers ------------------------------------------------------------------------


def test_a_gpt2_of_transformers_is_scored_as_transformers_scores_it(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    from fledge.evals.hf import open_hf

    TOKENIZER.save(tmp_path / "tok")
    config = transformers.GPT2Config(
        vocab_size=TOKENIZER.vocab_size, n_positions=96, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=TOKENIZER.bos_id, eos_token_id=TOKENIZER.eos_id,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / "tok" / name).read_text()
        (tmp_path / name).write_text(text.replace("<|assistant_start|>", "<|other|>"))
    engine = open_hf(tmp_path)
    draw = random.Random(0)
    shared = [draw.randrange(300) for _ in range(20)]
    asked = [scoring.Request([*shared, draw.randrange(300), 5], 20) for _ in range(6)]
    found = scoring.loglikelihood(engine, asked)
    with torch.inference_mode():
        for request, likelihood in zip(asked, found, strict=True):
            logprobs = theirs(torch.tensor([request.ids])).logits[0].log_softmax(-1)
            plain = [float(logprobs[p, request.ids[p + 1]]) for p in (19, 20)]
            assert likelihood.logprobs == pytest.approx(plain, abs=1e-5)
    words = ("eval", tmp_path, "--tasks", "core", "--data-root", data, "--no-store", "--json")
    code, out, _ = call(capsys, *words)
    assert code == 0 and "core_v1" in json.loads(out)["stages"]["model"]["scores"]


def test_a_kill_between_the_result_and_its_partial_file_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, "model")
    records = [{"id": "a", "correct": True}]
    store.write("task", "key", {"n": 1}, records)
    store.partial_file("task").write_text("{}\n")
    assert store.read("task", "other key") is None
    assert store.partial_file("task").is_file()  # another exam's, which may go on
    assert store.read("task", "key") is not None
    assert not store.partial_file("task").exists()
