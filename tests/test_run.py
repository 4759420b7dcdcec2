"""fledge.run: creating, holding, refusing, restarting; faults leave nothing half-written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge import files
from fledge.config import LATER_KEYS, Recipe, load_recipe, parse_recipe
from fledge.errors import Interrupted, UserError
from fledge.fingerprint import changed_keys, fingerprint
from fledge.plan.defaults import DEFAULTS
from fledge.plan.hardware import parse
from fledge.plan.planner import resolve
from fledge.run import Run
from fledge.runlog import TIMING_KEYS, MetricsLog, StopRequest, read_metrics, without_timing
from tests.helpers_run import do_stage, open_run, plan_of, write_checkpoint

DATA = {"world": "village"}


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    new = dataclasses.replace(getattr(recipe, section), **values)
    return dataclasses.replace(recipe, **{section: new})


def tiny() -> Recipe:
    return load_recipe("tiny")[1]


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def test_a_new_run_holds_recipe_and_resolved(tmp_path: Path) -> None:
    with open_run(tmp_path / "a" / "b") as run:
        assert tree(run.path) == {".lock", "recipe.toml", "resolved.json"}
        assert parse_recipe(run.recipe_file.read_text(), where="x") == tiny()
        assert run.asked == tiny()
        assert run.recipe.base.matrix_lr is not None
        assert run.model.num_hidden_layers == 2
        assert run.resolved["versions"]["python"]


def test_reopening_changes_nothing(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        before = run.resolved_file.read_bytes()
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        assert run.resolved_file.read_bytes() == before


def test_skip_resume_start(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        parts = run.stage_parts("tokenizer", data=DATA)
        assert run.stage_state("tokenizer", parts) == "start"
        run.begin_stage("tokenizer", parts)
        assert run.stage_state("tokenizer", parts) == "resume"
        run.end_stage("tokenizer", "interrupted", seconds=2)
        assert run.stage_state("tokenizer", parts) == "resume"
        run.begin_stage("tokenizer", parts)
        run.end_stage("tokenizer", "done", seconds=3)
        assert run.stage_state("tokenizer", parts) == "skip"
        record = run.read_stage("tokenizer")
        assert record is not None
        assert (record["attempts"], record["seconds"]) == (2, 5.0)


def test_a_run_from_before_a_key_goes_on_while_the_key_is_at_its_default(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        for stage in ("tokenizer", "base", "mid", "sft", "rl"):
            do_stage(run, stage)
        record = run.read_stage("rl")
        assert record is not None
        assert not set(record["parts"]["values"]) & set(LATER_KEYS)
        content = json.loads(run.resolved_file.read_text())
        for key in LATER_KEYS:  # as an older version wrote it
            content["values"].pop(key)
            content["rules"].pop(key)
        run.resolved_file.write_text(json.dumps(content))
    with open_run(tmp_path / "r") as run:
        assert run.values["rl.loss"] == "reinforce"
        assert run.stage_state("rl", run.stage_parts("rl", data=DATA)) == "skip"
    with (
        open_run(tmp_path / "r", changed(tiny(), "rl", loss="grpo")) as run,
        pytest.raises(UserError, match="its stage rl") as caught,
    ):
        run.stage_state("rl", run.stage_parts("rl", data=DATA))
    assert "rl.loss" in caught.value.why


def test_a_changed_key_is_refused_by_name(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        do_stage(run, "base")
    other = changed(tiny(), "base", matrix_lr=0.5)
    with open_run(tmp_path / "r", other) as run:
        do_stage(run, "tokenizer")  # untouched by the change
        with pytest.raises(UserError) as caught:
            do_stage(run, "base")
    assert "base.matrix_lr: 0.03 -> 0.5" in caught.value.why
    assert "tokens" not in caught.value.why
    assert "--restart base" in caught.value.fix and "--out" in caught.value.fix
    # the refused recipe left no trace
    assert Run.read(tmp_path / "r").asked == tiny()


def test_a_change_before_its_stage_has_begun_is_taken(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
    other = changed(tiny(), "sft", tokens=8192)
    with open_run(tmp_path / "r", other) as run:
        for stage in ("tokenizer", "base", "mid", "sft"):
            do_stage(run, stage)
        assert run.values["sft.tokens"] == 8192
    assert Run.read(tmp_path / "r").asked == other


def test_data_that_changed_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        with pytest.raises(UserError) as caught:
            run.stage_state("tokenizer", run.stage_parts("tokenizer", data={"world": "almanac"}))
    assert 'data.world: "village" -> "almanac"' in caught.value.why


def test_execution_keys_and_places_never_enter(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        do_stage(run, "base")
    moved = changed(tiny(), "base", device_batch_size=1)
    moved = changed(moved, "hardware", threads=1)
    moved = changed(moved, "data", root="/elsewhere")
    with open_run(tmp_path / "r", moved) as run:
        parts = run.stage_parts("base", data=DATA)
        assert run.stage_state("base", parts) == "skip"
        assert run.values["hardware.threads"] == 1
        assert run.values["data.root"] == "/elsewhere"
        assert not any("device_batch_size" in key for key in parts["values"])


def test_numbers_do_not_depend_on_the_machine() -> None:
    here, there = resolve(tiny(), parse("1xcpu")), resolve(tiny(), parse("8xh100"))
    execution = {k for k in here.values if here.values[k] != there.values[k]}
    assert all(k.startswith("hardware.") or k.endswith("device_batch_size") for k in execution)


def test_an_older_plan_stays_in_force(tmp_path: Path) -> None:
    with open_run(tmp_path / "r"):
        pass
    path = tmp_path / "r" / "resolved.json"
    old = json.loads(path.read_text())
    old["values"]["base.matrix_lr"] = 0.123  # as another version's table had it
    path.write_text(json.dumps(old))
    with open_run(tmp_path / "r") as run:
        assert run.values["base.matrix_lr"] == 0.123
        do_stage(run, "tokenizer")
        assert run.restart("base") == []
        assert run.values["base.matrix_lr"] == DEFAULTS.small_matrix_lr


def test_a_change_moves_only_what_depends_on_it(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
    path = tmp_path / "r" / "resolved.json"
    old = json.loads(path.read_text())
    old["values"]["base.matrix_lr"] = 0.123  # as another version's table had it
    path.write_text(json.dumps(old))
    with open_run(tmp_path / "r", changed(tiny(), "mid", tokens=4096)) as run:
        assert run.values["base.matrix_lr"] == 0.123
        assert run.values["mid.tokens"] == 4096 and run.values["mid.eval_every"] == 1
    with open_run(tmp_path / "r", changed(tiny(), "model", depth=3)) as run:
        assert run.model.num_hidden_layers == 3 and run.values["base.matrix_lr"] == 0.123


def test_restart_drops_the_stage_and_the_later_ones(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        for stage in ("tokenizer", "base", "mid", "sft"):
            do_stage(run, stage)
    other = changed(tiny(), "mid", tokens=4096)
    with open_run(tmp_path / "r", other) as run:
        assert run.restart("mid") == ["mid", "sft"]
        do_stage(run, "base")
        assert run.stage_state("mid", run.stage_parts("mid", data=DATA)) == "start"
        assert run.values["mid.tokens"] == 4096
        assert not run.stage_dir("sft").exists()
    assert Run.read(tmp_path / "r").asked == other


def test_a_second_process_is_refused_with_the_pid(tmp_path: Path) -> None:
    with open_run(tmp_path / "r"):
        script = (
            "import sys; from pathlib import Path; from tests.helpers_run import open_run\n"
            "from fledge.errors import UserError\n"
            "try:\n    open_run(Path(sys.argv[1]))\n"
            "except UserError as e:\n    print(e.why); sys.exit(7)\n"
        )
        here = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "r")],
            capture_output=True,
            text=True,
            cwd=here,
            env={**os.environ, "PYTHONPATH": f"{here / 'python'}{os.pathsep}{here}"},
            check=False,
        )
        assert done.returncode == 7, done.stderr
        assert str(os.getpid()) in done.stdout
        assert Run.read(tmp_path / "r").name == "tiny"  # looking is allowed
    with open_run(tmp_path / "r"):
        pass


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not a run directory"):
        open_run(tmp_path)
    assert tree(tmp_path) == {"thesis.tex"}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/fledge"])
def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / place)
    assert "--out" in caught.value.fix
    assert tree(tmp_path) == {"file"}


def test_a_full_disk_at_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        open_run(tmp_path / "deep" / "run")
    assert tree(tmp_path) == set()


def test_a_crash_between_write_and_rename_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert tree(tmp_path) == {"x.json"}


def test_what_kill_left_is_cleaned_at_the_next_opening(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "tokenizer")
        half = run.checkpoints_dir("base") / "step_000010.tmp"
        half.mkdir(parents=True)
        (half / "model.safetensors").write_text("half")
        (run.path / "resolved.json.tmp").write_text("{")
        aside = run.checkpoints_dir("base") / "step_000020.old.tmp"
        aside.mkdir()
        (aside / "config.json").write_text("{}")
    with open_run(tmp_path / "r") as run:
        found = tree(run.path)
        assert not any(name.endswith(".tmp") for name in found)
        # the killed process had moved it aside and not yet put the new one in its place
        assert "base/checkpoints/step_000020/config.json" in found


def test_atomic_directory_appears_whole_or_not(tmp_path: Path) -> None:
    target = tmp_path / "step"
    with pytest.raises(RuntimeError), files.atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert tree(tmp_path) == set()
    for text in ("1", "2"):
        with files.atomic_directory(target) as folder:
            (folder / "a").write_text(text)
        assert (target / "a").read_text() == text
    with (
        pytest.raises(UserError, match="disk is full"),
        files.atomic_directory(target) as folder,
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert (target / "a").read_text() == "2"
    assert tree(tmp_path) == {"step", "step/a"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_small_file_system_that_is_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        with pytest.raises(UserError, match="disk is full"):
            files.write_bytes(tmp_path / "big", b"x" * 200_000)
        assert tree(tmp_path) == set()
        with pytest.raises(UserError, match="not enough disk space"):
            files.require_free_bytes(tmp_path, 10**9)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_latest_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path / "r") as run:
        assert run.latest_checkpoint("base") is None and run.last_model() is None
        write_checkpoint(run, "base", 10)
        newest = write_checkpoint(run, "base", 20)
        assert run.latest_checkpoint("base") == newest
        assert run.last_model() == ("base", newest)
        (newest / "config.json").unlink()
        newest.rmdir()
        with pytest.raises(UserError, match="missing"):
            run.latest_checkpoint("base")


@pytest.mark.parametrize("name", ["resolved.json", "base/stage.json"])
def test_damaged_records_are_user_errors(tmp_path: Path, name: str) -> None:
    with open_run(tmp_path / "r") as run:
        do_stage(run, "base")
    (tmp_path / "r" / name).write_text("{ not json")
    with pytest.raises(UserError, match="damaged"):
        Run.read(tmp_path / "r").read_stage("base")


# -- fingerprints --------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=4), _json), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_fingerprint_ignores_order_and_time(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    assert fingerprint({k: value[k] for k in keys}) == fingerprint(value)
    with_times = value | dict.fromkeys(TIMING_KEYS, 1)
    assert without_timing(with_times) == without_timing(value)


@given(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), st.data())
@settings(max_examples=60, deadline=None)
def test_changed_keys_names_exactly_what_differs(old: dict[str, int], data: Any) -> None:
    new = data.draw(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)))
    named = {line.partition(":")[0] for line in changed_keys({"values": old}, {"values": new})}
    assert named == {k for k in {*old, *new} if old.get(k) != new.get(k)}


# -- metrics -------------------------------------------------------------------------------------


@given(st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_metrics_after_a_resume_equal_those_of_one_go(saved: int, died: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        once, twice = Path(folder) / "a" / "m.jsonl", Path(folder) / "b" / "m.jsonl"
        died = max(saved, died)

        def log(path: Path, first: int, last: int) -> None:
            with MetricsLog(path) as metrics:
                metrics.truncate_after(first)
                for step in range(first + 1, last + 1):
                    metrics.append({"step": step, "loss": 1 / step, "bad": float("nan")})

        log(once, 0, 12)
        log(twice, 0, died)
        with open(twice, "a") as file:
            file.write('{"step": 99, "lo')  # the line that kill cut short
        log(twice, saved, 12)
        assert twice.read_bytes() == once.read_bytes()
        assert read_metrics(once)[0]["bad"] is None


# -- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_only_asks(name: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        stop.raise_if_requested("nothing yet")
        signal.raise_signal(getattr(signal, name))
        assert stop.requested
        with pytest.raises(Interrupted):
            stop.raise_if_requested("base")
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_ctrl_c_stops_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_plan_of_is_json(tmp_path: Path) -> None:
    json.dumps(plan_of(tiny()).to_dict())
