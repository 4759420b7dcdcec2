"""`fledge run speedrun --rehearse`: the recipe that costs money, whole, in miniature, for nothing.

Against a local hub that holds every data set in its real layout; killed on the way and restarted.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
from pathlib import Path

import pytest

from fledge.config import load_recipe
from fledge.plan import hardware, planner, rehearsal
from fledge.runlog import read_metrics
from tests.faults.killing import kill_when, rows
from tests.helpers_hub import local_hub
from tests.helpers_mini import fledge
from tests.helpers_mini_hub import mini_hub

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

HERE = hardware.parse("2xcpu")
METRICS = ("CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "ChatCORE")
EXAMS = ("core_v1", "arc_challenge", "arc_easy", "gsm8k", "humaneval", "mmlu", "chatcore")
STAGES = ("base", "mid", "sft", "rl")


@pytest.mark.timeout(900)  # half a minute of work, but the machine may be busy
def test_the_speedrun_is_rehearsed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    out = tmp_path / "run"
    words = ("run", "speedrun", "--rehearse", "--out", out, "--hardware.threads", "1")
    with local_hub(mini_hub(), str(tmp_path / "home"), monkeypatch) as server:
        server.faults["shard_00000"] = ["500", "corrupt"]  # outlived on the way
        code = kill_when(lambda: rows(out / "base" / "metrics.jsonl") >= 7, *words)
        assert code in (-signal.SIGKILL, None)  # None: a busy machine, it was over before
        done = fledge(*words)
        asked = {path.split("/resolve/")[0] for path in server.paths()}
    assert done.returncode == 0, done.stderr
    assert {name.rpartition("/datasets/")[2] for name in asked} == {
        *("karpathy/fineweb-edu-100b-shuffle", "HuggingFaceTB/smol-smoltalk", "cais/mmlu"),
        *("allenai/ai2_arc", "openai/gsm8k", "openai/openai_humaneval"),
    }
    base = json.loads((out / "base" / "stage.json").read_text())
    assert base["status"] == "done" and base["attempts"] == (2 if code is not None else 1)
    check_scores(out)
    check_needs(out, done.stdout)
    for stage in ("mid", "sft"):
        found = [row for row in read_metrics(out / stage / "metrics.jsonl") if "chatcore" in row]
        assert [row["step"] for row in found] == [2, 4] and "chatcore_humaneval" in found[0]
    # the same command again: nothing is left to do
    assert fledge(*words, "--until", "evaluate").returncode == 0


def check_scores(out: Path, of: str = "speedrun") -> None:
    """Every row of nanochat's table in every column, with an interval around it."""
    stages = json.loads((out / "report.json").read_text())["stages"]
    for stage in STAGES:
        for exam in EXAMS:
            score = stages[stage]["scores"][exam]
            assert score["low"] <= score["value"] <= score["high"], (stage, exam)
            assert score["low"] < score["high"] and score["n"] >= 3
    page = (out / "report.md").read_text()
    table = page[page.index("In the form of nanochat") :]
    assert re.search(r"metric \| BASE \| MID \| SFT \| RL", table)
    cell = r"-?\d\.\d{4} \[-?\d\.\d{4}, -?\d\.\d{4}\]"
    for metric in METRICS:
        assert re.search(rf"\| {metric} (\| {cell} ){{4}}\|", table), metric
    assert f"This is {of} in miniature" in page


def check_needs(out: Path, said: str, of: str = "speedrun", depth: str = "20 -> 2 (1/10)") -> None:
    """The factors are printed and stored; the last words are what the whole run needs."""
    resolved = json.loads((out / "resolved.json").read_text())
    factors = resolved["rehearsal"]["factors"]
    assert resolved["rehearsal"]["of"] == of
    assert factors["model.depth"] == depth
    assert all(f"{key} " in said and text in said for key, text in factors.items())
    needed = json.loads((out / "needs.json").read_text())
    assert needed["on"] == "8 x H100" and 60 < needed["dollars"] < 120
    assert any("8 x H100" in sentence for sentence in needed["missing"])
    assert f"the whole run of {of} on 8 x H100" in said
    for word in ("time", "memory", "disk", "missing for it"):
        assert word in said.rpartition("the whole run of")[2]


@pytest.mark.parametrize(
    "name", ["speedrun", "speedrun24", "thousand", "free-t4", "tiny", "laptop"]
)
def test_only_sizes_differ_in_a_rehearsal(name: str) -> None:
    recipe = load_recipe(name)[1]
    whole = planner.resolve(recipe, HERE)
    small, factors = rehearsal.shrink(whole, recipe)
    plan = planner.resolve(small, HERE)
    follows = {f"model.{key}" for key in rehearsal.FOLLOWS_DEPTH}
    differ = {key for key in plan.values if plan.values[key] != whole.values[key]}
    looks = {key for key in differ if ".chatcore_" in key}  # taken on the way on any machine
    assert len(looks) == 4
    differ -= looks | {"base.minutes"}  # of which `tokens` says what it came to
    assert differ - {k for k in differ if k.endswith("device_batch_size")} <= {*factors, *follows}
    for key in factors:
        assert plan.values[key] is not None
        assert whole.values[key] is None or plan.values[key] < whole.values[key], key
    for stage in ("base", "mid", "sft"):
        assert plan.values[f"{stage}.tokens"] >= plan.values[f"{stage}.global_batch_tokens"]
    # and a rehearsal of the rehearsal changes nothing more
    assert rehearsal.shrink(plan, small)[1] == {}


def test_what_this_machine_lacks_is_said(tmp_path: Path) -> None:
    recipe = load_recipe("thousand")[1]
    table = rehearsal.needs(recipe, planner.resolve(recipe, hardware.parse("1xcpu")), tmp_path)
    told = "\n".join(table["missing"])
    for word in ("8 x H100", "memory", "disk", "training in bfloat16", "NCCL"):
        assert word in told, word
    assert "float32" not in told
    assert 28 * 3600 < table["seconds"] < 42 * 3600
    wide = dataclasses.replace(
        recipe, hardware=dataclasses.replace(recipe.hardware, dtype="float32")
    )
    slow = rehearsal.needs(wide, planner.resolve(wide, hardware.parse("1xcpu")), tmp_path)
    assert any("float32 is what hardware.dtype asks for" in line for line in slow["missing"])
    assert slow["seconds"] > 10 * table["seconds"]
    own = load_recipe("tiny")[1]
    assert rehearsal.needs(own, planner.resolve(own, HERE), tmp_path)["missing"] == []


@pytest.mark.timeout(900)
def test_data_that_could_not_be_had_is_missing(tmp_path: Path) -> None:
    """Text of one's own, no task file, no network: the run goes through and says what it lacked."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"Page {i}. The river was high and the road was wet. " * 20)
    out = tmp_path / "run"
    done = fledge("run", "night", "--rehearse", "--data.source", text, "--out", out)
    assert done.returncode == 0, done.stderr
    said = done.stdout.rpartition("missing for it:")[2]
    for word in ("gsm8k", "mmlu", "humaneval", "core/copa"):
        assert word in said, word
    assert json.loads((out / "needs.json").read_text())["missing"]


def test_a_target_that_is_no_hardware_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = fledge("run", "tiny", "--rehearse", "--hardware.target", "3xfoo", "--out", out)
    assert done.returncode == 1 and "unknown hardware '3xfoo'" in done.stderr
    assert not out.exists()
