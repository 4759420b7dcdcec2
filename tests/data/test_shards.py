"""A corpus in shards: every document once an epoch, in an order that can be found again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tests.helpers_hub import local_hub

from fledge import cli
from fledge.data import shards, sources
from fledge.data.shards import Shard, ShardedTexts, local_shards
from fledge.errors import UserError


def write_shard(path: Path, texts: list[str], *, group: int = 7) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=group)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, size in enumerate([60, 131, 7, 1]):
        texts = [f"shard {n} document {i}" for i in range(size)]
        write_shard(tmp_path / f"shard_{n:05d}.parquet", texts)
    return tmp_path


def test_every_epoch_holds_every_document_once_in_another_order(folder: Path) -> None:
    texts = ShardedTexts(local_shards(folder), seed=3)
    size = 60 + 131 + 7 + 1
    epochs = [[texts(e * size + i) for i in range(size)] for e in range(3)]
    assert [len(set(epoch)) for epoch in epochs] == [size] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [*texts.one_epoch()] == epochs[0]
    first_of_two = [text.split()[1] for text in epochs[0]]
    assert sorted(epochs[0]) == sorted(epochs[1])
    # inside a shard the documents of eight row groups are mixed, not read in the order of the file
    block = [t for t in epochs[0] if t.startswith("shard 1 ")][:56]
    numbers = [int(t.split()[-1]) for t in block]
    assert numbers != sorted(numbers)
    assert len({number // 7 for number in numbers[:20]}) > 3
    # a shard is read to its end before the next one begins
    assert len([1 for a, b in itertools.pairwise(first_of_two) if a != b]) == 3


def test_another_process_finds_document_i_again(folder: Path) -> None:
    first = ShardedTexts(local_shards(folder), seed=3)
    read = [first(i) for i in range(400)]
    second = ShardedTexts(local_shards(folder), seed=3)
    assert [second(i) for i in (377, 380, 12, 250)] == [read[i] for i in (377, 380, 12, 250)]
    other_seed = ShardedTexts(local_shards(folder), seed=4)
    assert [other_seed(i) for i in range(30)] != read[:30]


def test_memory_holds_a_few_windows_only(folder: Path) -> None:
    texts = ShardedTexts(local_shards(folder), seed=0)
    for i in range(900):
        texts(i)
    assert len(texts._windows) <= shards.KEPT
    assert len(texts._visits) <= shards.KEPT


def test_a_shard_is_fetched_when_it_is_reached_and_the_next_one_meanwhile(folder: Path) -> None:
    fetched: list[str] = []

    def asked(path: Path) -> Path:
        fetched.append(path.name)
        return path

    paths = sorted(folder.glob("*.parquet"))
    texts = ShardedTexts([Shard(p.name, lambda p=p: asked(p)) for p in paths], seed=3)
    texts(0)
    assert texts._fetching is not None
    texts._fetching[1].join()
    assert len(set(fetched)) == 2  # the first and the one after it, of four


def test_a_failure_of_the_fetch_ahead_is_told_when_the_shard_is_needed(folder: Path) -> None:
    good, bad = sorted(folder.glob("*.parquet"))[:2]

    def refuse() -> Path:
        raise UserError("the hub is gone", "no answer", "connect")

    texts = ShardedTexts([Shard("bad", refuse), Shard("good", lambda: good)], seed=3)
    with pytest.raises(UserError, match="the hub is gone"):
        for i in range(200):
            texts(i)
    assert bad


def test_a_damaged_shard_is_named(folder: Path) -> None:
    path = folder / "shard_00000.parquet"
    path.write_bytes(path.read_bytes()[:100])
    texts = ShardedTexts(local_shards(folder), seed=0)
    with pytest.raises(UserError, match=r"shard_00000\.parquet is not a readable Parquet file"):
        for i in range(200):
            texts(i)


def test_shards_without_rows(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [])
    with pytest.raises(UserError, match="hold no document"):
        ShardedTexts(local_shards(tmp_path), seed=0)(0)


def test_text_beyond_memory_is_written_as_shards_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sources, "DEFAULT_MAX_BYTES", 50_000)
    monkeypatch.setattr(sources, "SHARD_BYTES", 40_000)
    text = tmp_path / "text"
    text.mkdir()
    documents = [f"document {i} " + "word " * 40 for i in range(600)]
    for n in range(3):
        rows = documents[n * 200 : (n + 1) * 200] + documents[:1]  # one document three times
        lines = [json.dumps({"text": row}) for row in rows]
        (text / f"{n}.jsonl").write_text("\n".join(lines))
    told: list[str] = []
    corpus = sources.open_corpus(text, val_fraction=0.1, tell=told.append)
    assert isinstance(corpus.train, list) and len(corpus.train) == 3
    train = [*corpus.one_epoch(0)]
    assert sorted([*train, *corpus.val]) == sorted(documents)
    assert 30 < len(corpus.val) < 100
    assert any(
        "3 documents dropped" in note or "2 documents dropped" in note for note in corpus.notes
    )
    assert any("writing shards: file 3 of 3" in line for line in told)
    # the split is the one that the same text has in memory
    monkeypatch.setattr(sources, "DEFAULT_MAX_BYTES", 10_000_000)
    in_memory = sources.open_corpus(text, val_fraction=0.1)
    assert sorted(in_memory.val) == sorted(corpus.val)
    # the second time nothing is written
    monkeypatch.setattr(sources, "DEFAULT_MAX_BYTES", 50_000)
    told.clear()
    again = sources.open_corpus(text, val_fraction=0.1, tell=told.append)
    assert not any("writing" in line for line in told)
    assert [*again.one_epoch(0)] == train and again.manifest() == corpus.manifest()


def test_a_fault_while_writing_shards_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sources, "DEFAULT_MAX_BYTES", 1_000)
    text = tmp_path / "text"
    text.mkdir()
    good = json.dumps({"text": "word " * 400})
    (text / "a.jsonl").write_text("\n".join([good, "{broken"]))
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not valid JSON"):
        sources.open_corpus(text)
    assert not [*(tmp_path / "home" / "corpora").iterdir()]


def test_a_corpus_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    files = {"some/set/README.md": b"about"}
    for n in range(4):
        name = f"shard_{n:05d}.parquet"
        texts = [f"shard {n} document {i}" for i in range(50)]
        files[f"some/set/{name}"] = write_shard(tmp_path / "made" / name, texts)
    with local_hub(files, str(tmp_path / "home"), monkeypatch) as server:
        corpus = sources.open_corpus("hub:some/set")
        assert [*corpus.val] == [f"shard 3 document {i}" for i in range(50)]
        order = corpus.order("train", 0)
        assert len({order(i) for i in range(150)}) == 150
        assert len(server.paths()) == 4  # each file once
        assert corpus.manifest() == [["some/set", "0" * 40, 3]]
        assert "3 of 3 training shards" in corpus.notes[0]
        stored = sum(len(files[f"some/set/shard_{n:05d}.parquet"]) for n in range(3))
        assert corpus.size() == {"shards": 3, "stored_bytes": stored}
        two = sources.open_corpus("hub:some/set", max_bytes=2 * len(files["some/set/" + name]))
        assert len(two.train) == 2
    # the server is gone: what was fetched is enough
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    later = sources.open_corpus("hub:some/set")
    assert [later.order("train", 0)(i) for i in range(150)] == [order(i) for i in range(150)]


def test_a_hub_data_set_without_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    with (
        local_hub({"some/set/a.csv": b"1"}, str(tmp_path), monkeypatch),
        pytest.raises(UserError, match="0 Parquet files"),
    ):
        sources.open_corpus("hub:some/set")


def test_download_fetches_what_a_run_reads_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    files = {}
    for n in range(6):
        name = f"shard_{n:05d}.parquet"
        files[f"some/set/{name}"] = write_shard(tmp_path / name, [f"shard {n}"])
    with local_hub(files, str(tmp_path / "home"), monkeypatch) as server:
        assert cli.main(["data", "download", "hub:some/set", "--shards", "2"]) == 0
        assert [path[-13:] for path in server.paths()] == [
            "00005.parquet",
            "00000.parquet",
            "00001.parquet",
        ]
    assert len(capsys.readouterr().out.split()) == 2
    assert cli.main(["data", "download", str(tmp_path)]) == 1
    assert "is no corpus of the hub" in capsys.readouterr().err


def test_passes_count_shards_alike(folder: Path) -> None:
    texts = ShardedTexts(local_shards(folder), seed=3)
    assert texts.passes(0) == 0
    assert texts.passes(30) == 0.125 and texts.passes(60) == 0.25  # the first of four shards
    assert texts.passes(60 + 131 + 7) == 0.75 and texts.passes(199) == 1.0
    assert texts.passes(2 * 199) == 2.0
