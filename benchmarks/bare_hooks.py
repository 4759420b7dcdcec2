"""The hooks of a training without a run directory: they save nothing and print what they are told.

The benchmarks that call `train.loop` or `train.rl` themselves take them and add what they measure.
"""

from __future__ import annotations

from fledge.errors import UserError


class BareHooks:
    """What `train.loop.Hooks` answers where there is nothing to save."""

    def save(self, step: int) -> None: ...

    def stop_requested(self) -> bool:
        return False

    def restore(self) -> int | None:
        return None

    def note(self, text: str) -> None:
        print(text)

    def diverged(self, step: int) -> UserError:
        return UserError(f"it diverged at step {step}", "the rates are too high", "lower them")
