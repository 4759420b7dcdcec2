"""nanochat's own rules, so that a recipe of its resolves to its published figures to the digit.

Two releases of karpathy/nanochat: that of October 2025 (3a5e0bc; `model.rule = "oct2025"`) and that
of July 2026 (92d63d4; what rule "auto" means for arch "speedrun" from depth 8 on). Each gives
values of [base], [mid], [sft] and [rl] that the planner takes before its own defaults; what is
given in a recipe still wins. Pure functions of the network and the batch, called by
`plan.planner`; the figures they must meet are tests/plan/test_published.py. It knows no machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fledge.config import ModelConfig, ModelSection
from fledge.plan.scaling import count

Rules = dict[str, tuple[Any, str]]

OCT2025 = "oct2025"
OCT = "nanochat, October 2025"
MID2026 = "nanochat, July 2026"

OCT_BATCH = 524_288  # tokens of a step, at every depth
OCT_VOCAB = 65_536
OCT_TOKENS_PER_PARAM = 20.0  # of all parameters
D12_TOKENS = 1_321_210_944.0  # 12 x the blocks and head of the d12 of 2026: its anchor
ANCHOR_BATCH = 2**19
SMALLEST_DEPTH_2026 = 8  # below it fledge's own tuned rates hold (docs/log.md)


def release_of(section: ModelSection) -> str | None:
    """Which release's rules a [model] section asks for; None: fledge's own defaults."""
    if section.rule == OCT2025:
        return OCT
    if section.arch == "speedrun" and section.depth >= SMALLEST_DEPTH_2026:
        return MID2026
    return None


def static_rules(release: str | None) -> Rules:
    """What a release fixes whatever the network: "section.key" -> (value, where it is from)."""
    table: Mapping[str, Any] = {OCT: _OCT_STATIC, MID2026: _2026_STATIC}.get(release or "", {})
    return {key: (value, str(release)) for key, value in table.items()}


_RL: dict[str, Any] = {  # alike in both
    "rl.lr_scale": 0.05,
    "rl.steps": 467,
    "rl.prompts_per_step": 16,
    "rl.samples_per_prompt": 16,
    "rl.max_new_tokens": 256,
    "rl.eval_every": 60,
    "rl.save_every": 60,
}

_OCT_STATIC: dict[str, Any] = _RL | {
    "tokenizer.vocab_size": OCT_VOCAB,
    "tokenizer.train_bytes": 2_000_000_000,
    "base.global_batch_tokens": OCT_BATCH,
    "base.weight_decay": 0.0,
    "base.row_variance": 0.0,
    "base.adamw": "2025",
    "base.decay_schedule": "constant",
    "base.momentum_schedule": "rise",
    "base.warmup_steps": 0,
    "base.cooldown_fraction": 0.2,
    "base.final_lr_fraction": 0.0,
    "base.eval_every": 250,
    "base.eval_tokens": 20 * OCT_BATCH,
    "mid.lr_scale": 1.0,
    "mid.warmup_steps": 0,
    "mid.cooldown_fraction": 1.0,
    "mid.final_lr_fraction": 0.0,
    "mid.eval_every": 150,
    "sft.lr_scale": 0.02,
    "sft.warmup_steps": 0,
    "sft.cooldown_fraction": 1.0,
    "sft.final_lr_fraction": 0.0,
    "sft.eval_every": 100,
    "rl.warmup_steps": 0,
    "rl.cooldown_fraction": 1.0,
    "rl.final_lr_fraction": 0.0,
}

OPTIMIZER_2026: dict[str, Any] = {
    "base.row_variance": 0.9,
    "base.adamw": "2026",
    "base.decay_schedule": "cosine",
    "base.momentum_schedule": "warm",
    "base.warmup_steps": 40,
    "base.cooldown_fraction": 0.65,
    "base.final_lr_fraction": 0.05,
}
"""Its optimizers and schedules, without the rates; benchmarks/quality.py takes them, too."""

_2026_STATIC: dict[str, Any] = _RL | OPTIMIZER_2026 | {"base.eval_every": 250}


def horizon(release: str | None, model: ModelConfig, ratio: float) -> int | None:
    """Tokens of pretraining before they are cut to whole steps; None: the planner's own rule."""
    return int(ratio * count(model).parameters) if release == OCT else None


def rates(release: str | None, model: ModelConfig, *, batch: int, tokens: int) -> Rules:
    """Peak learning rates and decay of [base]: key -> (value, rule); empty without a release.

    2026: all rates x sqrt(batch / 2^19); AdamW's of the tables also x (width / 768)^-0.5; decay
    0.28 x sqrt(batch / 2^19) x (tokens of d12 / tokens).
    """
    if release is None:
        return {}
    by_width = math.sqrt(768 / model.hidden_size)
    if release == OCT:
        return {
            "matrix_lr": (0.02, f"0.02 ({OCT})"),
            "embed_lr": (0.2 * by_width, f"0.2 x (hidden_size / 768)^-0.5 ({OCT})"),
            "head_lr": (0.004 * by_width, f"0.004 x (hidden_size / 768)^-0.5 ({OCT})"),
            "norm_lr": (0.005, "no norm of that network has weights"),
        }
    by_batch = math.sqrt(batch / ANCHOR_BATCH)
    more = "x sqrt(batch / 2^19)"
    return {
        "matrix_lr": (0.02 * by_batch, f"0.02 {more} ({MID2026})"),
        "embed_lr": (0.3 * by_width * by_batch, f"0.3 x (width / 768)^-0.5 {more} ({MID2026})"),
        "head_lr": (0.008 * by_width * by_batch, f"0.008 x (width / 768)^-0.5 {more} ({MID2026})"),
        "norm_lr": (0.005 * by_batch, f"0.005 {more}, of the residual scalars ({MID2026})"),
        "weight_decay": (
            0.28 * by_batch * D12_TOKENS / tokens,
            f"0.28 {more} x tokens of d12 / tokens ({MID2026})",
        ),
    }
