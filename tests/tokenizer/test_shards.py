"""fledge.tokenizer.training: a training that is stopped goes on, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fledge.errors import UserError
from fledge.tokenizer import Tokenizer, bpe
from fledge.tokenizer.training import STATE_FOLDER, Shard, train_from_shards

pytestmark = pytest.mark.skipif(
    not hasattr(bpe.engine(), "Counter"), reason="the Rust module is not built"
)

WORDS = ["plum", "plums", "slum", "lump", "lumber", "number", "umbrella"]


def shards_in(folder: Path) -> list[Shard]:
    def shard(path: Path) -> Shard:
        return Shard(path.name, path, lambda: [path.read_text()])

    return [shard(path) for path in sorted(folder.glob("*.txt"))]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(5):
        words = [word for i, word in enumerate(WORDS) for _ in range(1 + (i * number) % 4)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def train(shards: list[Shard], out: Path, **options) -> Tokenizer:
    return train_from_shards(shards, out, **{"vocab_size": 384, "pattern": "qwen2"} | options)


class Stopped(Exception):
    pass


def stop_after(shards: list[Shard], number: int) -> list[Shard]:
    """The same shards, but reading the one of that number is interrupted."""

    def interrupted() -> list[str]:
        raise Stopped

    broken = Shard(shards[number].name, shards[number].path, interrupted)
    return [*shards[:number], broken, *shards[number + 1 :]]


def test_equals_training_in_one_go_and_leaves_no_state(texts: Path, tmp_path: Path) -> None:
    shards = shards_in(texts)
    tokenizer = train(shards, tmp_path / "out")
    whole = Tokenizer.train([path.read_text() for path in texts.iterdir()], 384)
    assert tokenizer.merges == whole.merges
    assert Tokenizer.load(tmp_path / "out").merges == whole.merges
    assert not (tmp_path / "out" / STATE_FOLDER).exists()


def test_goes_on_where_it_stopped(texts: Path, tmp_path: Path) -> None:
    shards, out = shards_in(texts), tmp_path / "out"
    with pytest.raises(Stopped):
        train(stop_after(shards, 3), out, save_every=0)
    read: list[str] = []

    def watched(shard: Shard) -> Shard:
        def texts() -> list[str]:
            read.append(shard.name)
            return list(shard.texts())

        return Shard(shard.name, shard.path, texts)

    notes: list[str] = []
    # in another order: counts do not depend on it
    again = train([watched(s) for s in reversed(shards)], out, note=notes.append)
    assert sorted(read) == ["3.txt", "4.txt"]
    assert notes == ["going on: 3 of 5 files are counted already"]
    assert again.merges == train(shards, tmp_path / "other").merges


def test_progress_reaches_the_end(texts: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, float, float]] = []
    train(shards_in(texts), tmp_path / "out", report=lambda *told: heard.append(told))
    counted = [told for told in heard if told[0] == "count"]
    assert [done for _, done, _ in counted] == sorted(done for _, done, _ in counted)
    assert counted[-1][1] == counted[-1][2] == sum(p.stat().st_size for p in texts.iterdir())
    assert heard[-1][0] == "merge"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out, texts: (texts / "0.txt").write_text("other"), "missing or has changed"),
        (lambda out, texts: (out / "state.json").write_text("{"), "cannot be read"),
        (lambda out, texts: (out / "state.json").write_text("[]"), "cannot be read"),
        (lambda out, texts: next(out.glob("counts-*")).write_bytes(b"\x00"), "cannot be read"),
        (lambda out, texts: next(out.glob("counts-*")).unlink(), "cannot be read"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_kept(
    texts: Path, tmp_path: Path, damage, message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        train(stop_after(shards_in(texts), 2), out, save_every=0)
    damage(out / STATE_FOLDER, texts)
    with pytest.raises(UserError, match=message):
        train(shards_in(texts), out)
    assert (out / STATE_FOLDER / "state.json").exists()


def test_another_pattern_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stop_after(shards_in(texts), 2), tmp_path / "out", save_every=0)
    with pytest.raises(UserError, match="--pattern qwen2"):
        train(shards_in(texts), tmp_path / "out", pattern="llama3")


def test_a_state_names_whole_counts_only(texts: Path, tmp_path: Path) -> None:
    state = tmp_path / "out" / STATE_FOLDER
    with pytest.raises(Stopped):
        train(stop_after(shards_in(texts), 4), tmp_path / "out", save_every=0)
    saved = json.loads((state / "state.json").read_text())
    assert (state / saved["counts"]).exists() and len(saved["done"]) == 4
    assert len(list(state.glob("counts-*"))) == 1


def test_nothing_to_learn_from_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "0.txt").write_text("")
    with pytest.raises(UserError, match="no text to learn from"):
        train(shards_in(tmp_path / "texts"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stop_before_the_first_save_leaves_nothing(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(stop_after(shards_in(texts), 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()
