"""fledge.tokenizer.compare: what is counted, and which other tokenizers are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.errors import UserError
from fledge.tokenizer import Tokenizer, compare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tokenizer.train(["low lower lowest " * 20], vocab_size=384).save(tmp_path / "mine")
    return tmp_path / "mine"


def test_counts_by_domain() -> None:
    texts = [("a", "two words"), ("b", "\u4e2d" * 30), ("a", "one")]
    domains = compare.measure(texts, {"bytes": lambda text: len(text.encode())})
    assert list(domains) == ["a", "b"]
    assert domains["a"].documents == 2 and domains["a"].words == 3
    assert domains["a"].fertility("bytes") == 12 / 3
    assert domains["a"].bytes_per_token("bytes") == 1.0
    assert domains["b"].fertility("bytes") is None  # no spaces, no words
    whole = compare.total(domains)
    assert (whole.documents, whole.bytes, whole.tokens["bytes"]) == (3, 102, 102)


def test_finds_named_files_and_those_in_home(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    home = tmp_path / "home"
    (home / "tokenizers").mkdir(parents=True)
    (home / "tokenizers" / "broken.json").write_text("{")
    (home / "tokenizers" / "theirs.tiktoken").write_bytes((folder / "vocab.tiktoken").read_bytes())
    others, notes = compare.find_others(home, [folder], pattern="qwen2")
    assert set(others) == {"mine", "theirs"}
    assert sum("tiktoken's cache does not hold" in note for note in notes) == 3
    assert any("broken.json is left out" in note for note in notes)
    text = "lowest <|bos|> lower"
    expected = len(Tokenizer.load(folder).encode(text))
    assert others["mine"](text) == others["theirs"](text) == expected


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00"])
def test_a_named_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"other\.json"):
        compare.find_others(tmp_path, [path])


def test_a_named_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tokenizer"):
        compare.find_others(tmp_path, [tmp_path / "nothing"])
