"""From the one dial `depth` to the shape of the network: a pure function with a reason per number.

Called by the planner and the tests. It knows nothing of machines, recipes or files.
"""

from __future__ import annotations

from dataclasses import dataclass

from fledge.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Sizes of one network that the rest of the plan is computed from."""

    parameters: int
    """All weights, the tied head counted once."""
    embedding_parameters: int
    """The embedding and, when it is not tied, the head."""
    matrix_parameters: int
    """The matrices of the blocks: what Muon trains."""
    scaling_parameters: int
    """Blocks + head: what tokens_per_param multiplies (a lookup does not compute)."""
    flops_per_token: float
    """Forward and backward of one token at the training context."""


RULES: dict[str, str] = {
    "hidden_size": "64 x depth, from depth 6 rounded up to a multiple of 128",
    "head_dim": "64 below depth 8 (so that a small model has several heads), else 128",
    "num_key_value_heads": "as many as query heads: at this size the cache is no burden",
    "intermediate_size": "8/3 x hidden_size, rounded up to a multiple of 64 (gated layer)",
    "max_seq_len": "256 up to depth 2, 512 below depth 8, else 2048",
    "tie_word_embeddings": "separate: tied lost 0.08 bpb at equal tokens (docs/log.md)",
    "rope_theta": "10,000: enough for contexts up to a few thousand tokens",
}


def round_up(number: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -int(-number // multiple) * multiple


def width(depth: int) -> int:
    """Of the residual stream: a fixed aspect ratio of 64 per layer, as nanochat does."""
    return round_up(64 * depth, 128) if depth >= 6 else 64 * depth


def head_width(depth: int) -> int:
    """Of one attention head."""
    return 64 if depth < 8 else 128


def feed_forward_width(hidden_size: int) -> int:
    """Of the gated feed-forward layer: 8/3 keeps the parameters of a plain 4x layer."""
    return round_up(8 * hidden_size / 3, 64)


def context(depth: int) -> int:
    """In training, in tokens."""
    if depth <= 2:
        return 256
    return 512 if depth < 8 else 2048


def model_config(
    depth: int,
    *,
    vocab_size: int,
    arch: str = "qwen3",
    max_seq_len: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    head_dim: int | None = None,
    num_key_value_heads: int | None = None,
    tie_word_embeddings: bool | None = None,
    rope_theta: float | None = None,
) -> ModelConfig:
    """The network of a depth; whatever is given of [model]'s keys wins over the rule."""
    hidden_size = hidden_size or width(depth)
    head_dim = head_dim or min(head_width(depth), hidden_size)
    heads = hidden_size // head_dim
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads or heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size or feed_forward_width(hidden_size),
        max_position_embeddings=max_seq_len or context(depth),
        rope_theta=rope_theta or 10000.0,
        tie_word_embeddings=bool(tie_word_embeddings),
        arch=arch,
    )


def count(model: ModelConfig, seq_len: int | None = None) -> Counts:
    """Exact parameter counts of the Qwen3 shape, and FLOPs per trained token.

    FLOPs = 6 x (blocks + head) + attention. A query meets on average half the context, so the
    score and value products are 12 x heads x head_dim x layers x T halved (causal), which is half
    of what nanochat counts.
    """
    length = seq_len or model.max_position_embeddings
    hidden, layers = model.hidden_size, model.num_hidden_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    per_layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * model.intermediate_size
    norms = layers * (2 * hidden + 2 * model.head_dim) + hidden
    table = model.vocab_size * hidden
    embeddings = table if model.tie_word_embeddings else 2 * table
    matrices = layers * per_layer
    attention = 12.0 * queries * layers * length / 2
    return Counts(
        parameters=matrices + norms + embeddings,
        embedding_parameters=embeddings,
        matrix_parameters=matrices,
        scaling_parameters=matrices + table,
        flops_per_token=6.0 * (matrices + table) + attention,
    )
