"""The class `Tokenizer`: ordinary tokens by byte-level BPE, special tokens beside them.

Ids in order: 256 bytes, the merges, reserved ids that pad the vocabulary to a multiple of 128, and
last the special tokens. Text is never looked through for special tokens unless `allow_special=True`
says so; that is what keeps a user's "<|assistant_start|>" mere text. The work is done by the Rust
module `fledge._bpe`; without it `reference.py` does the same slowly, with one notice.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from fledge.errors import UserError
from fledge.tokenizer import files, reference
from fledge.tokenizer.files import Vocabulary

BOS, PAD, EOS = "<|bos|>", "<|pad|>", "<|assistant_end|>"
SPECIAL_TOKENS = (
    BOS,
    PAD,
    *(f"<|{n}_{e}|>" for n in ("system", "user", "assistant", "python", "output")
      for e in ("start", "end")),
)  # fmt: skip
VOCAB_MULTIPLE = 128  # matrix products on GPUs like it, and HF configs hold the padded size


@functools.cache
def _engine() -> ModuleType:
    """The Rust module, or the reference with a notice (once per process)."""
    try:
        from fledge import _bpe
    except ImportError:
        print(
            "fledge: the Rust tokenizer (fledge._bpe) is not built; using the pure-Python one, "
            "which gives the same tokens, only slower. "
            "Install Rust and run `make` again to build it.",
            file=sys.stderr,
        )
        return reference
    return _bpe


class Tokenizer:
    """A trained tokenizer. Make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._bpe = _engine().Bpe(list(vocabulary.merges), vocabulary.pattern)
        self._texts = {i: text for text, i in vocabulary.added_tokens().items()}
        self._added = {text: i for i, text in self._texts.items()}
        self._special = {text: self._added[text] for text in vocabulary.special_tokens}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._added_regex = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 32768,
        pattern: str = "qwen2",
        special_tokens: Sequence[str] | None = None,
        *,
        threads: int | None = None,
    ) -> Tokenizer:
        """A tokenizer of `vocab_size` ids (rounded up to a multiple of 128) learnt from `texts`.

        The merges depend on the texts only, not on their order or on `threads`; see
        `reference.train` for the rule. Where the texts are too short for that many merges the rest
        is padding.
        """
        special = SPECIAL_TOKENS if special_tokens is None else tuple(special_tokens)
        smallest = reference.NUM_BYTES + len(special)
        if vocab_size < smallest:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small",
                f"256 bytes and {len(special)} special tokens need {smallest}",
                f"set tokenizer.vocab_size to {-(-smallest // VOCAB_MULTIPLE) * VOCAB_MULTIPLE} "
                "or more",
            )
        if pattern not in reference.PATTERNS:
            raise UserError(
                f"there is no split pattern {pattern!r}",
                f"the patterns are {', '.join(reference.PATTERNS)}",
                "set tokenizer.pattern to one of them",
            )
        merges = _engine().train(_utf8(texts), vocab_size - smallest, pattern, threads)
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return cls(Vocabulary(tuple(merges), pattern, special, padded))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a folder with tokenizer.json; UserError where it is not one of ours."""
        return cls(files.load(Path(path)))

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and vocab.tiktoken."""
        files.save(
            Path(path),
            self._vocabulary,
            bos=self._text_of(self.bos_id),
            eos=self._text_of(self.eos_id),
            pad=self._text_of(self.pad_id),
        )

    @property
    def vocab_size(self) -> int:
        """Bytes + merges + padding + special tokens; a multiple of 128."""
        return self._vocabulary.vocab_size

    @property
    def num_ordinary_tokens(self) -> int:
        """Bytes + merges: the ids below this number stand for bytes of text."""
        return self._bpe.num_tokens

    @property
    def pattern(self) -> str:
        """The name of the split pattern."""
        return self._vocabulary.pattern

    @property
    def merges(self) -> list[tuple[int, int]]:
        """The merges in the order in which they were learnt."""
        return list(self._vocabulary.merges)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of every special token (without the reserved padding)."""
        return self._special

    @property
    def bos_id(self) -> int:
        """The token that begins every document."""
        return self._added[BOS]

    @property
    def eos_id(self) -> int:
        """The token at which generation stops: <|assistant_end|>."""
        return self._added[EOS]

    @property
    def pad_id(self) -> int:
        """The token that fills rows; never trained on."""
        return self._added[PAD]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The ids of `text`; special tokens in it are ordinary text unless `allow_special`."""
        if allow_special:
            ids: list[int] = []
            for part in self._added_regex.split(text):
                if part in self._added:
                    ids.append(self._added[part])
                elif part:
                    ids += self.encode(part)
            return ids
        try:
            return self._bpe.encode(text)
        except UnicodeEncodeError:
            return self._bpe.encode(_without_surrogates(text))

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on all cores unless `threads` says fewer."""
        try:
            return self._bpe.encode_batch(texts, threads)
        except UnicodeEncodeError:
            return self._bpe.encode_batch([_without_surrogates(t) for t in texts], threads)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = False) -> bytes:
        """The bytes of `ids`. A special token gives its own text, or nothing if `skip_special`.

        Raises ValueError for an id outside the vocabulary.
        """
        limit = self.num_ordinary_tokens
        if max(ids, default=0) < limit:
            return self._bpe.decode_bytes(ids)
        parts = []
        for i in ids:
            if i < limit:
                parts.append(self._bpe.token_bytes(i))
            elif not skip_special:
                parts.append(self._text_of(i).encode())
        return b"".join(parts)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; b"" for special tokens and padding."""
        return self._bpe.token_bytes(id) if id < self.num_ordinary_tokens else b""

    def _text_of(self, special_id: int) -> str:
        try:
            return self._texts[special_id]
        except KeyError:
            raise ValueError(f"token {special_id} is not below {self.vocab_size}") from None


def _without_surrogates(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which no UTF-8 can hold; pairs are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _utf8(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text.isascii():
            yield text
            continue
        try:
            text.encode()
        except UnicodeEncodeError:
            yield _without_surrogates(text)
        else:
            yield text
