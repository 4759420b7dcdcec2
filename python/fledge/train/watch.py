"""Is this step's loss to be learnt from? Skipping, rolling back, giving up.

A loss or a gradient that is not finite is skipped; so is a spike, a loss far above those before.
After several bad steps in a row the weights themselves are suspected and the trainer goes back to
the last checkpoint. If that does not help it gives up, or, where the losses are finite, takes the
new level for what the data is. Used by `train.loop`; its state is saved, so that a resumed run
judges as the whole one does.
"""

from __future__ import annotations

import math
from enum import Enum

ROLL_BACK_AFTER = 5  # bad steps in a row
MAX_BAD_STEPS = 10  # after which training gives up
MAX_ROLLBACKS = 5  # of one stage
SPIKE_NATS, SPIKE_DEVIATIONS = 1.0, 10.0  # a spike is above the mean by both
LEAST_STEPS = 20  # good steps before anything is called a spike
MEMORY = 0.9  # of the running means


class Verdict(Enum):
    """What to do with a step's gradients."""

    GOOD = "good"
    SPIKE = "spike"
    BROKEN = "not finite"


class LossWatch:
    """Running mean and mean deviation of the losses that were learnt from."""

    def __init__(self) -> None:
        self.mean = 0.0
        self.deviation = 0.0
        self.good = 0
        self.bad_in_row = 0
        self.rollbacks = 0

    def judge(self, loss: float, gradient_norm: float) -> Verdict:
        """The verdict on a step, which is remembered."""
        verdict = self._verdict(loss, gradient_norm)
        if verdict is Verdict.SPIKE and self.bad_in_row + 1 >= MAX_BAD_STEPS:
            verdict = Verdict.GOOD  # this is what the data is like now
            self.good = 0
        if verdict is not Verdict.GOOD:
            self.bad_in_row += 1
            return verdict
        self.bad_in_row = 0
        if self.good == 0:
            self.mean, self.deviation = loss, 0.0
        self.deviation = MEMORY * self.deviation + (1 - MEMORY) * abs(loss - self.mean)
        self.mean = MEMORY * self.mean + (1 - MEMORY) * loss
        self.good += 1
        return verdict

    def _verdict(self, loss: float, gradient_norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return Verdict.BROKEN
        limit = self.mean + max(SPIKE_NATS, SPIKE_DEVIATIONS * self.deviation)
        return Verdict.SPIKE if self.good >= LEAST_STEPS and loss > limit else Verdict.GOOD

    @property
    def suspects_weights(self) -> bool:
        """True at the step after which the trainer should go back to the last checkpoint."""
        return self.bad_in_row == ROLL_BACK_AFTER

    @property
    def hopeless(self) -> bool:
        """True when skipping and rolling back have not helped."""
        return self.bad_in_row >= MAX_BAD_STEPS or self.rollbacks > MAX_ROLLBACKS

    def state(self) -> dict[str, float]:
        return dict(vars(self))

    def restore(self, state: dict[str, float]) -> None:
        vars(self).update(state)
