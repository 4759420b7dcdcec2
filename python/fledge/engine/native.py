"""What decoding hands to the Rust module: a whole step in one call, draws, log-probabilities.

A step of a small model made of torch's operators costs more in calls than in arithmetic. The Rust
module (rust/src/nn) goes through all layers with threads of its own, reads keys and values where
`model.kv_cache` has them and writes the new ones there. Used by `engine.packed`, whose own passes
remain for prompts, scoring and where the module is missing; `Draws` by `engine.sampling` and
`engine.scheduler`, whose own code is the readable twin. Never changes the model.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fledge.engine.requests import SamplingParams
from fledge.model import Transformer
from fledge.model.kv_cache import KVCache, Piece
from fledge.model.transformer import Block, Decoder

if TYPE_CHECKING:
    from fledge._bpe import DecodeStep


def native_step() -> type[DecodeStep] | None:
    """The Rust class, where the module is built."""
    try:
        from fledge._bpe import DecodeStep
    except ImportError:
        return None
    return DecodeStep


def can_step(weights: str) -> bool:
    """Whether steps are taken natively here: the processor has what their products need. Timed on
    AVX-512 alone (decision 046).

    Without the byte products of AVX-512 torch's int8 is faster; other processors than x86 are
    served by what the compiler makes of plain Rust.
    """
    step = native_step()
    if step is None:
        return False
    level = step.level()
    if weights == "int8":
        return level == "avx512"
    return level != "plain" or platform.machine() in ("arm64", "aarch64")


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class NativeDecoder:
    """The packed weights of a model, and the threads that run its decode steps."""

    def __init__(self, model: Transformer, weights: str, *, threads: int) -> None:
        made = native_step()
        assert made is not None, "asked for without the Rust module"
        c, decoder = model.config, model.model
        assert isinstance(decoder, Decoder)
        self._vocab_size = c.vocab_size
        self._cache: KVCache | None = None
        self._logits = torch.empty(0, self._vocab_size)
        self._step = made(
            sizes=[
                c.vocab_size,
                c.hidden_size,
                c.num_hidden_layers,
                c.num_attention_heads,
                c.num_key_value_heads,
                c.head_dim,
                c.intermediate_size,
                len(model.cos),
            ],
            eps=c.rms_norm_eps,
            weights=weights,
            threads=threads,
            embedding=_numbers(decoder.embed_tokens.weight),
            norm=_numbers(decoder.norm.weight),
            head=_numbers(model.lm_head.weight),
            cos=_numbers(model.cos),
            sin=_numbers(model.sin),
            layers=[_layer(block) for block in decoder.layers],
        )

    def decode(self, tokens: list[int], pieces: list[Piece], cache: KVCache) -> Tensor:
        """Reads one token of every piece; logits [rows, V]. A row's bits are its own affair.

        The logits are memory that is kept, because fresh pages cost as much as a layer: the next
        call writes over them.
        """
        if self._cache is not cache:
            self._step.use_cache(
                [keys.numpy() for keys in cache.keys], [values.numpy() for values in cache.values]
            )
            self._cache = cache
        if len(self._logits) < len(tokens):
            self._logits = torch.empty(len(tokens), self._vocab_size)
        logits = self._logits[: len(tokens)]
        self._step.step(
            tokens,
            [piece.slot for piece in pieces],
            [piece.start for piece in pieces],
            [[(s.slot, s.start, s.end) for s in piece.segments] for piece in pieces],
            logits.numpy(),
        )
        return logits


class Draws:
    """Tokens and log-probabilities of logits on a CPU, row by row; the bits are each row's own."""

    @staticmethod
    def of(logits: Tensor) -> Draws | None:
        """For logits [rows, V] that the module can read; None where torch has to do it."""
        if logits.dtype != torch.float32 or logits.device.type != "cpu" or not can_step("float32"):
            return None
        return Draws(logits)

    def __init__(self, logits: Tensor) -> None:
        self._logits = _numbers(logits)

    def tokens(self, uniforms: list[float], params: Sequence[SamplingParams]) -> list[int]:
        """One per row, by its uniform number: greedy, of the best `top_k`, or of all.

        top_p and min_p without top_k are not known here.
        """
        from fledge._bpe import draw_tokens

        rules = [(p.temperature, p.top_k or 0, p.top_p or 1.0, p.min_p or 0.0) for p in params]
        return draw_tokens(self._logits, uniforms, rules)

    def logprobs(self, tokens: list[int]) -> list[float]:
        """Of one token per row."""
        from fledge._bpe import logprobs_of

        return logprobs_of(self._logits, tokens)


def _layer(block: torch.nn.Module) -> list[np.ndarray]:
    assert isinstance(block, Block)
    attention, mlp = block.self_attn, block.mlp
    parts = (
        block.input_layernorm,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        attention.q_norm,
        attention.k_norm,
        block.post_attention_layernorm,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    )
    return [_numbers(part.weight) for part in parts]
