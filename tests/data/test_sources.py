"""Reading a person's own text: what becomes a document, the split, and every bad input."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fledge.data import text_files
from fledge.data.sources import Corpus, Texts, describe, open_corpus
from fledge.data.text_files import cut_text, find_files
from fledge.errors import UserError


def in_memory(corpus: Corpus) -> Texts:
    """The training documents of a corpus that is not in shards."""
    assert isinstance(corpus.train, Texts)
    return corpus.train


def prose(size: int, seed: int = 0) -> str:
    """About `size` characters of different short paragraphs."""
    rng = random.Random(seed)
    words = ["river", "stone", "walks", "under", "the", "old", "bridge", "and", "sings"]
    text = ""
    while len(text) < size:
        text += " ".join(rng.choices(words, k=40)) + ".\n\n"
    return text


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------- good inputs


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    texts = [prose(2000, seed) for seed in range(8)]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(lines) + zstd(b""))
    parquet.write_table(pyarrow.table({"id": range(8), "text": texts}), tmp_path / "d.parquet")
    (tmp_path / "e.jsonl").write_bytes(lines.replace(b'"text"', b'"content"').rstrip(b"\n"))
    folder = tmp_path / "folder"
    for i, text in enumerate(texts):
        (folder / str(i)).mkdir(parents=True)
        (folder / str(i) / "x.TXT").write_text(text, encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.jsonl", "folder"):
        corpus = open_corpus(tmp_path / name)
        assert sorted([*in_memory(corpus), *corpus.val]) == sorted(texts), name
        assert corpus.notes == []
    everything = open_corpus(tmp_path)
    assert len(in_memory(everything)) + len(everything.val) == 8
    assert everything.notes == ["40 documents dropped: exact copies of others"]


def test_one_short_file_is_cut_so_that_there_is_validation_text(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text(prose(20_000), encoding="utf-8")
    corpus = open_corpus(path)
    assert len(corpus.val) == 1 and len(in_memory(corpus)) >= 2
    together = sorted(p for text in [*in_memory(corpus), *corpus.val] for p in text.split("\n\n"))
    assert together == sorted(prose(20_000).strip("\n").split("\n\n"))


def test_a_long_text_streams_into_documents_of_bounded_size(tmp_path: Path) -> None:
    text = prose(400_000)
    (tmp_path / "long.md").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    corpus = open_corpus(tmp_path / "long.md")
    lengths = [len(t) for t in [*in_memory(corpus), *corpus.val]]
    assert max(lengths) <= 16 * 1024 and sorted(lengths)[1] >= 4000
    everything = " ".join([*in_memory(corpus), *corpus.val])
    assert "\r" not in everything and "\ufeff" not in everything
    assert sorted(everything.split()) == sorted(text.split())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["word ", "\n", "\n\n", "x" * 3000, "é" * 500]), max_size=60))
def test_cutting_loses_nothing_but_blank_ends(parts: list[str]) -> None:
    text = "".join(parts)
    pieces = cut_text(text)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "") or not text.strip()
    assert all(0 < len(piece) <= 16 * 1024 for piece in pieces)


def test_multibyte_characters_survive_chunk_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 7)
    text = "".join(f"naïve — 世界 {i}\r\n" for i in range(900))
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_jsonl(tmp_path / "b.jsonl", [{"text": text.replace("\r", "")}])
    for name in ("a.txt", "b.jsonl"):
        corpus = open_corpus(tmp_path / name)
        assert "".join(sorted([*in_memory(corpus), *corpus.val])).count("世界") == 900


def test_split_and_order_follow_from_content_and_seed(tmp_path: Path) -> None:
    rows = [{"text": prose(300, seed)} for seed in range(300)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1])
    one = open_corpus(tmp_path / "a.jsonl", seed=3, val_fraction=0.1)
    two = open_corpus(tmp_path / "b.jsonl", seed=3, val_fraction=0.1)
    other = open_corpus(tmp_path / "a.jsonl", seed=4, val_fraction=0.1)
    assert list(in_memory(one)) == list(in_memory(two)) and list(one.val) == list(two.val)
    assert 10 <= len(one.val) <= 60 and len(one.val) + len(in_memory(one)) == 300
    assert not set(one.val) & set(in_memory(one))
    assert set(one.val) != set(other.val)
    assert list(in_memory(one)[:3]) == [in_memory(one)[0], in_memory(one)[1], in_memory(one)[2]]
    assert in_memory(one).bytes + one.val.bytes == sum(len(r["text"].encode()) for r in rows)
    assert len(open_corpus(tmp_path / "a.jsonl", val_fraction=0.0).val) == 1
    assert len(open_corpus(tmp_path / "a.jsonl", val_fraction=1.0).train) == 1


def test_max_bytes_stops_the_reading_and_says_so(tmp_path: Path) -> None:
    for i in range(10):
        write_jsonl(tmp_path / f"{i}.jsonl", [{"text": prose(5000, 10 * i + j)} for j in range(4)])
    corpus = open_corpus(tmp_path, max_bytes=50_000)
    assert 50_000 <= in_memory(corpus).bytes + corpus.val.bytes < 60_000
    assert len(corpus.manifest()) == 3
    assert corpus.notes == ["read 50.4 MB from 3 of 10 files, then stopped: data.max_bytes"] or (
        "then stopped" in corpus.notes[0]
    )
    names = [name for name, _, _ in corpus.manifest()]
    assert names == sorted(names)


def test_manifest_names_bytes_and_hash(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text(prose(12_000), encoding="utf-8")
    (name, size, digest) = open_corpus(tmp_path).manifest()[0]
    assert (name, size, len(digest)) == ("sub/a.txt", (tmp_path / "sub/a.txt").stat().st_size, 64)
    before = open_corpus(tmp_path).manifest()
    os.utime(tmp_path / "sub" / "a.txt", (1, 1))
    assert open_corpus(tmp_path).manifest() == before


def test_what_is_passed_over_is_noted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(12_000)}, {"text": ""}, {"text": "a\ud800"}])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / "Makefile").write_bytes(b"all:")
    (tmp_path / ".hidden.txt").write_bytes(b"\xff")
    corpus = open_corpus(tmp_path)
    assert sorted(len(t) for t in [*in_memory(corpus), *corpus.val])[0] == 2
    notes = "; ".join(corpus.notes)
    assert "2 files skipped" in notes and ".png: 1" in notes and "no suffix: 1" in notes
    assert "empty documents left out" in notes and "empty.txt" in notes and "U+FFFD" in notes


def test_the_size_of_a_corpus_is_what_trains(tmp_path: Path) -> None:
    texts = [{"text": f"{i} " + prose(2000)} for i in range(20)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = open_corpus(tmp_path, val_fraction=0.1)
    size = corpus.size()
    assert size["documents"] == 20 - len(corpus.val)
    assert size["bytes"] == sum(len(t.encode()) for t in in_memory(corpus))


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text(prose(12_000), encoding="utf-8")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "real")
    assert [f.relative for f in find_files(tmp_path / "folder")[0]] == ["link/a.txt"]


def test_describe_counts(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"text": "é"}, {"text": "abcd"}])
    told = describe(tmp_path)
    assert (told["files"], told["documents"], told["text_bytes"]) == (1, 3, 8)
    assert told["document_bytes"] == {"shortest": 2, "median": 2, "longest": 4}
    json.dumps(told)


# ------------------------------------------------------------------------------------ bad inputs


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        open_corpus(path)
    assert all([caught.value.what, caught.value.why, caught.value.fix])
    return caught.value


def test_missing_path(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere").what


def test_empty_folder_and_no_usable_file(tmp_path: Path) -> None:
    assert "empty" in refused(tmp_path).why
    (tmp_path / "a.pdf").write_bytes(b"x")
    assert "it holds 1 files" in refused(tmp_path).why
    assert "not a kind of file" in refused(tmp_path / "a.pdf").what


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert "holds 1 bytes of text" in refused(tmp_path / "a.txt").what
    assert "holds 1 bytes of text" in refused(tmp_path).what
    (tmp_path / "a.txt").write_text("x" * 65_536)
    assert "over and over" in refused(tmp_path).what


def test_invalid_utf8_names_file_and_byte(tmp_path: Path) -> None:
    good = ("é" * 100).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\xff" + good)
    error = refused(tmp_path)
    assert "a.txt" in error.what and error.why == "byte 200 is 0xff"
    (tmp_path / "a.txt").write_bytes(good + b"\xc3")  # cut inside a character
    assert refused(tmp_path).why == "byte 200 is 0xc3"


def test_invalid_utf8_in_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    error = refused(tmp_path)
    assert error.what.endswith("a.jsonl:2 is not valid UTF-8") and "0xff" in error.why


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst", "a.txt.zst"])
def test_truncated_and_false_archives(tmp_path: Path, name: str) -> None:
    data = "".join(json.dumps({"text": prose(50_000, i)}) + "\n" for i in range(5)).encode()
    packed = gzip.compress(data) if name.endswith(".gz") else zstd(data)
    for content in (packed[: len(packed) // 2], packed[:-2], b"this is no archive at all"):
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path / name)
        assert "damaged or cut short" in error.what and name in error.what


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": ', "a.jsonl:2 is not valid JSON"),
        ("[" * 100_000, "a.jsonl:2 is not valid JSON"),
        ('["text"]', "a.jsonl:2 is a JSON list, not an object"),
        ('{"body": "x"}', "a.jsonl:2 has no field `text` or `content`"),
        ('{"text": 5}', "a.jsonl:2: `text` is int, not a string"),
        ('{"text": null}', "a.jsonl:2: `text` is NoneType, not a string"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert refused(tmp_path / "a.jsonl").what.endswith(what)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet")
    assert "not a readable Parquet file" in refused(path).what
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert "no column `text`" in refused(path).what
    parquet.write_table(pyarrow.table({"text": [1]}), path)
    assert "is int64, not string" in refused(path).what
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "not a readable Parquet file" in refused(path).what


def test_link_loops(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert "contains it" in refused(tmp_path).what
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert "leads back to itself" in refused(tmp_path / "self.txt").what


def test_broken_link(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    assert "gone.txt" in refused(tmp_path).what


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(prose(12_000))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "cannot read" in refused(path).what
