"""The Rust module (rust/src/py.rs); fledge.tokenizer.reference is its pure-Python twin."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike

import numpy as np

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

class DecodeStep:
    """A packed qwen3 model, and threads of its own that run its decode steps in one call.

    Arrays are contiguous float32, read and written in place: nobody else may write them while a
    call runs. `embedding` and the cache are kept, the other arrays are only read here. Mistakes in
    numbers and shapes: ValueError; a number below 0: OverflowError; an array of another type:
    BufferError. `logits` must not overlap the other arrays. A process that was forked off while no
    step was under way steps on without the threads.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int],
        eps: float,
        weights: str,
        threads: int,
        embedding: np.ndarray,
        norm: np.ndarray,
        head: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        layers: Sequence[Sequence[np.ndarray]],
    ) -> None:
        """sizes: vocabulary, hidden, layers, heads, key heads, head width, inner, positions.

        `layers`, of each block: input norm, q, k, v, o, q norm, k norm, post-attention norm, gate,
        up, down. weights: float32, bfloat16 or int8. `threads`: the caller's among them.
        """
    @staticmethod
    def level() -> str:
        """What the processor has: avx512, avx2 or plain."""
    def use_cache(self, keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> None:
        """Of each layer [slots, kv_heads, max_len, head_dim]; a head's two numbers of a rotation
        stand side by side, as `fledge.engine.packed` has them."""
    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        segments: Sequence[Sequence[tuple[int, int, int]]],
        logits: np.ndarray,
    ) -> None:
        """Reads one token of every row and writes its `logits` [rows, vocabulary].

        A row stands in the (slot, start, end) of its segments, then in its own slot. Its result
        does not depend on the other rows or on the number of threads, to the bit.
        """

def draw_tokens(
    logits: np.ndarray,
    uniforms: Sequence[float],
    rules: Sequence[tuple[float, int, float, float]],
) -> list[int]:
    """Of every row of `logits` [rows, V] a token, by its uniform number and its rule: temperature
    (0: greedy), top_k (0: all), and of these top_p and min_p."""

def logprobs_of(logits: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """Of every row of `logits` [rows, V] the log-probability of its token."""
