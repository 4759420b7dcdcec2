"""`fledge run --nproc N`: several gloo processes of one machine carry a run as one process does.

Losses equal to rounding, a killed rank ends all of them, and the same command goes on, with as many
processes as one likes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fledge import launch
from fledge.run import Run
from tests.faults.killing import kill_when, rows
from tests.helpers_hub import local_hub
from tests.helpers_mini import (
    artefacts,
    command,
    differences,
    environment,
    fledge,
    write_recipe,
)
from tests.helpers_mini_hub import mini_hub
from tests.stages.test_rehearsal import check_needs, check_scores

pytestmark = [
    pytest.mark.timeout(900),  # a quarter of a minute of work, but the machine may be busy
    pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc"),
]


def metrics(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def ranks_of(parent: int) -> list[int]:
    """The processes that a launcher started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    try:
        return [int(word) for word in children.read_text().split()]
    except FileNotFoundError:
        return []


def test_two_ranks_are_killed_go_on_and_equal_one_process(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    look = ("--until", "sft", "--sft.chatcore_every", 2, "--sft.chatcore_examples", 3)
    done = fledge("run", recipe, "--out", one, *look)
    assert done.returncode == 0, done.stderr
    words = ("run", recipe, "--out", two, *look, "--nproc", "2")
    process = subprocess.Popen(
        command(*words), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while rows(two / "base" / "metrics.jsonl") < 5 and process.poll() is None:
        time.sleep(0.005)
    ranks = ranks_of(process.pid)
    if len(ranks) == 2:
        os.kill(ranks[1], signal.SIGKILL)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 75
        assert b"rank 1 was killed (signal 9)" in told and b"bug" not in told
        assert [pid for pid in ranks if Path(f"/proc/{pid}").exists()] == []
    else:
        process.communicate(timeout=300)
        pytest.skip("the run was over before a rank could be killed")
    again = fledge(*words)
    assert again.returncode == 0, again.stderr
    for stage in ("base", "mid", "sft"):
        left, right = metrics(one, stage), metrics(two, stage)
        assert [row["step"] for row in left] == [row["step"] for row in right]
        for a, b in zip(left, right, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=2e-5)
            assert b.get("bpb") == pytest.approx(a.get("bpb"), abs=2e-5)
            assert b.get("chatcore") == a.get("chatcore")
    assert sum("chatcore" in row for row in metrics(two, "sft")) == 2
    # one process goes on where two have stopped: the fingerprints know nothing of ranks
    rest = fledge("run", recipe, "--out", two)
    assert rest.returncode == 0, rest.stderr
    assert "sft: already done" in rest.stderr
    assert (two / "report.json").is_file()


def test_ranks_follow_keys_of_the_execution_that_change_on_the_way(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    assert fledge("run", recipe, "--out", out, "--until", "tokenizer").returncode == 0
    words = ("--hardware.async_checkpoints", "True", "--mid.chatcore_every", "4")
    done = fledge("run", recipe, "--out", out, "--until", "mid", "--nproc", "2", *words)
    assert done.returncode == 0, done.stderr
    assert Run.read(out).values["hardware.async_checkpoints"] is True


REWARD = """\
import os

def even(item, reply):
    with open({seen!r}, "a") as file:
        file.write(os.environ.get("RANK", ""))
    if {broken} and item["answer"].endswith("7"):
        raise ValueError("seven")
    return sum(ord(c) % 2 == 0 for c in reply.text) / (1 + len(reply.text))
"""


def rl_recipe(folder: Path, *, broken: bool = False) -> Path:
    """The miniature with a reward that tells the answers of an untrained model apart."""
    (folder / "own.py").write_text(
        REWARD.format(broken=broken, seen=str(folder / "seen")), encoding="utf-8"
    )
    recipe, own = write_recipe(folder), f'rewards = {{ "{folder / "own.py"}:even" = 1.0 }}'
    text = recipe.read_text().replace("steps = 2\nprompts_per_step = 2", "steps = 6")
    text = text.replace(
        "samples_per_prompt = 2", f"prompts_per_step = 3\nsamples_per_prompt = 4\n{own}"
    )
    recipe.write_text(text)
    return recipe


def test_rl_on_two_ranks_is_killed_goes_on_and_equals_one_process(tmp_path: Path) -> None:
    recipe = rl_recipe(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    done = fledge("run", recipe, "--out", one, "--until", "sft")
    assert done.returncode == 0, done.stderr
    shutil.copytree(one, two)
    assert fledge("run", recipe, "--out", one, "--until", "rl").returncode == 0
    (tmp_path / "seen").write_text("")
    words = ("run", recipe, "--out", two, "--until", "rl", "--nproc", "2")
    process = subprocess.Popen(
        command(*words), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while rows(two / "rl" / "metrics.jsonl") < 2 and process.poll() is None:
        time.sleep(0.005)
    found = ranks_of(process.pid)
    if len(found) == 2:
        os.kill(found[1], signal.SIGKILL)
    process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("rl was over before a rank could be killed")
    assert process.returncode == 75
    again = fledge(*words)
    assert again.returncode == 0, again.stderr
    left, right = metrics(one, "rl"), metrics(two, "rl")
    assert [row["step"] for row in right] == [1, 2, 3, 4, 5, 6]
    assert any(row["policy_loss"] for row in left)
    assert set((tmp_path / "seen").read_text()) == {"0", "1"}, "both graded answers of their own"
    for step, (a, b) in enumerate(zip(left, right, strict=True)):
        near = 1e-6 if step < 2 else 2e-4  # Muon amplifies rounding
        for key in ("policy_loss", "reward", "length", "sampled_tokens", "gradient_norm"):
            assert b[key] == pytest.approx(a[key], abs=near), (step, key)
        assert b.get("validation_reward") == pytest.approx(a.get("validation_reward"), abs=near)
    assert (two / "rl" / "samples.md").is_file()


def test_a_reward_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    recipe, out = rl_recipe(tmp_path, broken=True), tmp_path / "run"
    done = fledge("run", recipe, "--out", out, "--until", "rl", "--nproc", "2")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1 and "seven" in done.stderr
    assert "bug" not in done.stderr


def test_exams_of_two_ranks_are_killed_go_on_and_leave_the_files_of_one_process(
    tmp_path: Path,
) -> None:
    recipe, one, two = write_recipe(tmp_path), tmp_path / "one", tmp_path / "two"
    more = ("--evaluate.max_examples", "150", "--evaluate.stages", "sft", "rl")
    done = fledge("run", recipe, "--out", one, "--until", "rl", *more)
    assert done.returncode == 0, done.stderr
    shutil.copytree(one, two)
    done = fledge("run", recipe, "--out", one, *more)
    assert done.returncode == 0, done.stderr
    words = ("run", recipe, "--out", two, *more, "--nproc", "2")
    process = subprocess.Popen(
        command(*words), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    partial = two / "evaluate" / "sft"
    while not [*partial.glob("*.json")] and process.poll() is None:
        time.sleep(0.002)
    ranks = ranks_of(process.pid)
    if len(ranks) == 2:
        os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=300)
    if process.returncode == 0:
        pytest.skip("the exams were over before a rank could be killed")
    assert process.returncode == 75
    assert not (two / "evaluate" / "rl" / "chatcore.json").exists()
    again = fledge(*words)
    assert again.returncode == 0, again.stderr
    left, right = artefacts(one), artefacts(two)
    assert [name for name in differences(left, right) if name.startswith("evaluate/")] == []
    for name in ("chatcore.json", "chat/quality.json", "world_math.samples.jsonl"):
        assert f"evaluate/rl/{name}" in left
    # one process reads all of it back
    rest = fledge("run", recipe, "--out", two, *more)
    assert rest.returncode == 0 and "evaluate: already done" in rest.stderr


def test_sigterm_is_agreed_on_by_all_ranks(tmp_path: Path) -> None:
    recipe, out = write_recipe(tmp_path), tmp_path / "run"
    words = ("run", recipe, "--out", out, "--nproc", "2")
    code = kill_when(
        lambda: rows(out / "base" / "metrics.jsonl") >= 2, *words, number=signal.SIGTERM
    )
    if code is None:
        pytest.skip("the run was over before it could be asked to stop")
    assert code == 75
    record = json.loads((out / "base" / "stage.json").read_text())
    if record["status"] == "done":
        pytest.skip("base was over before it could be asked to stop")
    assert record["status"] == "interrupted"
    saved = int((out / "base" / "LATEST").read_text().strip().removeprefix("step_"))
    assert saved == rows(out / "base" / "metrics.jsonl")


def test_a_rehearsal_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    out = tmp_path / "run"
    with local_hub(mini_hub(), str(tmp_path / "home"), monkeypatch):
        done = fledge("run", "speedrun24", "--rehearse", "--nproc", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    check_scores(out, of="speedrun24")
    assert done.stdout.count("the whole run of speedrun24") == 1  # rank 0 alone speaks
    check_needs(out, done.stdout, of="speedrun24", depth="24 -> 2 (1/12)")


def test_the_error_of_the_leader_is_the_error_of_the_run(tmp_path: Path) -> None:
    done = fledge(
        *("run", write_recipe(tmp_path), "--nproc", "2", "--out", tmp_path / "run"),
        *("--data.world", tmp_path / "no.csv"),
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1 and "no.csv" in done.stderr


def test_too_many_processes_are_refused(tmp_path: Path) -> None:
    done = fledge("run", write_recipe(tmp_path), "--nproc", "100000", "--out", tmp_path / "run")
    assert done.returncode == 1 and "error: --nproc 100,000" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '2': print('no room', file=sys.stderr); sys.exit(1)\n"
        "time.sleep(60)"
    )
    began = time.monotonic()
    assert launch.ranks([sys.executable, "-c", code], 3, grace_seconds=0.1) == 1
    assert time.monotonic() - began < 30
    assert "rank 2 ended with code 1" in capsys.readouterr().err
    assert launch.ranks([sys.executable, "-c", "pass"], 3) == 0


def test_ranks_die_with_their_launcher() -> None:
    code = (
        "import sys; from fledge import launch\n"
        "launch.ranks([sys.executable, '-c', 'import time; time.sleep(120)'], 2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=environment())
    found: list[int] = []
    deadline = threading.Event()
    while len(found) < 2 and not deadline.wait(0.02):
        found = ranks_of(process.pid)
        assert process.poll() is None
    process.kill()
    process.wait()
    for _ in range(500):
        if not any(_runs(pid) for pid in found):
            break
        deadline.wait(0.02)
    assert [pid for pid in found if _runs(pid)] == []


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
