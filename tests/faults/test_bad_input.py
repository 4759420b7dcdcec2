"""What users get wrong and what disks do: exit code 1, three parts, and nothing half-written.

Everything goes through the command line in this process. A user who may not write and a full disk
are real ones where this machine allows it (root and mount), else those tests skip.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fledge import cli, config, files
from tests.helpers_mini import (
    RECIPE,
    artefacts,
    assert_three_parts,
    differences,
    snapshot,
    write_recipe,
)

pytestmark = pytest.mark.timeout(900)
STORY = "The old man in the mill saw the river rise and told the children of the flood.\n"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Path:
    """A run up to mid, begun and not finished in mid; nobody may change it."""
    out = tmp_path_factory.mktemp("half") / "run"
    assert cli.main(["run", str(recipe), "--out", str(out), "--until", "mid"]) == 0
    record = json.loads((out / "mid" / "stage.json").read_text())
    record["status"] = "running"  # as after kill -9 in its last step
    (out / "mid" / "stage.json").write_text(json.dumps(record))
    return out


@pytest.fixture
def copy(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def refused(capsys: pytest.CaptureFixture[str], *words: object, says: str) -> str:
    """Run a command that must be refused; returns what it said."""
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    err = capsys.readouterr().err
    assert code == 1, err
    assert_three_parts(err)
    assert says in err, err
    return err


# -- the user's own text -------------------------------------------------------------------------


def story(folder: Path) -> Path:
    """A folder with enough good text beside what is bad."""
    folder.mkdir()
    for i in range(3):
        (folder / f"good{i}.txt").write_text(f"Chapter {i}.\n" + STORY * 100, encoding="utf-8")
    return folder


def lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"{i} {STORY}"}).encode() + b"\n" for i in range(count))


def zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def noise(size: int) -> bytes:
    """Text that does not compress, so that half an archive is really cut."""
    import random

    return random.Random(0).randbytes(size // 2).hex().encode()


BAD_TEXT: dict[str, tuple[Callable[[Path], object], str]] = {
    "invalid UTF-8": (
        lambda f: (f / "bad.txt").write_bytes(STORY.encode() * 9 + b"\xff\xfe" + STORY.encode()),
        "bad.txt is not valid UTF-8",
    ),
    "invalid UTF-8 in JSON": (
        lambda f: (f / "bad.jsonl").write_bytes(lines(2) + b'{"text": "\xff"}\n'),
        "bad.jsonl:3 is not valid UTF-8",
    ),
    "truncated gz": (
        lambda f: (f / "bad.txt.gz").write_bytes(gzip.compress(noise(90_000))[:20_000]),
        "bad.txt.gz is damaged or cut short",
    ),
    "gz that is none": (
        lambda f: (f / "bad.txt.gz").write_bytes(STORY.encode()),
        "bad.txt.gz is damaged or cut short",
    ),
    "truncated zst": (
        lambda f: (f / "bad.jsonl.zst").write_bytes(zstd(noise(90_000))[:20_000]),
        "bad.jsonl.zst is damaged or cut short",
    ),
    "truncated zst of lines": (
        lambda f: (f / "bad.jsonl.zst").write_bytes(zstd(lines(3000))[:-9]),
        "bad.jsonl.zst",
    ),
    "broken JSON line": (
        lambda f: (f / "bad.jsonl").write_bytes(lines(4) + b'{"text": "cut'),
        "bad.jsonl:5 is not valid JSON",
    ),
    "JSON that is no object": (
        lambda f: (f / "bad.jsonl").write_bytes(lines(1) + b"[1]\n"),
        "bad.jsonl:2",
    ),
    "no text in JSON": (
        lambda f: (f / "bad.jsonl").write_bytes(b'{"txt": "x"}\n'),
        "bad.jsonl:1 has no field",
    ),
    "broken parquet": (
        lambda f: (f / "bad.parquet").write_bytes(b"PAR1" + b"x" * 99),
        "bad.parquet",
    ),
    "link to nowhere": (lambda f: (f / "bad.txt").symlink_to(f / "gone"), "does not exist"),
}


@pytest.mark.parametrize("name", list(BAD_TEXT))
def test_bad_text_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = BAD_TEXT[name]
    source = story(tmp_path / "text")
    make(source)
    out = tmp_path / "deep" / "run"
    refused(capsys, "run", recipe, "--out", out, "--data.source", source, says=says)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("nothing", None, "no usable file"),
        ("other.pdf", b"%PDF", "no usable file"),
        ("one.txt", b"x", "1 bytes of text"),
        ("empty.txt", b"", "0 bytes of text"),
        ("blank.txt", b" \n" * 9000, "0 bytes of text"),
    ],
)
def test_a_folder_with_too_little(
    name: str,
    data: bytes | None,
    says: str,
    tmp_path: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = tmp_path / "text", tmp_path / "run"
    source.mkdir()
    if data is not None:
        (source / name).write_bytes(data)
    refused(capsys, "run", recipe, "--out", out, "--data.source", source, says=says)
    refused(capsys, "run", recipe, "--out", out, "--data.source", tmp_path / "no", says="no does")
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "facts.csv"),
        ("name,colour\n", "facts.csv"),
        ("name,colour\nfox,red\nfox,", "facts.csv"),
        ("name\nfox\n", "facts.csv"),
    ],
)
def test_a_bad_table_of_facts(
    text: str, says: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "facts.csv", tmp_path / "run"
    table.write_text(text)
    refused(capsys, "run", recipe, "--out", out, "--data.world", table, says=says)
    assert not out.exists()


def test_a_bad_file_of_conversations(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, out = tmp_path / "chats.jsonl", tmp_path / "run"
    chats.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": 3}\n')
    words = ("run", recipe, "--out", out, "--sft.files")
    refused(capsys, *words, chats, says="chats.jsonl:")
    refused(capsys, *words, tmp_path / "gone.jsonl", says="gone.jsonl")
    assert not out.exists()


# -- recipes and flags ---------------------------------------------------------------------------

BAD_RECIPES = {
    "broken TOML": ("[model\ndepth = 1", "is not valid TOML"),
    "no TOML at all": ("\x00\x01", "is not valid TOML"),
    "unknown section": (RECIPE.replace("[model]", "[modle]"), "did you mean model?"),
    "unknown key": (RECIPE.replace("depth", "dpeth"), "did you mean depth?"),
    "wrong type": (RECIPE.replace("depth = 1", 'depth = "one"'), "must be a whole number"),
    "a float for an integer": (RECIPE.replace("depth = 1", "depth = 1.5"), "a whole number"),
    "true for an integer": (RECIPE.replace("depth = 1", "depth = true"), "a whole number"),
    "a section as a value": ("model = 3\n", "is a section"),
    "not a number": (RECIPE + "[base]\nmatrix_lr = nan\n", "is not valid TOML"),  # twice [base]
    "infinite": (RECIPE.replace("tokens = 10_240", "matrix_lr = inf"), "base.matrix_lr = inf"),
    "negative": (RECIPE.replace("10_240", "-1"), "base.tokens = -1"),
    "enormous": (RECIPE.replace("depth = 1", "depth = 99_999"), "does not fit into the memory"),
    "enormous context": (RECIPE.replace("= 128", "= 1_000_000_000"), "base.global_batch_tokens"),
    "enormous step": (RECIPE.replace("10_240", "10" * 30), "base.tokens"),
    "enormous seed": (RECIPE + "[DEFAULT]", "DEFAULT"),
    "too many threads": (RECIPE.replace("threads = 1", "threads = 99_999"), "hardware.threads"),
    "no such device": (RECIPE + 'device = "warp"\n', "'warp' cannot be used"),
    "no such exam": (RECIPE.replace("samples = 2", 'tasks = ["world_fcats"]'), "mean world_facts?"),
    "no such stage": (RECIPE.replace("samples = 2", 'stages = ["stf"]'), "did you mean sft?"),
    "no such kind": (
        RECIPE.replace("tokens = 2048", "tokens = 2048\nmixture = { facst = 1.0 }"),
        "did you mean facts?",
    ),
    "no such world": (RECIPE.replace('"village"', '"vilage"'), "there is no world called"),
}


@pytest.mark.parametrize("name", list(BAD_RECIPES))
def test_a_bad_recipe_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = BAD_RECIPES[name]
    (tmp_path / "bad.toml").write_text(text)
    refused(capsys, "run", tmp_path / "bad.toml", "--out", tmp_path / "run", says=says)
    assert set(snapshot(tmp_path)) == {"bad.toml"}


def test_a_recipe_that_is_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    refused(capsys, "run", tmp_path / "bad.toml", says="cannot read the recipe")
    (tmp_path / "folder.toml").mkdir()
    refused(capsys, "run", tmp_path / "folder.toml", says="there is no recipe")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--until", "bass"), "there is no stage called 'bass'"),
        (("--restart", "everything"), "there is no stage called 'everything'"),
        (("--base.seed", str(2**70)), "it must fit in 64 bits"),
        (("--base.sed", "1"), "did you mean --base.seed?"),
        (("--mid.mixture", "fcats", "1"), "did you mean facts?"),
        (("--evaluate.tasks", "world_mth"), "did you mean world_math?"),
    ],
)
def test_bad_flags_leave_nothing(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused(capsys, "run", recipe, "--out", tmp_path / "run", *words, says=says)
    assert not (tmp_path / "run").exists()


# -- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below/run", "/proc/fledge", "/dev/null/run"])
def test_a_place_that_takes_no_run(
    place: str, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    refused(capsys, "run", recipe, "--out", tmp_path / place, says="--out DIR")
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_folder_of_something_else_stays_as_it_is(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("thesis.tex", "draft.tmp", "recipe.toml", "notes/old.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = snapshot(tmp_path)
    refused(capsys, "run", recipe, "--out", tmp_path, says="not a run directory")
    assert snapshot(tmp_path) == before
    for name in ("thesis.tex", "draft.tmp", "notes"):
        shutil.move(tmp_path / name, tmp_path.with_name(tmp_path.name + "-" + name))
    refused(capsys, "run", recipe, "--out", tmp_path, says="it holds recipe.toml")
    assert snapshot(tmp_path) == {"recipe.toml": b"mine"}


@contextlib.contextmanager
def somebody() -> Iterator[None]:
    """As a user without rights, because root may write everywhere."""
    if os.name != "posix" or os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.usefixtures("half")  # by then every module is imported, which somebody may not read
def test_a_folder_that_may_not_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = config.builtin_recipes()  # read before: the checkout may be closed to somebody
    monkeypatch.setattr(config, "builtin_recipes", lambda: known)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        recipe = write_recipe(place)
        (place / "mine").mkdir(mode=0o555)
        with somebody():
            for out in (place / "mine", place / "mine" / "run"):
                refused(capsys, "run", recipe, "--out", out, says="no permission")
        assert set(snapshot(place)) == {"mini.toml", "mine"}


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own; skips where it cannot be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_said_before_anything_is_done(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        refused(capsys, "run", recipe, "--out", disk / "run", says="not enough disk space")
        assert snapshot(disk) == {}


@pytest.mark.parametrize("kept", [0, 4096, 30_000, 150_000, 700_000, 1_300_000, 2_500_000])
@pytest.mark.parametrize("warned", [True, False], ids=["", "unforeseen"])
def test_a_disk_that_fills_up_on_the_way(
    kept: int,
    warned: bool,
    half: Path,
    tmp_path: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is left of the disk, the run stops in words, and goes on when there is space."""
    if not warned:  # as if another program took the space in the middle of a save
        monkeypatch.setattr(files, "require_free_bytes", lambda *_, **__: None)
    with small_disk(tmp_path / "disk", "64m") as disk:
        out = Path(shutil.copytree(half, disk / "run"))
        for stage in ("mid", "base"):
            shutil.rmtree(out / stage)  # as if only the tokenizer were done
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(max(0, free - kept)))
        said = refused(capsys, "run", recipe, "--out", out, says="fix: free some space")
        assert "disk" in said
        assert not list(out.rglob("*.tmp"))
        for folder in out.glob("*/checkpoints/*"):
            assert (folder / "train_state" / "SHA256SUMS").is_file(), "half a checkpoint"
        ballast.unlink()
        assert cli.main(["run", str(recipe), "--out", str(out), "--until", "mid"]) == 0
        assert json.loads((out / "base" / "stage.json").read_text())["status"] == "done"
        changed = differences(artefacts(half), artefacts(out))
        # the fixture's own edit, and what says that the run was stopped
        assert set(changed) <= {"mid/stage.json", "report.md", "report.html", "report.json"}


# -- damage --------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write(text: str | bytes) -> Callable[[Path], object]:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda path: path.write_bytes(data)


LAST = "mid/checkpoints/step_000008/"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit in the weights": (f"{LAST}model.safetensors", flip, "model.safetensors changed"),
    "half the weights": (f"{LAST}model.safetensors", cut, "model.safetensors changed"),
    "no weights": (f"{LAST}model.safetensors", Path.unlink, "model.safetensors is missing"),
    "a flipped bit in the state": (
        f"{LAST}train_state/optimizer-00001-of-1.safetensors",
        flip,
        "optimizer-00001-of-1.safetensors changed",
    ),
    "no file of a rank": (
        f"{LAST}train_state/optimizer-00001-of-1.safetensors",
        Path.unlink,
        "optimizer-00001-of-1.safetensors is missing",
    ),
    "another config": (f"{LAST}config.json", write("{}"), "config.json changed"),
    "no sums": (f"{LAST}train_state/SHA256SUMS", Path.unlink, "SHA256SUMS is missing"),
    "empty sums": (f"{LAST}train_state/SHA256SUMS", write(""), "does not name model.safetensors"),
    "sums of noise": (f"{LAST}train_state/SHA256SUMS", write(b"\xff\x00\n"), "is damaged"),
    "LATEST of nothing": ("mid/LATEST", write("step_000099\n"), "that folder is missing"),
    "LATEST of noise": ("mid/LATEST", write(b"\xff\xfe"), "that folder is missing"),
    "empty LATEST": ("mid/LATEST", write(""), "that folder is missing"),
    "half a stage.json": ("mid/stage.json", cut, "stage.json is damaged"),
    "a stage.json of nothing": ("mid/stage.json", write("[]"), "stage.json is damaged"),
    "an empty stage.json": ("base/stage.json", write(""), "stage.json is damaged"),
    "a stage.json without parts": (
        "base/stage.json",
        write('{"status": "done", "fingerprint": "x"}'),
        "stage.json is damaged",
    ),
    "half a resolved.json": ("resolved.json", cut, "resolved.json is damaged"),
    "a resolved.json of nothing": ("resolved.json", write("[]"), "resolved.json is damaged"),
    "a resolved.json of little": ("resolved.json", write('{"format": 1}'), "is damaged"),
    "a resolved.json of noise": ("resolved.json", write(b"\xff"), "resolved.json is damaged"),
    "a later format": ("resolved.json", write('{"format": 99}'), "another version of fledge"),
    "half a tokenizer": ("tokenizer/tokenizer.json", cut, "tokenizer.json is not a tokenizer"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named_and_nothing_is_changed(
    name: str, copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, damage, says = DAMAGE[name]
    damage(copy / file)
    before = snapshot(copy)
    refused(capsys, "run", recipe, "--out", copy, says=says)
    changed = differences(before, snapshot(copy))
    # that the stage was tried is on record
    allowed = {".lock", "mid/stage.json", "mid/log.txt", "mid/mixture.json"}
    assert set(changed) <= allowed, changed
    assert not list(copy.rglob("*.tmp"))


def test_the_fix_that_the_error_names_works(
    half: Path, copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy / LAST / "model.safetensors")
    err = refused(capsys, "run", recipe, "--out", copy, "--until", "mid", says="point LATEST at")
    assert str(copy / LAST.rstrip("/")) in err
    shutil.rmtree(copy / LAST)
    (copy / "mid" / "LATEST").write_text("step_000006\n")
    assert cli.main(["run", str(recipe), "--out", str(copy), "--until", "mid"]) == 0
    changed = differences(artefacts(half), artefacts(copy))
    # the fixture's own edit; and a checkpoint that was dropped does not come back
    allowed = {"mid/stage.json", "report.md", "report.html", "report.json"}
    assert set(changed) <= allowed, changed


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "gone"])
def test_chat_and_eval_of_a_damaged_model(
    damage: Callable[[Path], object], file: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy / LAST / file)
    for path in (copy, copy / LAST):
        refused(capsys, "chat", path, "-p", "hello", says="fix: ")
        refused(capsys, "eval", path, "--tasks", "world_mc", "--max-examples", 1, says="fix: ")


def test_a_metrics_line_that_is_cut_is_no_harm(
    copy: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(copy / "mid" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "lo\xff')
    assert cli.main(["run", str(recipe), "--out", str(copy), "--until", "mid"]) == 0
    assert (copy / "mid" / "metrics.jsonl").read_text().count("\n") == 8


# -- what is no model and no run -----------------------------------------------------------------


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("x")
    for words in (("chat", tmp_path, "-p", "hi"), ("eval", tmp_path), ("eval", tmp_path / "x")):
        refused(capsys, *words, says="fledge run")
    refused(capsys, "report", tmp_path, says="is not a run directory")
    refused(capsys, "report", tmp_path / "gone", says="there is no such folder")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    refused(capsys, "chat", tmp_path, "-p", "hi", says="fix: ")
    assert set(snapshot(tmp_path)) == {"x.txt", "config.json"}


def test_eval_with_a_task_that_does_not_exist(
    half: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLEDGE_DATA", raising=False)
    refused(capsys, "eval", half, "--tasks", "world_mc,wrld_math", says="did you mean world_math?")
    folder = half / LAST
    alone = half.parent / "alone"
    if not alone.exists():
        shutil.copytree(folder, alone)
    refused(capsys, "eval", alone, "--tasks", "gsm9k", says="did you mean gsm8k?")
    refused(capsys, "eval", alone, says="nothing to examine")


def test_a_run_without_a_model(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["run", str(recipe), "--out", str(out), "--until", "tokenizer"]) == 0
    before = snapshot(out)
    refused(capsys, "chat", out, "-p", "hi", says="no trained model yet")
    refused(capsys, "eval", out, says="no trained model yet")
    assert snapshot(out) == before
