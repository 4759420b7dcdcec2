"""Every number the planner falls back on, in one place, each with where it came from.

Read by `fledge.plan.planner`, and by the chats for how they sample. Numbers marked *tuned* were
measured on our own runs (docs/log.md); the others carry their source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fledge.config import ModelConfig

CHAT_DRY_MULTIPLIER = 0.8
"""Against replies that go round in circles, in fledge's own chats and its page: the value of its
author (text-generation-webui, pull request 5677); what it does here stands in docs/log.md."""


@dataclass(frozen=True)
class Schedule:
    """Shape of a learning-rate curve: share of the steps that cool down, and where they end."""

    cooldown: float
    final: float


@dataclass(frozen=True)
class Defaults:
    """The table. A change here changes every recipe that leaves the key out."""

    # tokenizer
    smallest_vocab: int = 384
    """256 bytes + 12 special tokens, padded to 128."""
    world_vocab_tiny: int = 1024
    world_vocab: int = 4096
    small_vocab: int = 8192
    full_vocab: int = 32768
    world_tokenizer_bytes: int = 4_000_000
    small_tokenizer_bytes: int = 20_000_000
    full_tokenizer_bytes: int = 2_000_000_000

    # horizon and batch
    tokens_per_param: float = 12.0
    """nanochat 2026: reference/pipeline.md 6.1."""
    d12_tokens: float = 1.321e9
    """Tokens of nanochat's d12, the anchor of its batch rule."""
    least_steps: int = 1500
    """On a CPU 4,096 tokens per step reached a loss in 351 s for which 16,384 needed 520 s
    (reference/measured.md C)."""
    least_batch_tokens: int = 2048

    # learning rates
    matrix_lr: float = 0.02
    """Muon's usual rate (nanochat, modded-nanogpt)."""
    untied_embed_lr: float = 0.3
    """AdamW for a table that is only looked up, at width 768 (nanochat)."""
    head_lr: float = 0.004
    """AdamW for an untied head (nanochat's unembedding)."""
    speedrun_head_lr: float = 0.008
    """The same with a softcap (nanochat 2026)."""
    tied_embed_lr: float = 0.01
    """AdamW for a table that is also the head."""
    norm_lr: float = 0.005
    small_matrix_lr: float = 0.03
    small_embed_lr: float = 0.2
    small_head_lr: float = 0.01
    small_norm_lr: float = 0.01
    """Tuned below depth 8 on the almanac, width 128 to 256, 0.5 to 3.4M tokens (docs/log.md)."""
    weight_decay: float = 0.1
    small_weight_decay: float = 0.0
    speedrun_small_norm_lr: float = 0.001
    """The scalars too, in nanochat's proportion (optim.groups): 0.005 is its rate for 2^19 tokens
    a step, whose square-root rule gives 0.0009 for 16,384."""
    speedrun_row_variance: float = 0.9

    # schedules
    most_warmup_steps: int = 40
    warmup_share: float = 0.02
    most_save_every: int = 1000
    schedules: dict[str, Schedule] = field(
        default_factory=lambda: {
            "base": Schedule(0.5, 0.05),
            "mid": Schedule(0.8, 0.05),
            "sft": Schedule(1.0, 0.0),
            "rl": Schedule(0.5, 0.2),
        }
    )
    chat_share: dict[str, float] = field(default_factory=lambda: {"mid": 0.3, "sft": 0.15})
    most_chat_tokens: dict[str, int] = field(
        default_factory=lambda: {"mid": 400_000_000, "sft": 100_000_000}
    )
    """About what the public chat mixtures hold (nanochat: 850K conversations in mid)."""
    lr_scale: dict[str, float] = field(
        default_factory=lambda: {"mid": 0.7, "sft": 0.35, "rl": 0.05}
    )

    # measuring
    eval_share: int = 50
    least_eval_tokens: int = 16_384
    most_eval_tokens: int = 20 * 524_288
    """nanochat's 20 x 524,288."""

    chatcore_looks: int = 4
    """From depth 8 on. With the laptop's model 60 questions of each of the five tasks took 12 s on
    two cores, and its whole mid 87 s (docs/log.md): four looks would be half of the stage."""

    # machine
    memory_share: float = 0.6
    cpu_tokens_per_pass: int = 8192

    def rates(self, model: ModelConfig) -> dict[str, tuple[Any, str]]:
        """Peak rates, decay and schedules of a network: key of [base] -> (value, rule)."""
        return self._peaks(model) | self._shapes(model)

    def _peaks(self, model: ModelConfig) -> dict[str, tuple[float, str]]:
        small, speedrun = model.num_hidden_layers < 8, model.arch == "speedrun"
        decay = (
            (self.small_weight_decay, "none below depth 8: a short run has nothing to forget")
            if small
            else (self.weight_decay, "house default for Muon")
        )
        if small and not model.tie_word_embeddings:
            rule = "tuned for small depths on the almanac (docs/log.md)"
            norm = self.small_norm_lr, rule
            if speedrun:
                norm = self.speedrun_small_norm_lr, "nanochat's 0.005 for a small batch"
            return {
                "matrix_lr": (self.small_matrix_lr, rule),
                "embed_lr": (self.small_embed_lr, rule),
                "head_lr": (self.small_head_lr, rule),
                "norm_lr": norm,
                "weight_decay": decay,
            }
        if model.tie_word_embeddings:
            embed, rule = self.tied_embed_lr, f"{self.tied_embed_lr:g}: the table is also the head"
        else:
            embed = self.untied_embed_lr * math.sqrt(768 / model.hidden_size)
            rule = f"{self.untied_embed_lr:g} x (hidden_size / 768)^-0.5, as nanochat"
        head = self.speedrun_head_lr if speedrun else self.head_lr
        return {
            "matrix_lr": (self.matrix_lr, f"{self.matrix_lr:g}, Muon's usual rate at every width"),
            "embed_lr": (embed, rule),
            "head_lr": (
                head * math.sqrt(768 / model.hidden_size),
                f"{head:g} x (hidden_size / 768)^-0.5, as nanochat (untied only)",
            ),
            "norm_lr": (self.norm_lr, f"{self.norm_lr:g} at every width"),
            "weight_decay": decay,
        }

    def _shapes(self, model: ModelConfig) -> dict[str, tuple[Any, str]]:
        speedrun = model.arch == "speedrun"
        variance = self.speedrun_row_variance if speedrun else 0.0
        return {
            "row_variance": (variance, "0 is plain Muon; 0.9 with arch speedrun, as nanochat 2026"),
            "adamw": (None, "absent means 2026 with arch speedrun, else 2025"),
            "cooldown_shape": ("linear", "as nanochat"),
            "decay_schedule": ("constant", "house default"),
            "momentum_schedule": ("constant", "0.95 throughout"),
        }


DEFAULTS = Defaults()
