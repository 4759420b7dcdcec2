"""The Rust module (rust/src/py.rs); fledge.tokenizer.reference is its pure-Python twin."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike

Progress = Callable[[str, int, int | None], object]  # phase "count" or "merge", done, total

class Memory:
    """Numbers that numpy takes for its own memory, without a copy; they may be written to."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Bpe:
    """A trained byte-level BPE: split pattern and merges. Safe to use from several threads."""

    def __init__(self, merges: Sequence[tuple[int, int]], pattern: str) -> None: ...
    @classmethod
    def from_ranks(cls, tokens: Sequence[bytes], pattern: str) -> Bpe:
        """The BPE of tokens in the order of their ranks, with the ids of tiktoken. ValueError."""
    @property
    def merges(self) -> list[tuple[int, int]]:
        """Empty after `from_ranks`."""
    @property
    def pattern(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]: ...
    def encode_u16(self, text: str) -> Memory:
        """The ids as the memory of an array of uint16, for at most 65,536 tokens."""
    def encode_u32(self, text: str) -> Memory:
        """The ids as the memory of an array of uint32."""
    def encode_batch_u16(
        self, texts: Sequence[str], threads: int | None = None
    ) -> tuple[Memory, Memory]:
        """All ids as one such array, and uint64 where each text begins and the last ends."""
    def encode_batch_u32(
        self, texts: Sequence[str], threads: int | None = None
    ) -> tuple[Memory, Memory]: ...
    def count(self, text: str) -> int: ...
    def decode(self, ids: list[int], errors: str) -> str:
        """The text of `ids`; `errors` says what becomes of bytes that are no UTF-8."""
    def decode_array(self, ids: bytes) -> bytes:
        """`decode_bytes` of an array of uint32 given by its memory."""
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...
    def token_bytes(self, id: int) -> bytes: ...

class Counter:
    """Counts pieces of texts that come in any number of calls, and learns merges from them.

    Memory stays below about `max_memory_bytes` (2 GiB): what does not fit goes to sorted temporary
    files in `spill_folder`. The counts do not depend on threads or on the order of the texts. A
    call that fails or is interrupted half-way leaves the counter unusable (RuntimeError); go on
    from the last `save`.
    """

    def __init__(
        self,
        pattern: str,
        threads: int | None = None,
        *,
        max_memory_bytes: int | None = None,
        spill_folder: str | PathLike[str] | None = None,
    ) -> None: ...
    @property
    def pattern(self) -> str: ...
    @property
    def num_texts(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def add(
        self,
        texts: Iterable[str],
        *,
        progress: Progress | None = None,
        total_bytes: int | None = None,
    ) -> None: ...
    def add_file(self, path: str | PathLike[str], *, progress: Progress | None = None) -> None:
        """Counts a file of UTF-8 as one text. Raises OSError."""
    def save(self, path: str | PathLike[str]) -> None:
        """Writes the counts, whole or not at all. The same counts give the same file."""
    def add_saved(self, path: str | PathLike[str]) -> None:
        """Adds saved counts; ValueError, and nothing added, if the file is damaged."""
    def learn(
        self, num_merges: int, *, progress: Progress | None = None
    ) -> list[tuple[int, int]]: ...

def train(
    texts: Iterable[str],
    num_merges: int,
    pattern: str,
    threads: int | None = None,
    progress: Progress | None = None,
    *,
    total_bytes: int | None = None,
    max_memory_bytes: int | None = None,
) -> list[tuple[int, int]]: ...
def split(text: str, pattern: str) -> list[str]: ...
def pattern_regex(pattern: str) -> str:
    """The regex that a pattern's name stands for."""
