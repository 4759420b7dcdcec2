"""`fledge run` from recipe to report in miniature: files, skipping, refusing, restarting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fledge import cli
from fledge.config import (
    STAGES,
    TRAINED_STAGES,
    BaseSection,
    ModelSection,
    Recipe,
    TokenizerSection,
)
from fledge.files import take_lock
from fledge.plan import hardware, planner
from fledge.run import Run
from fledge.runlog import read_metrics
from fledge.stages import probe
from tests.helpers_mini import (
    artefacts,
    assert_three_parts,
    differences,
    fledge,
    snapshot,
    write_recipe,
)

EXAMS = ("world_chat", "world_facts", "world_math", "world_mc", "world_spell")
HF_FILES = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.tiktoken"),
}


pytestmark = pytest.mark.timeout(900)  # seconds of work, but the machine may be busy


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> tuple[Path, str]:
    """(a whole run that nobody may change, what it printed)."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finished = fledge("run", recipe, "--out", out)
    assert finished.returncode == 0, finished.stderr
    return out, finished.stdout


@pytest.fixture
def whole(done: tuple[Path, str]) -> Path:
    return done[0]


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A whole run that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def records(run: Path) -> dict[str, dict[str, Any]]:
    return {s: r for s in STAGES if (r := Run.read(run).read_stage(s)) is not None}


# -- what one run leaves behind ------------------------------------------------------------------


def test_every_stage_is_done_and_says_how_to_chat(done: tuple[Path, str]) -> None:
    out, printed = done
    assert {s: r["status"] for s, r in records(out).items()} == dict.fromkeys(STAGES, "done")
    assert all(r["attempts"] == 1 and r["seconds"] > 0 for r in records(out).values())
    assert "fledge chat" in printed and "report.md" in printed


def test_a_run_keeps_how_it_was_asked_for_and_what_base_read(whole: Path) -> None:
    origin = json.loads((whole / "resolved.json").read_text())["origin"]
    assert origin["command"].startswith("fledge run ") and "--out" in origin["command"]
    assert origin["expected"] is None and origin["overrides"] == []
    corpus = json.loads((whole / "base" / "corpus.json").read_text())
    assert corpus["world"] == "village" and corpus["facts"] > 0 and "bytes" not in corpus
    page = (whole / "report.md").read_text()
    assert f"`{origin['command']}`" in page and f"{corpus['facts']:,} facts" in page


def test_the_files_of_a_run(whole: Path) -> None:
    names = set(snapshot(whole))
    assert {"recipe.toml", "resolved.json", "report.md", "report.html", "report.json"} <= names
    assert {f"tokenizer/{name}" for name in (*TOKENIZER_FILES, "stats.json")} <= names
    assert {"plots/loss.svg", "plots/bpb.svg", "plots/lr.svg", "plots/reward.svg"} <= names
    for stage in TRAINED_STAGES:
        own = ("stage.json", "metrics.jsonl", "log.txt", "samples.md", "LATEST")
        assert {f"{stage}/{name}" for name in own} <= names
        latest = (whole / stage / "LATEST").read_text().strip()
        folder = whole / stage / "checkpoints" / latest
        assert {p.name for p in folder.iterdir()} == HF_FILES | TOKENIZER_FILES | {"train_state"}
        assert {p.name for p in (folder / "train_state").iterdir()} == {
            *("optimizer-00001-of-1.safetensors", "index.json", "state.json", "SHA256SUMS"),
        }
        rows = read_metrics(whole / stage / "metrics.jsonl")
        steps = {"base": 20, "mid": 8, "sft": 4, "rl": 2}[stage]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for stage in ("mid", "sft", "rl"):
        for task in EXAMS:
            assert {f"evaluate/{stage}/{task}{end}" for end in (".json", ".samples.jsonl")} <= names
        assert f"evaluate/{stage}/chatcore.json" in names
        assert {f"evaluate/{stage}/chat/{n}" for n in ("quality.json", "dialogues.jsonl")} <= names
    assert not any(name.endswith(".tmp") for name in names)


def test_only_the_last_two_checkpoints_stay(whole: Path) -> None:
    kept = {
        stage: sorted(p.name for p in (whole / stage / "checkpoints").iterdir())
        for stage in TRAINED_STAGES
    }
    assert kept == {
        "base": ["step_000018", "step_000020"],
        "mid": ["step_000006", "step_000008"],
        "sft": ["step_000002", "step_000004"],
        "rl": ["step_000001", "step_000002"],
    }


def test_report_json_has_the_shape_that_programs_read(whole: Path) -> None:
    facts = json.loads((whole / "report.json").read_text())
    check_shape(facts, trained=TRAINED_STAGES)
    assert set(facts["stages"]) == set(STAGES)
    assert facts["model"]["depth"] == 1
    assert facts["model"]["training_tokens"] > 16_000
    assert {"stops", "repeats", "recalls", "bpb"} <= set(facts["stages"]["sft"]["chat"])
    scores = facts["stages"]["sft"]["scores"]
    assert {*EXAMS, "chatcore", "bpb_chats"} == set(scores)
    assert all(scores[task]["n"] == 4 for task in EXAMS)
    assert facts["stages"]["base"]["scores"]["bpb"]["bound"] > 0


def check_shape(facts: dict[str, Any], *, trained: tuple[str, ...]) -> None:
    """DESIGN 4.3: the one shape of report.json and `fledge eval --json`."""
    assert {"depth", "parameters", "training_tokens"} <= set(facts["model"])
    for stage in trained:
        table = facts["stages"][stage]
        assert {"seconds", "peak_memory_bytes", "scores"} <= set(table)
        for score in table["scores"].values():
            assert {"value", "low", "high", "n", "chance", "unit"} <= set(score)


# -- running again -------------------------------------------------------------------------------


def test_running_again_skips_everything_and_changes_no_byte(
    copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(copy)
    code, _, err = call(capsys, "run", recipe, "--out", copy)
    assert code == 0, err
    assert err.count("already done") == len(STAGES)
    after = snapshot(copy)
    after[".lock"] = before[".lock"]  # the process that held it last
    assert differences(before, after) == []


def test_stopping_after_base_and_going_on_equals_one_go(
    whole: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code, _, err = call(capsys, "run", recipe, "--out", out, "--until", "base")
    assert code == 0, err
    assert set(records(out)) == {"tokenizer", "base"}
    assert "still to do" in (out / "report.md").read_text()
    assert call(capsys, "run", recipe, "--out", out)[0] == 0
    assert differences(artefacts(whole), artefacts(out)) == []


@pytest.mark.parametrize(
    "key",
    [
        *("data.seed 1", "model.depth 2", "base.matrix_lr 0.5", "mid.tokens 2048", "sft.seed 1"),
        *("rl.temperature 0.5", "rl.steps 0", "evaluate.max_examples 3"),
    ],
)
def test_a_changed_key_is_refused_by_name(
    key: str, copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = key.split()
    before = snapshot(copy)
    code, _, err = call(capsys, "run", recipe, "--out", copy, f"--{name}", value)
    assert code == 1
    assert_three_parts(err)
    assert f"changed since then: {name}: " in err or f"; {name}: " in err, err
    assert "--restart" in err
    after = snapshot(copy)
    after[".lock"] = before[".lock"]
    assert differences(before, after) == []


def test_keys_of_the_execution_never_refuse(
    copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = artefacts(copy)
    words = ("--hardware.threads", 2, "--base.device_batch_size", 1, "--sft.device_batch_size", 2)
    code, _, err = call(capsys, "run", recipe, "--out", copy, *words)
    assert code == 0, err
    changed = differences(before, artefacts(copy))
    assert set(changed) <= {"report.md", "report.html", "recipe.toml", "resolved.json"}


def test_restart_does_a_stage_and_the_later_ones_anew(
    whole: Path, copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "sft" / "samples.md").write_text("mine")
    code, _, err = call(capsys, "run", recipe, "--out", copy, "--restart", "sft")
    assert code == 0, err
    assert err.count("already done") == 3
    assert differences(artefacts(whole), artefacts(copy)) == []


def test_restart_takes_a_changed_key(
    whole: Path, copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--sft.seed", 1, "--sft.tokens", 1024, "--rl.steps", 0)
    code, _, err = call(capsys, "run", recipe, "--out", copy, "--restart", "sft", *words)
    assert code == 0, err
    changed = differences(artefacts(whole), artefacts(copy))
    assert not [name for name in changed if name.startswith(("tokenizer/", "base/", "mid/"))]
    assert "sft/checkpoints/step_000004/model.safetensors" in changed
    assert not (copy / "rl").exists() and not (copy / "evaluate" / "rl").exists()
    assert Run.read(copy).asked.sft.tokens == 1024
    # and from here on it is the run's recipe
    code, _, err = call(capsys, "run", recipe, "--out", copy, *words)
    assert code == 0 and err.count("already done") == len(STAGES) - 1


def test_a_refused_restart_throws_nothing_away(
    copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(copy)
    words = ("--restart", "sft", "--base.matrix_lr", 0.5)
    code, _, err = call(capsys, "run", recipe, "--out", copy, *words)
    assert code == 1
    assert_three_parts(err)
    assert "base.matrix_lr" in err
    after = snapshot(copy)
    after[".lock"] = before[".lock"]
    assert differences(before, after) == []


def test_training_state_may_be_deleted(
    whole: Path, copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in copy.glob("*/checkpoints/*/train_state"):
        shutil.rmtree(folder)
    shutil.rmtree(copy / "evaluate")  # exams need none
    code, _, err = call(capsys, "run", recipe, "--out", copy)
    assert code == 0, err
    gone = {name for name in artefacts(whole) if "/train_state" in name}
    assert set(differences(artefacts(whole), artefacts(copy))) == gone
    code, _, err = call(capsys, "run", recipe, "--out", copy, "--restart", "rl")
    assert code == 0 and "momentum starts at zero" in err


def test_without_steps_rl_is_left_out(
    copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run", recipe, "--out", copy, "--restart", "rl", "--rl.steps", 0)
    code, _, err = call(capsys, *words)
    assert code == 0, err
    assert "rl: left out (rl.steps = 0)" in err
    assert not (copy / "rl").exists()
    assert {p.name for p in (copy / "evaluate").iterdir() if p.is_dir()} == {"mid", "sft"}
    last = Run.read(copy).last_model()
    assert last is not None and last[0] == "sft"
    assert "rl.steps = 0" in (copy / "report.md").read_text()


def test_a_second_process_on_the_same_run_is_refused(copy: Path, recipe: Path) -> None:
    import os

    lock = take_lock(copy / ".lock", copy)
    try:
        before = snapshot(copy)
        second = fledge("run", recipe, "--out", copy)
        assert second.returncode == 1
        assert_three_parts(second.stderr)
        assert "is in use" in second.stderr and str(os.getpid()) in second.stderr
        assert differences(before, snapshot(copy)) == []
    finally:
        os.close(lock)


def test_a_learning_rate_that_is_too_high_is_told_in_words(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ("run", recipe, "--out", out, "--base.matrix_lr", "1e37", "--base.save_every", 1)
    code, _, err = call(capsys, *words)
    assert code == 1
    assert_three_parts(err)
    rows = read_metrics(out / "base" / "metrics.jsonl")
    first = next(row["step"] for row in rows if row["loss"] is None)
    assert [row["loss"] for row in rows[first - 1 :]] == [None] * 10
    assert f"base diverged: up to step {first + 9} the loss" in err
    assert "learning rate is too high" in err
    kept = (out / "base" / "LATEST").read_text().strip()
    assert kept == f"step_{first - 1:06d}"
    assert f"--restart base; {kept} is kept" in err
    assert records(out)["base"]["status"] == "failed"
    words = ("run", recipe, "--out", out, "--restart", "base", "--until", "base")
    assert call(capsys, *words)[0] == 0


# -- the other verbs on a run --------------------------------------------------------------------


def test_the_report_renders_again(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(copy)
    for name in ("report.md", "report.html", "report.json", "plots/loss.svg"):
        (copy / name).unlink()
    code, printed, err = call(capsys, "report", copy)
    assert code == 0, err
    assert printed == before["report.md"].decode()
    assert differences(before, snapshot(copy)) == []


def test_eval_of_a_run_has_the_shape_of_its_report(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("eval", whole, "--tasks", "world_mc,world_spell", "--max-examples", 4, "--json")
    code, printed, err = call(capsys, *words)
    assert code == 0, err
    found = json.loads(printed)
    check_shape(found, trained=("rl",))
    report = json.loads((whole / "report.json").read_text())
    assert found["model"] == report["model"]
    for task in ("world_mc", "world_spell"):
        mine, stored = (f["stages"]["rl"]["scores"][task] for f in (found, report))
        assert mine["value"] == stored["value"] and mine["n"] == stored["n"] == 4


def test_a_checkpoint_inside_a_run_is_examined_on_the_world_of_the_run(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = whole / "rl" / "checkpoints" / "step_000002"
    words = ("--tasks", "world_mc", "--max-examples", 4, "--json")
    answers = [call(capsys, "eval", path, *words) for path in (whole, folder)]
    assert [code for code, _, _ in answers] == [0, 0]
    values = [json.loads(a[1])["stages"]["rl"]["scores"]["world_mc"]["value"] for a in answers]
    assert values[0] == values[1]


def test_chat_answers_from_a_run_and_from_a_checkpoint(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = whole / "rl" / "checkpoints" / "step_000002"
    words = ("-p", "Who are you?", "--max-tokens", 8)
    answers = [call(capsys, "chat", path, *words) for path in (whole, folder)]
    assert [code for code, _, _ in answers] == [0, 0]
    assert answers[0][1] == answers[1][1] != ""


# -- the user's own text -------------------------------------------------------------------------


def test_minutes_are_measured_once_and_hold_for_the_run(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = iter((400.0, 800.0))
    monkeypatch.setattr(probe, "tokens_per_second", lambda plan, device: next(rates))
    words = ("run", recipe, "--out", tmp_path / "run", "--until", "base", "--base.tokens", "None")
    for _ in range(2):  # the second time nothing is measured, and nothing is left to do
        code, _, err = call(capsys, *words, "--base.minutes", 0.05)
        assert code == 0, err
        run = Run.read(tmp_path / "run")
        assert run.values["base.tokens"] == 1024  # of 1,200, in whole steps
        assert "0.05 minutes at 400 tokens/s" in run.resolved["rules"]["base.tokens"]
    # another key of a later stage, and base anew: the measured speed still holds
    code, _, err = call(capsys, *words, "--base.minutes", 0.05, "--sft.lr_scale", 0.2)
    assert code == 0, err
    code, _, err = call(capsys, *words, "--base.minutes", 0.05, "--restart", "base")
    assert code == 0, err
    run = Run.read(tmp_path / "run")
    assert run.values["base.tokens"] == 1024
    assert "0.05 minutes at 400 tokens/s" in run.resolved["rules"]["base.tokens"]
    # the same speed for other minutes; a stage that is done refuses them
    code, _, err = call(capsys, *words, "--base.minutes", 0.1)
    assert code == 1
    assert_three_parts(err)
    assert "base.tokens" in err and next(rates) == 800.0


def test_the_probe_halves_its_rows_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner.resolve(
        Recipe(
            model=ModelSection(depth=1, max_seq_len=64),
            tokenizer=TokenizerSection(vocab_size=512),
            base=BaseSection(tokens=4096, global_batch_tokens=512, device_batch_size=8),
        ),
        hardware.parse("2xcpu"),
    )
    sizes: list[int] = []
    real = probe.accumulate

    def small_memory(model: Any, ids: Any, mask: Any, size: int) -> tuple[float, int]:
        sizes.append(size)
        if size > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(model, ids, mask, size)

    monkeypatch.setattr(probe, "accumulate", small_memory)
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.05)
    one = probe.tokens_per_second(plan, "cpu")
    assert sizes[:3] == [8, 4, 2] and set(sizes[2:]) == {2}
    # ranks are taken to be so many times as fast
    monkeypatch.setattr(probe, "tokens_per_second", lambda plan, device: one)
    recipe = Recipe(base=BaseSection(minutes=1))
    plans = [
        probe.plan_at_measured_speed(recipe, planner.resolve(recipe, plan.hardware), "cpu", ranks)
        for ranks in (1, 3)
    ]
    first, third = (p.hardware.training_flops or 0.0 for p in plans)
    assert third == pytest.approx(3 * first)


def test_a_run_goes_on_in_its_dtype_and_says_what_it_was(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("run", recipe, "--out", tmp_path / "run", "--until")
    code, _, err = call(capsys, *words, "base", "--hardware.dtype", "bfloat16_products")
    assert code == 0, err
    text = recipe.read_text(encoding="utf-8")
    bare = tmp_path / recipe.name
    bare.write_text(text.replace('dtype = "float32"\n', ""), encoding="utf-8")
    code, _, err = call(capsys, "run", bare, *words[2:], "mid")
    assert code == 0, err
    assert Run.read(tmp_path / "run").values["hardware.dtype"] == "bfloat16_products"
    assert "mid: computes in bfloat16_products" in err
    code, _, err = call(capsys, *words, "sft", "--hardware.dtype", "bfloat16")
    assert code == 0, err
    assert Run.read(tmp_path / "run").values["hardware.dtype"] == "bfloat16"


def test_the_speed_of_a_network_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planner.resolve(
        Recipe(
            model=ModelSection(depth=1, max_seq_len=64),
            tokenizer=TokenizerSection(vocab_size=512),
            base=BaseSection(tokens=4096, global_batch_tokens=128),
        ),
        hardware.parse("2xcpu"),
    )
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.05)
    assert 100 < probe.tokens_per_second(plan, "cpu") < 1e8


def test_own_text_goes_through_all_stages(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        space = " " if i % 2 else "\u3002"  # half of them without a single blank
        story = space.join(f"The fox number {i} saw {j} hens on day {i * j}." for j in range(12))
        story = story if i % 2 else story.replace(" ", "")
        (text / f"{i:02d}.txt").write_text(story, encoding="utf-8")
    words = ("run", recipe, "--out", tmp_path / "run", "--data.source", text)
    words += ("--data.val_fraction", 0.2, "--base.tokens", 2048)
    code, _, err = call(capsys, *words)
    assert code == 0, err
    assert "rl: left out" in err and "gsm8k" in err
    assert set(records(tmp_path / "run")) == set(STAGES) - {"rl"}
    page = (tmp_path / "run" / "report.md").read_text()
    assert str(text) in page
    shutil.move(text, tmp_path / "moved")  # a place is not the data
    words = (*words[:5], tmp_path / "moved", *words[6:])
    code, _, err = call(capsys, *words)
    assert code == 0, err
    (tmp_path / "moved" / "00.txt").write_text("something else", encoding="utf-8")
    code, _, err = call(capsys, *words)
    assert code == 1
    assert_three_parts(err)
    assert "data.text" in err
