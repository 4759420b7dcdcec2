"""The command line: exit codes, three-part errors, suggestions, help texts frozen as golden files.

FLEDGE_UPDATE_GOLDEN=1 writes the golden files anew; the diff is then reviewed like code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fledge import cli, config
from fledge.cli_overrides import override
from fledge.errors import Interrupted, UserError
from tests.helpers_run import finished_run

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(words)
    out = capsys.readouterr()
    return code, out.out, out.err


def check_golden(name: str, text: str, *, words_only: bool = False) -> None:
    """Compare with the stored file; `words_only` leaves argparse free to break lines."""
    path = GOLDEN / name
    if os.environ.get("FLEDGE_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    stored = path.read_text(encoding="utf-8")
    if words_only:
        text, stored = " ".join(text.split()), " ".join(stored.split())
    assert text == stored, (
        f"{name} changed; if meant, FLEDGE_UPDATE_GOLDEN=1 pytest tests/test_cli.py"
    )


def plain(text: str) -> str:
    """argparse of Python 3.13 writes "-p, --prompt PROMPT" where 3.11 repeats the word."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return re.sub(r"(-\w) ([A-Z_]+), (--[\w-]+) \2", r"\1, \3 \2", text)


# -- golden --------------------------------------------------------------------------------------


def test_help_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    check_golden("help.txt", out)
    assert call(capsys)[1] == out


@pytest.mark.parametrize(
    "verb",
    [
        *("plan", "doctor", "eval", "chat", "serve", "report", "bench", "data", "tok"),
        *("data list", "data make", "data check", "data show", "data stats"),
        *("tok train", "tok eval", "tok encode", "tok decode"),
    ],
)
def test_help_of_a_verb_is_frozen(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    code, out, _ = call(capsys, *verb.split(), "--help")
    assert code == 0
    check_golden(f"help_{verb.replace(' ', '_')}.txt", plain(out), words_only=True)


def test_the_list_of_settings_is_frozen() -> None:
    import dataclasses

    lines = []
    for section, kind in config.SECTIONS.items():
        for field in dataclasses.fields(kind):
            key = f"{section}.{field.name}"
            mark = " (execution)" if key in config.EXECUTION_KEYS else ""
            lines.append(f"--{key} {field.type} = {field.default}{mark}")
    check_golden("settings.txt", "\n".join(lines) + "\n")


@pytest.mark.parametrize("recipe", ["tiny", "quickstart", "laptop"])
def test_the_plan_of_a_recipe_is_frozen(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", recipe, "--hardware", "2xcpu")
    assert code == 0
    check_golden(f"plan_{recipe}.txt", out)


def test_run_help_explains_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = call(capsys, "run", "--help")
    assert code == 0
    for key in ("--model.depth", "--base.matrix_lr", "--rl.steps", "--out", "built-in recipes"):
        assert key in out
    assert "the one dial" in out  # the docstring of the field


# -- speed ---------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from fledge.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'numpy', 'tyro', 'rich', 'matplotlib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    best = 9.0
    for _ in range(3):
        began = os.times()
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        ended = os.times()
        # of the processor, so that a busy machine is not a failure
        used = ended.children_user - began.children_user
        best = min(best, used + ended.children_system - began.children_system)
        assert done.stdout.splitlines()[-1] == "[]"
    assert best < 0.5


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["rnu"], "did you mean `fledge run`?"),
        (["run"], "the built-in ones are"),
        (["run", "tiyn"], "did you mean tiny?"),
        (["run", "tiny", "--model.depht", "3"], "did you mean --model.depth?"),
        (["run", "tiny", "--modle.depth", "3"], "did you mean --model.depth?"),
        (["run", "tiny", "--ouut", "x"], "did you mean --out?"),
        (["run", "tiny", "--model.depth", "deep"], "--model.depth"),
        (["run", "tiny", "--model.arch", "gpt5"], "qwen3"),
        (["run", "tiny", "--model.depth"], "--model.depth"),
        (["run", "laptop"], "--data.source PATH"),
        (["plan", "tiny", "--hardware", "8xh10"], "did you mean h100?"),
        (["plan", "tiny", "--model.depth", "0"], "larger number"),
        (["plan", "tiny", "--base.tokens", "-5"], "larger number"),
        (["plan", "tiny", "--tokenizer.vocab_size", "1000"], "1024"),
        (["plan", "tiny", "--model.head_dim", "48"], "divides"),
        (["plan", "tiny", "--mid.cooldown_fraction", "2"], "between 0 and 1"),
        (["chat", "/nowhere"], "fledge run quickstart"),
        (["report", "/nowhere"], "runs/quickstart"),
        (["eval", "."], "--max-examples"),
        (["data", "maek"], "did you mean make?"),
        (["tok", "encode", ".", "x"], "tok train"),
    ],
)
def test_a_users_mistake_is_three_parts_and_exit_1(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "eval":
        words = ["eval", ".", "--max-examples", "0"]
    code, out, err = call(capsys, *words)
    assert code == 1, err
    assert out == ""
    assert re.fullmatch(r"error: .+\n  why: .+\n  fix: .+\n", err), err
    assert hint in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "chat", "/nowhere", "--debug")
    assert code == 1 and "Traceback" in err and "error: there is no folder" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Interrupted("base, step 7"), 75, "run the same command again"),
        (KeyboardInterrupt(), 75, "run the same command again"),
        (ZeroDivisionError("x"), 2, "this is a bug"),
        (UserError("a", "b", "c"), 1, "fix: c"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.VERBS, "doctor", cli.Verb(fail, "", ""))
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", _WithFile(sys.stdout))
    assert cli.main(["doctor"]) == code
    assert words in capsys.readouterr().err


class _WithFile:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def fileno(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"'{sys.executable}' -m fledge plan quickstart --json | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0


# -- what reaches the functions ------------------------------------------------------------------


def test_what_is_typed_says_how_long_base_trains() -> None:
    minutes = config.load_recipe("laptop")[1]
    assert minutes.base.minutes == 5
    for word in ("--base.tokens", "--base.tokens-per-param"):
        base = override(minutes, [word, "4096"]).base
        assert base.minutes is None and 4096 in (base.tokens, base.tokens_per_param)
    tokens = override(minutes, ["--base.tokens=4096"])
    assert override(tokens, ["--base.minutes", "2"]).base.tokens is None
    both = override(minutes, ["--base.tokens", "4096", "--base.minutes", "2"]).base
    assert (both.tokens, both.minutes) == (4096, 2.0)  # the planner refuses that by name


def test_overrides_reach_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.depth=3", "--base.tokens", "None", "--evaluate.stages", "mid", "sft"]
    words += ["--mid.mixture", "facts", "1", "prose", "0.5", "--data.world", "village"]
    words += ["--rl.rewards", "answer", "1", "brief", "0.2", "--rl.files", "a.jsonl", "b.jsonl"]
    code, out, _ = call(capsys, "plan", "tiny", "--json", *words)
    assert code == 0
    plan = json.loads(out)
    assert plan["name"] == "tiny"
    assert plan["model"]["num_hidden_layers"] == 3
    assert plan["values"]["evaluate.stages"] == ["mid", "sft"]
    assert plan["values"]["rl.rewards"] == {"answer": 1.0, "brief": 0.2}
    assert plan["values"]["rl.files"] == ["a.jsonl", "b.jsonl"]
    assert plan["values"]["mid.mixture"] == {"facts": 1.0, "prose": 0.5}
    assert plan["values"]["base.tokens"] > 200_000  # the planner's, not the recipe's 131,072


def test_a_single_value_does_not_eat_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "--model.depth", "3", "tiny", "--json")
    assert code == 0 and json.loads(out)["model"]["num_hidden_layers"] == 3


def test_plan_of_a_depth(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "--depth", "24", "--hardware", "8xh100", "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["name"] == "depth 24"
    assert plan["estimates"]["dollars"] > 10


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert {"tier", "will_use", "missing", "rust_extension", "hardware"} <= set(found)
    assert [layer["name"] for layer in found["sandbox"]] == ["L0", "L1", "L2"]
    for layer in found["sandbox"]:
        assert (layer["median_ms"] is not None) is layer["holds"] is (layer["why"] is None)
    code, out, _ = call(capsys, "doctor")
    assert code == 0 and "will use" in out and "missing" in out
    assert "L0 calculator: holds" in out


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path / "r")
    code, out, _ = call(capsys, "report", str(run.path))
    assert code == 0 and out.startswith("# tiny: report")
    code, out, _ = call(capsys, "report", str(run.path), str(run.path))
    assert code == 0 and "B - A" in out


def test_data_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    code, out, _ = call(capsys, "data", "list", "--json")
    assert code == 0 and set(json.loads(out)["worlds"]) == {"almanac", "village"}


def test_tok_train_eval_encode_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("The cat sat on the mat. " * 400 + "Zürich!")
    out = str(tmp_path / "tok")
    code, _, err = call(capsys, "tok", "train", str(text), "--out", out, "--vocab-size", "384")
    assert code == 0, err
    code, printed, _ = call(capsys, "tok", "encode", out, "The cat <|bos|>")
    assert code == 0
    ids = printed.split()
    assert call(capsys, "tok", "decode", out, *ids)[1] == "The cat <|bos|>\n"
    code, printed, _ = call(capsys, "tok", "eval", out, str(text), "--json")
    result = json.loads(printed)
    assert result["documents_changed_by_a_round_trip"] == 0
    assert result["together"]["bytes_per_token"]["fledge"] > 1
    assert list(result["domains"]) == ["a"]
    assert call(capsys, "tok", "decode", out, "99999")[0] == 1
    assert call(capsys, "tok", "decode", out, "cat")[0] == 1
