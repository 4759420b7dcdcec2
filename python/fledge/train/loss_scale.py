"""What float16 needs: the loss multiplied by a power of two, so that small gradients don't vanish.

float16 has nothing below 6e-8 and nothing above 65,504. The loss of a step is multiplied by the
largest scale whose gradients stay finite, and the gradients, which are float32, are divided by it
again before anybody sees them (Micikevicius et al. 2018, arXiv 1710.03740). A scale that was too
large costs a second pass over the same batch, not the batch: what is trained on does not depend on
it. That is why this is not `torch.amp.GradScaler`, which skips the step, and which wants optimizers
of `torch.optim`. Used by `train.loop` and `train.rl`; every other dtype keeps the scale of 1.

A gradient that is not finite at any scale is not the scale's fault: `train.watch` judges it.
"""

from __future__ import annotations

import math

START, MOST = 2.0**16, 2.0**24
GROW_AFTER = 2000  # steps without an overflow, as torch.amp.GradScaler


class LossScale:
    """The factor of the loss; with `dynamic` it halves and doubles, else it is 1."""

    def __init__(self, *, dynamic: bool = False) -> None:
        self.dynamic = dynamic
        self.value = START if dynamic else 1.0
        self._good = 0  # steps in a row
        self._settled = self.value  # of the last step that was finite

    def overflowed(self, loss: float, gradient_norm: float) -> bool:
        """True if the gradients are to be made again: the scale is half of what it was then."""
        if not self.dynamic or math.isfinite(gradient_norm) or not math.isfinite(loss):
            return False
        if self.value <= 1.0:
            self.value = self._settled
            return False
        self.value /= 2
        self._good = 0
        return True

    def good_step(self) -> None:
        """To be called after an update: many in a row, and a larger scale is tried."""
        self._good += 1
        if self.dynamic and self._good >= GROW_AFTER:
            self.value, self._good = min(MOST, 2 * self.value), 0
        self._settled = self.value

    def state(self) -> dict[str, float]:
        """For state.json; empty where there is nothing to remember."""
        return {"value": self.value, "good": self._good} if self.dynamic else {}

    def restore(self, state: dict[str, float]) -> None:
        """The inverse; a state of another dtype's run is passed over."""
        if self.dynamic and state:
            self.value, self._good = state["value"], int(state["good"])
            self._settled = self.value
