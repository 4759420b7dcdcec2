"""A tiny tokenizer and models for tests of the engine, evaluation and reinforcement."""

from __future__ import annotations

import torch

from fledge.model import ModelConfig, Transformer
from fledge.tokenizer import Tokenizer

TEXTS = [f"{a} plus {b} is {a + b}. The answer is {a + b}." for a in range(20) for b in range(20)]


def tiny_tokenizer() -> Tokenizer:
    """384 tokens: bytes, specials and some merges."""
    return Tokenizer.train(iter(TEXTS), vocab_size=384, pattern="qwen2")


def tiny_model(vocab_size: int, *, seed: int = 3, context: int = 128) -> Transformer:
    """Random weights everywhere: a fresh model's zero projections would hide mistakes."""
    config = ModelConfig(vocab_size, 32, 2, 4, 2, 8, 48, context, tie_word_embeddings=False)
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
