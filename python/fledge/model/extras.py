"""What arch = "speedrun" adds to Qwen3: the mid-2026 recipe for small models, one flag each.

Every class here is chosen by fields of `ModelConfig`; `model.transformer` takes the decoder and the
head of that arch from this file, and the qwen3 path never comes here. The formulas are those of
nanochat (gpt.py, 92d63d4) and modded-nanogpt, where most were found; `modeling_fledge.py` says the
same for transformers, and a test holds the two equal. Shapes: B batch, T tokens, D hidden, H heads,
K head_dim, L cache length, V vocab.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.config import ModelConfig
from fledge.model.attention import Attention, attend
from fledge.model.cpu_attention import rounded_attend
from fledge.model.kv_cache import AttentionView
from fledge.model.layers import (
    Embedding,
    Head,
    Linear,
    RMSNorm,
    SwiGLU,
    filled_on_host,
    rms_norm,
    run_block,
)
from fledge.model.loss import softcap

VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24
NO_TOKEN = -1
"""The id that stands for the token before, where there is none: at position 0 of a sequence."""


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """How many tokens back layer `layer` looks, itself included; None = all. The last sees all."""
    if layer == config.num_hidden_layers - 1:
        return None
    letter = config.window_pattern[layer % len(config.window_pattern)]
    return config.sliding_window if letter == "S" else None


def has_value_embedding(config: ModelConfig, layer: int) -> bool:
    """Every second layer, the last one among them."""
    return config.value_embeddings and (config.num_hidden_layers - 1 - layer) % 2 == 0


class PlainNorm(nn.Module):
    """Root-mean-square norm without weights: the matrices after it can learn any gain."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, None, self.eps)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm of a vector of `size` numbers, with weights or without."""
    return (
        RMSNorm(size, config.rms_norm_eps)
        if config.norm_weights
        else PlainNorm(config.rms_norm_eps)
    )


class _ReluSquaredPass(torch.autograd.Function):
    """relu(x up^T)^2 down^T, keeping relu(x up^T) alone: the square is made again when needed.

    autograd would keep the layer before relu, after it and squared, a third of a block's memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> Tensor:  # type: ignore[override]
        inner = F.linear(x, up).relu_()
        ctx.save_for_backward(x, inner, up, down)
        return F.linear(inner.square(), down)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        x, inner, up, down = ctx.saved_tensors
        flat, rows = upstream.flatten(0, -2), inner.flatten(0, -2)
        grad_down = flat.T @ rows.square()
        slope = (flat @ down).mul_(rows).mul_(2.0)
        grad_up = slope.T @ x.flatten(0, -2)
        return (slope @ up).view_as(x), grad_up, grad_down


class ReluSquared(nn.Module):
    """Feed-forward layer down(relu(up(x))^2) (So et al. 2021, Primer, arXiv 2109.08668)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if self.up_proj.fp8:  # 8-bit copies are what is kept then
            return self.down_proj(F.relu(self.up_proj(x)).square())
        dtype = torch.bfloat16 if self.up_proj.rounds() else x.dtype
        up, down = self.up_proj.weight.to(dtype), self.down_proj.weight.to(dtype)
        return _ReluSquaredPass.apply(x.to(dtype), up, down).to(x.dtype)  # type: ignore


class _Gate(Linear):
    """A few numbers a token, through torch's own product: too small for another library."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class SpeedrunAttention(Attention):
    """Attention with a window, sharper scores, and values that also come from a table.

    Scores are qk_scale^2 q k / sqrt(K). A gate per head, 3 sigmoid of a linear map of the first 12
    channels, says how much of the token's value embedding joins v (0.5 and more from the start).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = make_norm(config, config.head_dim)
        self.k_norm = make_norm(config, config.head_dim)
        self.window = layer_window(config, layer)
        self.scale = config.qk_scale**2 / math.sqrt(config.head_dim)
        self.value_gate = None
        if has_value_embedding(config, layer):
            self.value_gate = _Gate(VALUE_GATE_CHANNELS, config.num_key_value_heads)

    def forward(  # type: ignore[override]
        self, x: Tensor, cos: Tensor, sin: Tensor, view: AttentionView | None, table: Tensor | None
    ) -> Tensor:
        """`table` [B, T, H_kv K]: the value embeddings of the tokens, if this layer has any."""
        q, k, v = self.project(x, cos, sin)
        if self.value_gate is not None and table is not None:
            gate = 3.0 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            heads = table.unflatten(-1, (-1, self.head_dim))  # [B, T, H_kv, K]
            v = v + (gate[..., None] * heads).transpose(1, 2)
        return self.mix(q, k, v, view)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, view: AttentionView | None) -> Tensor:
        if view is None:
            y = self.attend(q, k, v).transpose(1, 2)
        else:
            y = view.attend(self.layer, q, k, v, window=self.window, scale=self.scale)
        return self.o_proj(y.flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, T, K] of whole rows: causal, inside the window."""
        if self.rounds(q):
            return rounded_attend(q, k, v, self.scale, self.window)
        return attend(q, k, v, None, window=self.window, scale=self.scale)


class SpeedrunBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = SpeedrunAttention(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        kind = ReluSquared if config.hidden_act == "relu2" else SwiGLU
        self.mlp = kind(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, view: AttentionView | None, table: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, view, table)
        return x + self.mlp(self.post_attention_layernorm(x))


class Smear(nn.Module):
    """A token also carries some of the one before: x_t + scale sigmoid(gate(x_t)) x_(t-1)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _Gate(SMEAR_GATE_CHANNELS, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """x and previous [B, T, D]; previous is 0 where there is no token before."""
        gate = self.scale.to(x.dtype) * torch.sigmoid(self.gate(x[..., :SMEAR_GATE_CHANNELS]))
        return x + gate * previous


def previous_tokens(ids: Tensor, view: AttentionView | None) -> Tensor:
    """The id before each of ids [B, T] in its own sequence; NO_TOKEN at position 0.

    A row of training is one sequence, whatever documents are packed into it: what ends the one
    document is before the first token of the next.
    """
    if view is None:
        return F.pad(ids[:, :-1], (1, 0), value=NO_TOKEN)
    return torch.where(view.positions > 0, view.previous_ids(ids), NO_TOKEN)


def bigram_hash(previous: Tensor, ids: Tensor, rows: int) -> Tensor:
    """Which of `rows` rows each pair (token before, token) has, [B, T] int64; pairs share rows.

    With p = previous + 1 (so that NO_TOKEN is 0), h = p * 2654435761 xor id * 2246822519, the first
    two 32-bit primes of xxHash; row = (h xor (h >> 15)) mod rows. The shift brings the upper bits
    down: without it a power of two of rows would see only the lower bits of the ids. Ids below 2^30
    keep h below 2^62, so that nothing overflows and every device finds the same row.
    """
    mixed = (previous + 1) * 2654435761 ^ ids * 2246822519
    return (mixed ^ mixed >> 15) % rows


class SpeedrunDecoder(nn.Module):
    """Embedding, blocks and final norm with the extras: the `model.` part of the names."""

    checkpoint_activations = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SpeedrunBlock(config, i) for i in layers)
        self.norm = make_norm(config, config.hidden_size)
        self.embedding_norm = PlainNorm(config.rms_norm_eps) if config.embedding_norm else None
        value_size = config.num_key_value_heads * config.head_dim
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): Embedding(config.vocab_size, value_size)
                for i in layers
                if has_value_embedding(config, i)
            }
        )
        self.smear = Smear() if config.smear else None
        count = config.num_hidden_layers
        self.residual_scalars = _scalars(count) if config.residual_scalars else None
        self.embedding_scalars = _scalars(count) if config.embedding_scalars else None
        self.backout_scale = _scalars(1) if config.backout else None
        rows = config.bigram_rows
        self.bigram_embeddings = Embedding(rows, config.hidden_size) if rows else None
        self.bigram_scale = _scalars(count) if rows else None

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return x if self.embedding_norm is None else self.embedding_norm(x)

    def _begin(self, ids: Tensor, view: AttentionView | None) -> tuple[Tensor, Tensor | None]:
        """The embeddings, smeared, and what the table says of each token and the one before."""
        x = self.embed(ids)
        if self.smear is None and self.bigram_embeddings is None:
            return x, None
        previous = previous_tokens(ids, view)
        if self.smear is not None and view is None:
            x = self.smear(x, F.pad(x[:, :-1], (0, 0, 1, 0)))
        elif self.smear is not None:
            before = self.embed(previous.clamp_min(0))
            x = self.smear(x, before * (previous != NO_TOKEN)[..., None])
        if self.bigram_embeddings is None:
            return x, None
        return x, self.bigram_embeddings(bigram_hash(previous, ids, self.config.bigram_rows))

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, view: AttentionView | None) -> Tensor:
        """Normed states [B, T, D] of token ids [B, T]."""
        first, pairs = self._begin(ids, view)
        x = first if pairs is None else first + pairs
        middle = None
        for i, block in enumerate(self.layers):
            if self.residual_scalars is not None:
                x = self.residual_scalars[i] * x
            if self.embedding_scalars is not None:
                x = x + self.embedding_scalars[i] * first
            if self.bigram_scale is not None and pairs is not None:
                x = x + self.bigram_scale[i] * pairs
            key = str(i)
            table = self.value_embeddings[key](ids) if key in self.value_embeddings else None
            x = run_block(block, x, cos, sin, view, table, again=self.checkpoint_activations)
            if i == len(self.layers) // 2:
                middle = x
        if self.backout_scale is not None and middle is not None:
            x = x - self.backout_scale.to(x.dtype) * middle
        return self.norm(x)


def _scalars(count: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(count))


class CappedHead(Head):
    """The output head; its logits are cap tanh(logits / cap) when the config has a cap."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.cap = config.final_logit_softcapping

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        return logits if self.cap is None else softcap(logits.float(), self.cap)


def initialize_speedrun(model: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """nanochat's initial weights (gpt.py, 92d63d4), under `torch.no_grad`.

    Readers of the stream uniform with std 1/sqrt(D), the feed-forward's 0.4 of that; writers zero;
    residual scalars fall from 1.15 to 1.05 over the depth, embedding scalars from 0.20 to 0.05. The
    table of pairs is zero and its scalars 0.1, as in modded-nanogpt: none of the other numbers of
    a seed moves with it.
    """
    bound = (3.0 / config.hidden_size) ** 0.5
    depth = torch.linspace(0.0, 1.0, config.num_hidden_layers)
    for name, parameter in filled_on_host(model):
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if kind.endswith("norm"):
            parameter.fill_(1.0)
        elif kind == "embed_tokens":
            std = 0.02 if config.tie_word_embeddings else 0.8
            parameter.normal_(0.0, std, generator=generator)
        elif kind == "lm_head":
            parameter.normal_(0.0, 0.001, generator=generator)
        elif kind in ("o_proj", "down_proj", "bigram_embeddings") or name.endswith("smear.scale"):
            parameter.zero_()
        elif kind in ("gate", "value_gate"):
            parameter.uniform_(0.0, 0.02, generator=generator)
        elif kind == "residual_scalars":
            parameter.copy_(1.15 - 0.10 * depth)
        elif kind == "embedding_scalars":
            parameter.copy_(0.20 - 0.15 * depth)
        elif kind == "backout_scale":
            parameter.fill_(0.2)
        elif kind == "bigram_scale":
            parameter.fill_(0.1)
        else:
            share = 0.4 if kind in ("up_proj", "gate_proj") else 1.0
            parameter.uniform_(-bound * share, bound * share, generator=generator)
