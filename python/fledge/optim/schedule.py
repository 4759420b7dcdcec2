"""The learning rate over the steps of a stage, as a factor of its peak.

Linear warm-up, constant, linear cool-down to a final share (the trapezoid of Haegele et al. 2024,
arXiv 2405.18392, with nanochat's linear shape). Used by `train.loop` and `train.rl`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Factor of the peak learning rate at each of `steps` steps."""

    steps: int
    warmup_steps: int
    cooldown_fraction: float
    final_lr_fraction: float

    def factor(self, step: int) -> float:
        """The factor for the update that leads from `step` to `step + 1`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        cooldown_steps = max(1, round(self.cooldown_fraction * self.steps))
        left = self.steps - step
        if left >= cooldown_steps:
            return 1.0
        return self.final_lr_fraction + (1.0 - self.final_lr_fraction) * left / cooldown_steps
