"""What the pipeline hands to every stage: the run, its material, progress and the stop flag.

A stage is a function of a `StageContext`; it reads its inputs from the run and leaves its results
there. Stages share `stages.training`, never each other's internals.
"""

from __future__ import annotations

import functools
import resource
import sys
from dataclasses import dataclass, field

from fledge.config import Recipe
from fledge.dist import World
from fledge.progress import Progress
from fledge.run import Run
from fledge.runlog import StopRequest
from fledge.stages.material import Material
from fledge.tokenizer import Tokenizer


@dataclass
class StageContext:
    """One stage's view of the run. `recipe` has every planned value filled in."""

    run: Run
    recipe: Recipe
    material: Material
    progress: Progress
    stop: StopRequest
    device: str
    notes: list[str]  # what was left out of this run and why, for the report
    world: World = field(default_factory=World)  # the processes that take this stage together

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the first stage trained."""
        return Tokenizer.load(self.run.tokenizer_dir)


def peak_memory_bytes() -> int:
    """The process's largest resident size so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
