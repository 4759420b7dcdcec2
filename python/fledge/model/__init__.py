"""The network: one Transformer class, its layers, its cache and its files.

`fledge.model` gives `ModelConfig` and `Transformer`; it knows nothing of text, data or runs.
"""

from fledge.config import ModelConfig
from fledge.model.transformer import Transformer

__all__ = ["ModelConfig", "Transformer"]
