"""Learning rate, weight decay and momentum over the steps of a stage.

The rate warms up linearly, stays, and cools down to a final share: linearly, as nanochat does, or
as 1 - sqrt (Haegele et al. 2024, arXiv 2405.18392). Decay may fall as a cosine, and Muon's momentum
may rise and fall (nanochat 2026). Used by `train.loop` and `train.rl` through `optim.groups`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# nanochat (base_train.py, 92d63d4): up over the first 400 steps, down with the learning rate
MOMENTUM_RISE_STEPS = 400
MOMENTUM_FIRST, MOMENTUM_MOST, MOMENTUM_LAST = 0.85, 0.97, 0.90
MOMENTUM = 0.95
# nanochat of October 2025 (base_train.py, 3a5e0bc): up to MOMENTUM over the first 300 steps
MOMENTUM_RISE_STEPS_2025 = 300


@dataclass(frozen=True)
class Schedule:
    """Factor of the peak learning rate at each of `steps` steps, and what goes with it."""

    steps: int
    warmup_steps: int
    cooldown_fraction: float
    final_lr_fraction: float
    cooldown_shape: str = "linear"
    """linear or sqrt."""
    decay_schedule: str = "constant"
    """constant or cosine."""
    momentum_schedule: str = "constant"
    """constant, warm or rise."""

    def _cooled(self, step: int) -> float:
        """Share of the cool-down that is over, 0 before it."""
        cooldown_steps = max(1, round(self.cooldown_fraction * self.steps))
        return max(0.0, 1.0 - (self.steps - step) / cooldown_steps)

    def factor(self, step: int) -> float:
        """The factor for the update that leads from `step` to `step + 1`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        cooldown_steps = max(1, round(self.cooldown_fraction * self.steps))
        left = self.steps - step
        if left >= cooldown_steps:
            return 1.0
        share = left / cooldown_steps
        if self.cooldown_shape == "sqrt":
            share = 1.0 - math.sqrt(1.0 - share)
        return self.final_lr_fraction + (1.0 - self.final_lr_fraction) * share

    def decay_factor(self, step: int) -> float:
        """The factor of the peak weight decay."""
        if self.decay_schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * step / self.steps))

    def momentum(self, step: int) -> float:
        """Muon's momentum."""
        if self.momentum_schedule == "constant":
            return MOMENTUM
        if self.momentum_schedule == "rise":
            risen = min(1.0, step / MOMENTUM_RISE_STEPS_2025)
            return MOMENTUM_FIRST + (MOMENTUM - MOMENTUM_FIRST) * risen
        risen = min(1.0, step / MOMENTUM_RISE_STEPS)
        now = MOMENTUM_FIRST + (MOMENTUM_MOST - MOMENTUM_FIRST) * risen
        return now + (min(now, MOMENTUM_LAST) - now) * self._cooled(step)
