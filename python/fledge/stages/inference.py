"""The engine as the stages use it: results of a CPU run do not depend on what shares a batch.

DESIGN 4.4: every stage of a CPU run is deterministic, so a resumed run equals one that was never
stopped. On an accelerator the kernels leave no such choice. Used by the stages only.
"""

from __future__ import annotations

from fledge.engine import Engine
from fledge.model import Transformer
from fledge.tokenizer import Tokenizer


def stage_engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    """An engine over the live model, deterministic on a CPU."""
    return Engine(model, tokenizer, deterministic=model.cos.device.type == "cpu")
