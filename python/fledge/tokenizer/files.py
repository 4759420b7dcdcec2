"""The folder of a tokenizer: written for Hugging Face and tiktoken, read back by us.

    tokenizer.json          what HF `tokenizers` and transformers load; the only file we read
    tokenizer_config.json   bos, eos, pad and the chat template for transformers
    chat_template.jinja     the chat format, byte for byte that of chat.py
    vocab.tiktoken          base64(token) rank, one line each, as tiktoken has it

Every file is written whole or not at all. `fledge.tokenizer.bpe` calls this; nothing here encodes
text. No pickle.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from fledge import files
from fledge.errors import UserError
from fledge.tokenizer.reference import CUSTOM, NUM_BYTES, PATTERNS, merge_pair, pattern_regex

MAX_FILE_BYTES = 1 << 28  # a tokenizer.json of a million tokens has about 60 MB


@dataclass(frozen=True)
class Vocabulary:
    """Everything that makes two tokenizers the same."""

    merges: tuple[tuple[int, int], ...]
    pattern: str
    special_tokens: tuple[str, ...]
    vocab_size: int

    @property
    def num_ordinary_tokens(self) -> int:
        """Bytes and merges."""
        return NUM_BYTES + len(self.merges)

    def added_tokens(self) -> dict[str, int]:
        """Text -> id of the tokens beside the BPE: reserved padding, then the special tokens."""
        first, last = self.num_ordinary_tokens, self.vocab_size - len(self.special_tokens)
        reserved = [f"<|reserved_{i}|>" for i in range(last - first)]
        return {text: first + i for i, text in enumerate([*reserved, *self.special_tokens])}

    def token_bytes(self) -> list[bytes]:
        """The bytes of every ordinary token, by id."""
        tokens = [bytes([b]) for b in range(NUM_BYTES)]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        return tokens


def byte_characters() -> list[str]:
    """The visible character that stands for each byte in tokenizer.json (GPT-2's alphabet).

    Printable Latin-1 stands for itself; the others take the characters from U+0100 on in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(NUM_BYTES)]


def chat_template() -> str:
    """The chat format as a Jinja template."""
    return (resources.files("fledge.tokenizer") / "chat_template.jinja").read_text("utf-8")


def save(folder: Path, vocabulary: Vocabulary, *, bos: str, eos: str, pad: str) -> None:
    """Writes the four files of a tokenizer into `folder`, each at once or not at all."""
    with files.refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
    template = chat_template()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    tiktoken = "".join(
        f"{base64.b64encode(token).decode()} {rank}\n"
        for rank, token in enumerate(vocabulary.token_bytes())
    )
    files.write_text(folder / "vocab.tiktoken", tiktoken)
    files.write_text(folder / "chat_template.jinja", template)
    files.write_json(folder / "tokenizer_config.json", config)
    files.write_json(folder / "tokenizer.json", tokenizer_json(vocabulary, bos=bos))


def tokenizer_json(vocabulary: Vocabulary, *, bos: str) -> dict[str, Any]:
    """The dict that HF `tokenizers` loads to give the same ids.

    `encode(text)` there puts bos in front; `encode(text, add_special_tokens=False)` is our encode.
    """
    characters = byte_characters()
    names = ["".join(characters[b] for b in token) for token in vocabulary.token_bytes()]
    added = vocabulary.added_tokens()
    bos_piece = {"SpecialToken": {"id": bos, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, i in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern_regex(vocabulary.pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_piece, sequence],
            "pair": [bos_piece, sequence, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [added[bos]], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [f"{names[left]} {names[right]}" for left, right in vocabulary.merges],
        },
    }


def load(folder: Path) -> Vocabulary:
    """The vocabulary of a folder that `save` wrote.

    Raises UserError that says where a file is malformed or not of our kind.
    """
    path = folder / "tokenizer.json"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise malformed(path, f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
        tables = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no tokenizer in {folder}",
            "it has no file tokenizer.json",
            "give the folder of a run's tokenizer or of a checkpoint",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise malformed(path, str(error)) from None
    try:
        return _vocabulary_from_json(tables, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise malformed(path, f"missing or misplaced {error}") from None


def _vocabulary_from_json(tables: dict[str, Any], path: Path) -> Vocabulary:
    model = tables["model"]
    vocab: dict[str, int] = model["vocab"]
    if model["type"] != "BPE" or sorted(vocab.values()) != list(range(len(vocab))):
        raise malformed(path, "model.vocab is not a BPE vocabulary with ids from 0 without gaps")
    characters = byte_characters()
    for byte, character in enumerate(characters):
        if vocab.get(character) != byte:
            raise malformed(path, f"byte {byte} does not have the id {byte}")
    merges = []
    for i, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        new = NUM_BYTES + i
        if not (vocab.get(left, new) < new and vocab.get(right, new) < new):
            raise malformed(path, f"merge {i} {merge!r} uses a token that comes later or never")
        if vocab.get(left + right) != new:
            raise malformed(path, f"merge {i} {merge!r} does not make token {new}")
        merges.append((vocab[left], vocab[right]))
    if len(vocab) != NUM_BYTES + len(merges):
        raise malformed(path, f"{len(vocab)} tokens do not fit {len(merges)} merges")
    added = sorted((token["id"], token["content"]) for token in tables["added_tokens"])
    if [i for i, _ in added] != list(range(len(vocab), len(vocab) + len(added))):
        raise malformed(path, "the ids of added_tokens do not follow those of the vocabulary")
    special = [text for _, text in added]
    while special and special[0] == f"<|reserved_{len(added) - len(special)}|>":
        del special[0]
    return Vocabulary(
        tuple(merges), _pattern_name(tables, path), tuple(special), len(vocab) + len(added)
    )


def _pattern_name(tables: dict[str, Any], path: Path) -> str:
    regex = tables["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    for name, published in PATTERNS.items():
        if regex == published:
            return name
    return CUSTOM + regex


def load_tiktoken(path: Path) -> list[bytes]:
    """The tokens of a tiktoken file in the order of their ranks.

    Raises UserError that names the line: no `base64 rank`, a token or rank twice, a gap in the
    ranks, a byte that is missing.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise malformed(path, f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise malformed(path, str(error)) from None
    tokens: dict[int, bytes] = {}
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except ValueError:
            raise malformed(path, f"line {number} is not a token in base64 and a rank") from None
        if not token or rank < 0:
            raise malformed(path, f"line {number} has an empty token or a rank below 0")
        if rank in tokens:
            raise malformed(path, f"line {number}: rank {rank} occurs twice")
        if token in ranks:
            raise malformed(path, f"line {number}: {token!r} is token {ranks[token]} already")
        tokens[rank], ranks[token] = token, rank
    missing = next((rank for rank in range(len(tokens)) if rank not in tokens), None)
    if missing is not None:
        raise malformed(path, f"rank {missing} is missing, and there are {len(tokens)} tokens")
    absent = next((b for b in range(NUM_BYTES) if bytes([b]) not in ranks), None)
    if absent is not None:
        raise malformed(path, f"the byte {absent} is not among its tokens")
    return [tokens[rank] for rank in range(len(tokens))]


def merges_of(tokens: list[bytes], path: Path) -> list[tuple[int, int]]:
    """The merges that made `tokens`, of a vocabulary that training made: bytes first, in order.

    A token's merge joins the two parts that the earlier merges leave of it. Raises UserError where
    they leave more, or where the bytes stand in another order (as in OpenAI's own files).
    """
    ids: dict[tuple[int, int], int] = {}
    for i, token in enumerate(tokens):
        if i < NUM_BYTES:
            if token != bytes([i]):
                raise malformed(path, f"byte {i} does not have the rank {i}, as in ours")
            continue
        parts = list(token)
        while len(parts) > 2:
            pairs = set(pairwise(parts))
            best = min(pairs, key=lambda pair: ids.get(pair, i))
            if best not in ids:
                break
            parts = merge_pair(parts, best, ids[best])
        if len(parts) != 2 or (parts[0], parts[1]) in ids:
            raise malformed(path, f"no earlier tokens make token {i}, {token!r}")
        ids[parts[0], parts[1]] = i
    return list(ids)


def malformed(path: Path, why: str) -> UserError:
    """The error for a file of a tokenizer that cannot be one."""
    return UserError(
        f"{path} is not a tokenizer that fledge can load",
        why,
        "copy the file again, or train again with `fledge run ... --restart tokenizer`",
    )
