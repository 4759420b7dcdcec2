"""The class `Tokenizer`: ordinary tokens by byte-level BPE, special tokens beside them.

Ids in order: 256 bytes, the merges, reserved ids that pad the vocabulary to a multiple of 128, and
last the special tokens. Text is never looked through for special tokens unless `allow_special=True`
says so; that is what keeps a user's "<|assistant_start|>" mere text. The work is done by the Rust
module `fledge._bpe`; without it `reference.py` does the same slowly, with one notice.
"""

from __future__ import annotations

import codecs
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

from fledge.errors import UserError
from fledge.tokenizer import files, reference
from fledge.tokenizer.files import Vocabulary

if TYPE_CHECKING:
    import numpy as np

    Ids = Sequence[int] | np.ndarray

BOS, PAD, EOS = "<|bos|>", "<|pad|>", "<|assistant_end|>"
SPECIAL_TOKENS = (
    BOS,
    PAD,
    *(f"<|{n}_{e}|>" for n in ("system", "user", "assistant", "python", "output")
      for e in ("start", "end")),
)  # fmt: skip
NARROW_IDS = 1 << 16  # ids of a vocabulary up to here fit 16 bits
VOCAB_MULTIPLE = 128  # matrix products on GPUs like it, and HF configs hold the padded size


@functools.cache
def engine() -> ModuleType:
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
        self._bpe = engine().Bpe(list(vocabulary.merges), vocabulary.pattern)
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
        marks: Literal["letters"] | None = None,
        threads: int | None = None,
    ) -> Tokenizer:
        """A tokenizer of `vocab_size` ids (rounded up to a multiple of 128) learnt from `texts`.

        `pattern` is one of `reference.PATTERNS`, or "regex:" and a regex (slower). With
        `marks="letters"` combining marks count as letters: Hindi, Tamil and Thai words stay whole.

        The merges depend on the texts only, not on their order or on `threads`; see
        `reference.train` for the rule. Where the texts are too short for that many merges the rest
        is padding.
        """
        special = SPECIAL_TOKENS if special_tokens is None else tuple(special_tokens)
        pattern += "" if marks is None else reference.MARKS
        num_merges = check_vocabulary(vocab_size, pattern, special)
        merges = engine().train(utf8(texts), num_merges, pattern, threads)
        return cls.from_merges(merges, pattern, vocab_size=vocab_size, special_tokens=special)

    @classmethod
    def from_merges(
        cls,
        merges: Sequence[tuple[int, int]],
        pattern: str,
        *,
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> Tokenizer:
        """The tokenizer of merges that were learnt before, padded to a multiple of 128 ids."""
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return cls(Vocabulary(tuple(merges), pattern, tuple(special_tokens), padded))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a folder with tokenizer.json; UserError where it is not one of ours."""
        vocabulary = files.load(Path(path))
        try:
            return cls(vocabulary)
        except ValueError as error:  # a regex that this engine does not know, above all
            raise files.malformed(Path(path) / "tokenizer.json", str(error)) from None

    @classmethod
    def from_tiktoken(
        cls, path: str | Path, pattern: str, *, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> Tokenizer:
        """The tokenizer of a `vocab.tiktoken` of ours, which holds neither pattern nor specials.

        Raises UserError that names the line of a malformed file.
        """
        merges = files.merges_of(files.load_tiktoken(Path(path)), Path(path))
        size = reference.NUM_BYTES + len(merges) + len(special_tokens)
        return cls.from_merges(merges, pattern, vocab_size=size, special_tokens=special_tokens)

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
        return self._surrogate_free(self._bpe.encode, text)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, on all cores unless `threads` says fewer."""
        try:
            return self._bpe.encode_batch(texts, threads)
        except UnicodeEncodeError:
            return self._bpe.encode_batch([_without_surrogates(t) for t in texts], threads)

    @overload
    def encode_to_numpy(self, text: str, *, threads: int | None = None) -> np.ndarray: ...
    @overload
    def encode_to_numpy(
        self, text: Sequence[str], *, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def encode_to_numpy(
        self, text: str | Sequence[str], *, threads: int | None = None
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """`encode` without a Python object for every id: an array of them, [tokens].

        A list of texts gives (ids, offsets): the ids of all texts one after the other, [tokens],
        and where each begins and the last ends, [texts + 1] uint64. The ids are uint16 where the
        vocabulary has at most 65,536 of them, else uint32.
        """
        arrays = self._arrays
        if isinstance(text, str):
            try:
                ids = arrays.one(text)
            except UnicodeEncodeError:
                ids = arrays.one(_without_surrogates(text))
            return arrays.view(ids, arrays.dtype)
        try:
            ids, offsets = arrays.batch(text, threads)
        except UnicodeEncodeError:
            ids, offsets = arrays.batch([_without_surrogates(t) for t in text], threads)
        return arrays.view(ids, arrays.dtype), arrays.view(offsets, "uint64")

    @functools.cached_property
    def _arrays(self) -> _Arrays:
        return _Arrays(self._bpe, wide=self.vocab_size > NARROW_IDS)

    def count(self, text: str) -> int:
        """How many ids `text` has; special tokens in it are ordinary text."""
        return self._surrogate_free(self._bpe.count, text)

    @staticmethod
    def _surrogate_free(function: Callable[..., Any], text: str, **options: Any) -> Any:
        try:
            return function(text, **options)
        except UnicodeEncodeError:
            return function(_without_surrogates(text), **options)

    def decode(self, ids: Ids, *, skip_special: bool = False, errors: str = "replace") -> str:
        """The text of `ids`; `errors` says what becomes of bytes that are no UTF-8 (U+FFFD)."""
        if type(ids) is list:
            try:
                return self._bpe.decode(ids, errors)
            except (ValueError, OverflowError):
                pass  # special tokens among them, ids that are none, or an error that comes again
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors)

    def decode_bytes(self, ids: Ids, *, skip_special: bool = False) -> bytes:
        """The bytes of `ids`, a list or an array of them.

        A special token gives its own text, or nothing if `skip_special`. Raises ValueError for an
        id outside the vocabulary.
        """
        try:
            as_type = getattr(ids, "astype", None)  # an array's, without importing numpy
            if as_type is not None:
                return self._bpe.decode_array(as_type("uint32", casting="unsafe").tobytes())
            return self._bpe.decode_bytes(ids)
        except (ValueError, OverflowError):  # special tokens among them, or ids that are none
            return self._decode_with_special(ids, skip_special=skip_special)

    def _decode_with_special(self, ids: Ids, *, skip_special: bool) -> bytes:
        limit = self.num_ordinary_tokens
        parts = []
        for i in map(int, ids):
            if i < 0:
                raise ValueError(f"token {i} is below 0")
            if i < limit:
                parts.append(self._bpe.token_bytes(i))
            elif not skip_special:
                parts.append(self._text_of(i).encode())
        return b"".join(parts)

    def decoder(self, *, skip_special: bool = False) -> Decoder:
        """A decoder for ids that come one by one, as in streaming."""
        return Decoder(self, skip_special=skip_special)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; b"" for special tokens and padding."""
        return self._bpe.token_bytes(id) if id < self.num_ordinary_tokens else b""

    def _text_of(self, special_id: int) -> str:
        try:
            return self._texts[special_id]
        except KeyError:
            raise ValueError(f"token {special_id} is not below {self.vocab_size}") from None


class _Arrays:
    """How ids become an array: found out once a tokenizer, for a short text has no time for it."""

    __slots__ = ("batch", "dtype", "one", "view")

    def __init__(self, bpe: Any, *, wide: bool) -> None:
        import numpy as np  # late: nothing else here needs it

        self.one = bpe.encode_u32 if wide else bpe.encode_u16
        self.batch = bpe.encode_batch_u32 if wide else bpe.encode_batch_u16
        self.dtype = np.dtype(np.uint32 if wide else np.uint16)
        self.view = np.frombuffer


class Decoder:
    """Ids in, text out, never half a code point: what it has given is never taken back.

    All it gives, with `finish()` last, is `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is certain now: "" while a character is incomplete."""
        return self._utf8.decode(
            self._tokenizer.decode_bytes([id], skip_special=self._skip_special)
        )

    def finish(self) -> str:
        """U+FFFD for a character that will not be completed; the decoder is as new then."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def check_vocabulary(vocab_size: int, pattern: str, special: Sequence[str]) -> int:
    """The number of merges of a vocabulary; UserError if it has no room or no such pattern."""
    smallest = reference.NUM_BYTES + len(special)
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small",
            f"256 bytes and {len(special)} special tokens need {smallest}",
            f"set tokenizer.vocab_size to {-(-smallest // VOCAB_MULTIPLE) * VOCAB_MULTIPLE} "
            "or more",
        )
    try:
        engine().split("", pattern)
    except ValueError as error:
        raise UserError(
            f"{pattern!r} is no split pattern",
            str(error),
            "set tokenizer.pattern to one of them",
        ) from None
    return vocab_size - smallest


def _without_surrogates(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which no UTF-8 can hold; pairs are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def utf8(texts: Iterable[str]) -> Iterator[str]:
    """`texts` with lone surrogates, which UTF-8 cannot hold, replaced."""
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
