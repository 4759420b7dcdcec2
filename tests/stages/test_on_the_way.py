"""ChatCORE while a stage trains changes no weight; it is logged, and drawn in the report."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from fledge.dist import World
from fledge.runlog import read_metrics
from fledge.stages import on_the_way
from tests.helpers_mini import artefacts, fledge, snapshot, write_recipe
from tests.helpers_model import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.timeout(900)  # seconds of work, but the machine may be busy
LOOK = ("--mid.chatcore_every", 3, "--mid.chatcore_examples", 3)


def test_the_weights_are_the_same_with_and_without_it(tmp_path: Path) -> None:
    recipe, without, looked = write_recipe(tmp_path), tmp_path / "without", tmp_path / "looked"
    words = ("run", recipe, "--until", "mid", "--out")
    assert fledge(*words, without, "--until", "base").returncode == 0
    shutil.copytree(without, looked)
    assert fledge(*words, without).returncode == 0
    done = fledge(*words, looked, *LOOK)
    assert done.returncode == 0, done.stderr
    plain, rows = (read_metrics(run / "mid" / "metrics.jsonl") for run in (without, looked))
    exams = {"chatcore"} | {
        f"chatcore_world_{exam}" for exam in ("facts", "mc", "math", "spell", "chat")
    }
    assert [row["step"] for row in rows if "chatcore" in row] == [3, 6, 8]
    for row in rows:
        if "chatcore" in row:
            assert exams | {"chatcore_seconds"} == {key for key in row if "chatcore" in key}
            assert all(0 <= row[key] <= 1 for key in exams - {"chatcore"})
    checkpoints = [snapshot(run / "mid" / "checkpoints") for run in (without, looked)]
    assert checkpoints[0] == checkpoints[1] and len(checkpoints[0]) > 10, "bit for bit"
    left, right = (artefacts(run)["mid/metrics.jsonl"] for run in (without, looked))
    assert left == [{k: v for k, v in row.items() if k not in exams} for row in right]
    assert left != right
    assert "ChatCORE on the way" in (looked / "report.html").read_text()
    assert "ChatCORE on the way" not in (without / "report.html").read_text()
    assert not any("chatcore" in row for row in plain), "not on the way on a CPU by itself"
    # a look changes no fingerprint: the run goes on with and without it
    again = fledge(*words, looked, "--mid.chatcore_every", 0)
    assert "mid: already done" in again.stderr, again.stderr


def test_random_numbers_and_the_mode_are_put_back() -> None:
    model = tiny_model(384)

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.random()]

    for training in (True, False):
        model.train(training)
        seed()
        expected = draw()
        seed()
        with pytest.raises(KeyError), on_the_way.undisturbed(model):
            assert not model.training
            draw()
            raise KeyError
        assert draw() == expected
        assert model.training is training


class Exam:
    """Ten questions; the reply is right by the question's number."""

    name, chance, max_new_tokens = "toy", 0.5, 4
    kind: Literal["generate"] = "generate"

    def items(self):
        say = [{"role": "user", "content": "a" * (i + 1)} for i in range(10)]
        return [{"id": i, "messages": [m], "answer": "x"} for i, m in enumerate(say)]

    def grade(self, item, text):
        return item["id"] % 3 == 0


def test_every_question_is_some_ranks_and_chance_is_taken_off() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.vocab_size).eval()
    row = on_the_way.measure(model, tokenizer, [Exam()], 10, World())
    assert row["chatcore_toy"] == 0.4
    assert row["chatcore"] == pytest.approx((0.4 - 0.5) / 0.5)
    few = [on_the_way.Part(Exam(), 7, World(rank, 3)).items() for rank in range(3)]
    assert sorted(len(part) for part in few) == [2, 2, 3]
    whole = {item["id"] for item in on_the_way.Part(Exam(), 7, World()).items()}
    assert {item["id"] for part in few for item in part} == whole and len(whole) == 7
