"""From the one dial `depth` to the shape of the network: a pure function with a reason per number.

Called by the planner and the tests. It knows nothing of machines, recipes or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fledge.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Sizes of one network that the rest of the plan is computed from."""

    parameters: int
    """All weights, the tied head counted once."""
    embedding_parameters: int
    """The embedding, the head when it is not tied, and the extras' tables."""
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
    "intermediate_size": "8/3 x hidden_size, rounded up to a multiple of 64 (gated; relu2: 4)",
    "max_seq_len": "256 up to depth 2, 512 below depth 8, else 2048",
    "tie_word_embeddings": "separate: tied lost 0.08 bpb at equal tokens (docs/log.md)",
    "rope_theta": "10,000: enough for contexts up to a few thousand tokens (speedrun: 100,000)",
}

SPEEDRUN: dict[str, Any] = {
    "hidden_act": "relu2",
    "norm_weights": False,
    "embedding_norm": True,
    "qk_scale": 1.2,
    "final_logit_softcapping": 15.0,
    "window_pattern": "SSSL",
    "value_embeddings": True,
    "residual_scalars": True,
    "embedding_scalars": True,
    "smear": True,
    "backout": True,
    "bigram_rows": 0,
}
"""The extras of arch "speedrun" as nanochat sets them (gpt.py, 92d63d4), which has no bigram_rows:
off, so that the releases keep their published sizes."""


OCT2025_EXTRAS: dict[str, float] = {
    "qk_scale": 1.0,
    "value_embeddings": 0.0,
    "residual_scalars": 0.0,
    "embedding_scalars": 0.0,
    "smear": 0.0,
    "backout": 0.0,
}
"""What nanochat's first release (gpt.py, 3a5e0bc) lacked; softcap 15 and ReLU^2 it had."""


def round_up(number: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -int(-number // multiple) * multiple


def width(depth: int) -> int:
    """Of the residual stream: a fixed aspect ratio of 64 per layer, as nanochat does."""
    return round_up(64 * depth, 128) if depth >= 6 else 64 * depth


def default_head_dim(depth: int, hidden_size: int, rule: str = "auto") -> int:
    """Width of a head: 128 in nanochat's first release, where that divides the width."""
    if rule == "oct2025" and hidden_size % 128 == 0:
        return 128
    return min(head_width(depth), hidden_size)


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


def short_window(max_seq_len: int) -> int:
    """A quarter of the context, rounded up to a multiple of 128 (nanochat, gpt.py, 92d63d4)."""
    return round_up(max_seq_len / 4, 128)


def model_config(
    depth: int,
    *,
    vocab_size: int,
    rule: str = "auto",
    arch: str = "qwen3",
    max_seq_len: int | None = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    head_dim: int | None = None,
    num_key_value_heads: int | None = None,
    tie_word_embeddings: bool | None = None,
    rope_theta: float | None = None,
    extras: dict[str, float] | None = None,
    window_pattern: str | None = None,
) -> ModelConfig:
    """The network of a depth; whatever is given of [model]'s keys wins over the rule."""
    launch = rule == "oct2025"
    hidden_size = hidden_size or (64 * depth if launch else width(depth))
    head_dim = head_dim or default_head_dim(depth, hidden_size, rule)
    heads = hidden_size // head_dim
    length = max_seq_len or (2048 if launch else context(depth))
    if launch:
        extras, window_pattern = OCT2025_EXTRAS | (extras or {}), window_pattern or "L"
        rope_theta = rope_theta or 10_000.0
    own = speedrun_fields(length, extras or {}, window_pattern) if arch == "speedrun" else {}
    wide = own.get("hidden_act") == "relu2"
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads or heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size
        or (4 * hidden_size if wide else feed_forward_width(hidden_size)),
        max_position_embeddings=length,
        rope_theta=rope_theta or (100_000.0 if arch == "speedrun" else 10000.0),
        tie_word_embeddings=bool(tie_word_embeddings),
        arch=arch,
        **own,
    )


def speedrun_fields(
    length: int, extras: dict[str, float], window_pattern: str | None
) -> dict[str, Any]:
    """ModelConfig's fields of arch "speedrun": its standard, changed by [model]'s extras.

    A number stands for each: 1 and 0 for on and off, relu2 and norm_weights among them; a window of
    the whole context and a cap of 0 are none. Raises KeyError for an unknown name.
    """
    own = dict(SPEEDRUN) | {"sliding_window": short_window(length)}
    for name, number in extras.items():
        if name == "relu2":
            own["hidden_act"] = "relu2" if number else "silu"
        elif name == "final_logit_softcapping":
            own[name] = number or None
        elif isinstance(own[name], bool):
            own[name] = bool(number)
        elif isinstance(own[name], int):
            own[name] = int(number)
        else:
            own[name] = number
    own["window_pattern"] = window_pattern or own["window_pattern"]
    return own


EXTRAS = (
    "relu2",
    "sliding_window",
    *(n for n in SPEEDRUN if n not in ("hidden_act", "window_pattern")),
)
"""The names that [model]'s extras may change."""
COUNTED = ("sliding_window", "bigram_rows")
"""Those whose number counts something."""


def attended(model: ModelConfig, length: int) -> float:
    """Keys that a query meets on average, summed over the layers (causal, with windows)."""
    total = 0.0
    for layer in range(model.num_hidden_layers):
        letter = model.window_pattern[layer % len(model.window_pattern)]
        short = letter == "S" and layer < model.num_hidden_layers - 1
        window = min(length, model.sliding_window or length) if short else length
        total += window * (1 - window / (2 * length))
    return total


def nanochat_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of a trained token as nanochat counts and publishes them: attention as if not causal.

    The scalars of arch speedrun enter with 24 (smear's gate); see reference figures in
    tests/plan/test_published.py.
    """
    length, queries = model.max_position_embeddings, model.num_attention_heads * model.head_dim
    windows = 0
    for layer in range(model.num_hidden_layers):
        letter = model.window_pattern[layer % len(model.window_pattern)]
        short = letter == "S" and layer < model.num_hidden_layers - 1
        windows += min(length, model.sliding_window or length) if short else length
    computed = count(model).scaling_parameters + 24 * model.smear
    return 6.0 * computed + 12.0 * queries * windows


def count(model: ModelConfig, seq_len: int | None = None) -> Counts:
    """Exact parameter counts, and FLOPs per trained token.

    FLOPs = 6 x (blocks + head) + attention. A query meets on average half the context, less in a
    window, so the score and value products are 12 x heads x head_dim x keys met, which is half of
    what nanochat counts for a layer without a window.
    """
    length = seq_len or model.max_position_embeddings
    hidden, layers = model.hidden_size, model.num_hidden_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    feed_forward = (2 if model.hidden_act == "relu2" else 3) * hidden * model.intermediate_size
    matrices = layers * (hidden * (2 * queries + 2 * keys) + feed_forward)
    small = layers * (2 * hidden + 2 * model.head_dim) + hidden if model.norm_weights else 0
    table = model.vocab_size * hidden
    embeddings = table if model.tie_word_embeddings else 2 * table
    if model.value_embeddings:
        tables = (layers + 1) // 2
        matrices += tables * 12 * model.num_key_value_heads  # the gates
        embeddings += tables * model.vocab_size * keys
    if model.bigram_rows:
        embeddings += model.bigram_rows * hidden
        small += layers
    small += layers * (model.residual_scalars + model.embedding_scalars)
    small += 25 * model.smear + model.backout
    return Counts(
        parameters=matrices + small + embeddings,
        embedding_parameters=embeddings,
        matrix_parameters=matrices,
        scaling_parameters=matrices + table,
        flops_per_token=6.0 * (matrices + table) + 12.0 * queries * attended(model, length),
    )
