"""How well tokenizers compress text: bytes per token and tokens per word, domain by domain.

`fledge tok eval` measures a tokenizer of ours beside those found on this machine: GPT-2, GPT-4 and
GPT-4o where tiktoken's cache holds them, and every `tokenizer.json` or tiktoken file that is named
or lies in FLEDGE_HOME/tokenizers. A tokenizer.json is counted by its own library, so a difference
is theirs and not ours; a tiktoken file by our engine, whose ids are tested equal to tiktoken's with
the same ranks. Nothing here trains, writes or reaches the network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fledge.errors import UserError
from fledge.tokenizer.bpe import engine
from fledge.tokenizer.files import load_tiktoken

Count = Callable[[str], int]  # text -> number of tokens, special tokens as plain text

_WORD = re.compile(r"\S+")
_SPACELESS = 20  # mean characters of a "word" above which a script does not divide words by spaces

# name -> (tiktoken's encoding, the files that it keeps under the sha1 of their address;
# openai/tiktoken, tiktoken_ext/openai_public.py and tiktoken/load.py)
_PUBLIC = "https://openaipublic.blob.core.windows.net"
_TIKTOKEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "GPT-2": (
        "gpt2",
        (
            f"{_PUBLIC}/gpt-2/encodings/main/vocab.bpe",
            f"{_PUBLIC}/gpt-2/encodings/main/encoder.json",
        ),
    ),
    "GPT-4": ("cl100k_base", (f"{_PUBLIC}/encodings/cl100k_base.tiktoken",)),
    "GPT-4o": ("o200k_base", (f"{_PUBLIC}/encodings/o200k_base.tiktoken",)),
}
# a tiktoken file does not name its pattern; these names are known, others get --pattern's
_FILE_PATTERNS = {"cl100k_base": "llama3", "o200k_base": "o200k"}


@dataclass
class Domain:
    """What was counted in one domain; `tokens` by tokenizer."""

    bytes: int = 0
    characters: int = 0
    words: int = 0
    documents: int = 0
    tokens: dict[str, int] = field(default_factory=dict)

    def bytes_per_token(self, name: str) -> float:
        """UTF-8 bytes that one token stands for; more is better."""
        return self.bytes / max(1, self.tokens[name])

    def fertility(self, name: str) -> float | None:
        """Tokens per word between spaces; None where words are not written with spaces."""
        if not self.words or self.characters / self.words > _SPACELESS:
            return None
        return self.tokens[name] / self.words


def measure(texts: Iterable[tuple[str, str]], encoders: dict[str, Count]) -> dict[str, Domain]:
    """Counts (domain, text) pairs with every encoder; domains in the order of their first text."""
    domains: dict[str, Domain] = {}
    for name, text in texts:
        domain = domains.setdefault(name, Domain(tokens=dict.fromkeys(encoders, 0)))
        domain.documents += 1
        domain.bytes += len(text.encode("utf-8", "replace"))
        domain.characters += len(text)
        domain.words += sum(1 for _ in _WORD.finditer(text))
        for encoder, count in encoders.items():
            domain.tokens[encoder] += count(text)
    return domains


def total(domains: dict[str, Domain]) -> Domain:
    """All domains together."""
    whole = Domain()
    for domain in domains.values():
        whole.bytes += domain.bytes
        whole.characters += domain.characters
        whole.words += domain.words
        whole.documents += domain.documents
        for name, tokens in domain.tokens.items():
            whole.tokens[name] = whole.tokens.get(name, 0) + tokens
    return whole


def find_others(
    home: Path, named: Iterable[Path] = (), *, pattern: str = "llama3"
) -> tuple[dict[str, Count], list[str]]:
    """The other tokenizers of this machine, by name, and a note for each that is not here.

    `home` is FLEDGE_HOME; `pattern` splits for a tiktoken file whose name says nothing. Raises
    UserError for a named file that cannot be read; an unreadable one in `home` gives a note.
    """
    found: dict[str, Count] = {}
    notes: list[str] = []
    for name, (encoding, addresses) in _TIKTOKEN.items():
        if not _cached(addresses):
            notes.append(f"{name} is not beside it: tiktoken's cache does not hold {encoding}")
        elif importlib.util.find_spec("tiktoken") is None:
            notes.append(f"{name} is not beside it: the package tiktoken is not installed")
        else:
            found[name] = _public_encoding(encoding)
    for path in named:
        found[_label(path)] = load_other(path, pattern=pattern)
    folder = home / "tokenizers"
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            found[_label(path)] = load_other(path, pattern=pattern)
        except UserError as error:
            notes.append(f"{path} is left out: {error}")
    return found, notes


def load_other(path: Path, *, pattern: str) -> Count:
    """Counts tokens with the tokenizer.json (file or folder) or tiktoken file at `path`."""
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"there is no tokenizer at {path}",
            "it is neither a file nor a folder with tokenizer.json",
            "give a tokenizer.json, its folder, or a .tiktoken file",
        )
    return _from_json(path) if path.suffix == ".json" else _from_tiktoken(path, pattern)


def _label(path: Path) -> str:
    return path.parent.name if path.name == "tokenizer.json" else path.stem


def _cached(addresses: Iterable[str]) -> bool:
    place = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(place) if place else Path(tempfile.gettempdir()) / "data-gym-cache"
    keys = [hashlib.sha1(a.encode(), usedforsecurity=False).hexdigest() for a in addresses]
    return all((folder / key).is_file() for key in keys)


def _public_encoding(name: str) -> Count:
    import tiktoken

    encoding = tiktoken.get_encoding(name)  # from its cache, which was seen to hold it
    return lambda text: len(encoding.encode_ordinary(text))


def _from_json(path: Path) -> Count:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"{path} cannot be measured",
            "the package tokenizers is not installed",
            "pip install tokenizers",
        ) from None
    try:
        other = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(
            f"{path} is not a tokenizer.json that the tokenizers library can load",
            str(error).splitlines()[0],
            "copy the file again",
        ) from None
    other.encode_special_tokens = True  # text that looks like a special token is text
    return lambda text: len(other.encode(text, add_special_tokens=False).ids)


def _from_tiktoken(path: Path, pattern: str) -> Count:
    name = _FILE_PATTERNS.get(path.stem, pattern)
    try:
        return engine().Bpe.from_ranks(load_tiktoken(path), name).count
    except ValueError as error:  # no such pattern, or ranks that only look right
        raise UserError(
            f"{path} cannot be measured", str(error), "name a pattern with --pattern"
        ) from None
