"""The files of a tokenizer: saved and loaded equal, broken ones refused with the place."""

from __future__ import annotations

import base64
import json
import os

import pytest

from fledge.errors import UserError
from fledge.tokenizer import Tokenizer, files, reference

NAMES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.tiktoken"]


@pytest.mark.parametrize("pattern", reference.PATTERNS)
def test_saved_and_loaded_is_equal(texts, tmp_path, pattern):
    tok = Tokenizer.train(texts, vocab_size=520, pattern=pattern)
    tok.save(tmp_path / "a" / "b")
    again = Tokenizer.load(tmp_path / "a" / "b")
    assert again._vocabulary == tok._vocabulary
    assert [again.encode(t) for t in texts] == [tok.encode(t) for t in texts]
    assert again.special_tokens == tok.special_tokens
    again.save(tmp_path / "c")
    for name in NAMES:
        assert (tmp_path / "a/b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_nothing_but_the_files_is_left(tok, tmp_path):
    tok.save(tmp_path)
    tok.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES


def test_tiktoken_file(tok, tmp_path):
    tok.save(tmp_path)
    lines = (tmp_path / "vocab.tiktoken").read_text().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(tok.num_ordinary_tokens))
    assert tokens == [tok.token_bytes(i) for i in range(tok.num_ordinary_tokens)]


def test_config_names_the_control_tokens(tok, tmp_path):
    tok.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|bos|>", "<|assistant_end|>", "<|pad|>"
    )  # fmt: skip
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text()


def change(tables, where, value):
    *path, last = where
    for key in path:
        tables = tables[key]
    tables[last] = value


BROKEN = {
    "a missing byte": (("model", "vocab", "a"), 1000),
    "a merge of unknown tokens": (("model", "merges", 5), "q\u0120\u0120 zzz"),
    "a merge that makes another token": (("model", "merges", 0), "z z"),
    "a merge that is no pair": (("model", "merges", 0), "z"),
    "a gap in the special ids": (("added_tokens", 3, "id"), 5),
    "no model": (("model",), None),
    "another model": (("model", "type"), "Unigram"),
    "another split": (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), r"(\w+"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_malformed_files_are_refused(tok, tmp_path, what):
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tables = json.loads(path.read_text())
    change(tables, *BROKEN[what])
    path.write_text(json.dumps(tables))
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert "tokenizer.json" in caught.value.what


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_truncated_file_is_refused(tok, tmp_path):
    tok.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_missing_folder_and_huge_file(tok, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    tok.save(tmp_path)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_unwritable_place_is_a_user_error(tok, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError):
        tok.save(tmp_path / "file" / "tokenizer")
    assert os.listdir(tmp_path) == ["file"]


def test_a_custom_pattern_is_kept(texts, tmp_path):
    tok = Tokenizer.train(texts, vocab_size=400, pattern=r"regex:\w+|\s")
    tok.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.pattern == tok.pattern
    assert [again.encode(t) for t in texts] == [tok.encode(t) for t in texts]


def test_the_tiktoken_file_is_read_back(tok, texts, tmp_path):
    tok.save(tmp_path)
    again = Tokenizer.from_tiktoken(tmp_path / "vocab.tiktoken", tok.pattern)
    assert again.merges == tok.merges
    assert [again.encode(t) for t in texts] == [tok.encode(t) for t in texts]


TIKTOKEN = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "byte 0 is not among"),
        (TIKTOKEN[:-1], "byte 255 is not among"),
        ([*TIKTOKEN, "YWI= 255"], "line 257: rank 255 occurs twice"),
        ([*TIKTOKEN, "AA== 256"], "line 257: .* is token 0 already"),
        ([*TIKTOKEN, "YWI= 300"], "rank 256 is missing"),
        ([*TIKTOKEN, "YWI="], "line 257 is not"),
        ([*TIKTOKEN, "?? 256"], "line 257 is not"),
        ([*TIKTOKEN, "YWI= x"], "line 257 is not"),
        ([*TIKTOKEN, "YWI= -1"], "line 257 has"),
        ([*TIKTOKEN, "YWJj 256"], "no earlier tokens make token 256"),
        ([TIKTOKEN[0].replace(" 0", " 1"), TIKTOKEN[1].replace(" 1", " 0"), *TIKTOKEN[2:]],
         "byte 0 does not have"),
    ],
)  # fmt: skip
def test_malformed_tiktoken_files_are_refused(tmp_path, lines, message):
    path = tmp_path / "vocab.tiktoken"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        Tokenizer.from_tiktoken(path, "qwen2")
