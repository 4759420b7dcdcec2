"""Chats at every context and pass size: no NaN, right masks, one loss whatever the split.

On real GSM8K and chats where they are (FLEDGE_DATA), else on the almanac's. nanochat's fine-tuning
turned NaN here: rows were shorter than its conversations, and some held nothing to learn.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from fledge.config import parse_recipe
from fledge.data.conversations import chat_sources
from fledge.data.loader import Loader, Mixture
from fledge.data.task_files import TaskData
from fledge.data.tokenized import ConversationDocuments, Epochs
from fledge.dist import World
from fledge.errors import UserError
from fledge.model import ModelConfig, Transformer
from fledge.sandbox import arithmetic
from fledge.stages.material import open_material
from fledge.tokenizer import Tokenizer
from fledge.train.loop import accumulate

SHARED = Path(os.environ.get("FLEDGE_DATA") or Path(__file__).parents[3] / "shared" / "data")
CONTEXTS, ROWS_PER_PASS, ROWS = (64, 128, 256, 512, 2048), (1, 2, 8), 8


def has_data() -> bool:
    return (SHARED / "gsm8k").is_dir() and (SHARED / "sft").is_dir()


@pytest.fixture(scope="module")
def sources():
    """kind -> conversations: real ones where there are some."""
    if not has_data():
        return None
    found = chat_sources(TaskData(SHARED, use_hub=False), "sft", calculator=arithmetic.evaluate)
    return {kind: found[kind] for kind in ("gsm8k", "chat")}


@pytest.fixture(scope="module")
def tokenizer(sources) -> Tokenizer:
    if sources is None:
        material = open_material(parse_recipe('[data]\nworld = "almanac"', where="test"))
        texts = material.tokenizer_texts(100_000)
    else:
        rows = [rows[i] for rows in sources.values() for i in range(400)]
        texts = (str(m["content"]) for row in rows for m in row["messages"])
    return Tokenizer.train(texts, vocab_size=1024, pattern="qwen2")


def loader(sources, tokenizer: Tokenizer, context: int) -> Loader:
    if sources is None:
        material = open_material(parse_recipe('[data]\nworld = "almanac"', where="test"))
        documents, _ = material.chats("sft", "train", tokenizer, max_tokens=context)
    else:
        documents = Mixture(
            [
                ConversationDocuments(Epochs(rows, 0), tokenizer, max_tokens=context)
                for rows in sources.values()
            ],
            [1.0] * len(sources),
        )
    return Loader(documents, row_tokens=context, pad_id=tokenizer.pad_id, split=False)


def expected_mask(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """What is learnt, from the special tokens alone: the assistant's words, its calls, its end."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    mask, speaking, output = [], False, False
    for token in ids:
        name = names.get(token, "")
        if name == "<|assistant_start|>":
            mask.append(0)
            speaking = True
        elif name == "<|output_start|>":
            mask.append(0)
            output = True
        elif name == "<|output_end|>":
            mask.append(0)
            output = False
        else:
            mask.append(int(speaking and not output))
            speaking = speaking and name != "<|assistant_end|>"
    return mask


def tiny(vocab: int, context: int) -> Transformer:
    config = ModelConfig(vocab, 32, 2, 4, 2, 8, 48, context, tie_word_embeddings=False)
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("context", CONTEXTS)
def test_one_loss_and_one_gradient_whatever_the_split(sources, tokenizer, context):
    source = loader(sources, tokenizer, context)
    model = tiny(tokenizer.vocab_size, context)
    for _ in range(2):
        ids, mask = source.batch(ROWS)
        if sources is not None:  # the world's mixture holds prose, which is learnt whole
            for row, own in zip(ids.tolist(), mask.tolist(), strict=True):
                assert own == expected_mask(row, tokenizer)
        assert (mask.sum(1) > 0).all(), "a row without anything to learn"
        ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
        found: list[tuple[float, torch.Tensor]] = []
        for size in (*ROWS_PER_PASS, 3):
            model.zero_grad()
            loss, tokens = accumulate(model, ids, mask, size)
            assert tokens == int(mask[:, 1:].sum()) and math.isfinite(loss)
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append((loss, torch.cat(gradients)))
        model.zero_grad()  # two ranks: each its share, then the sum
        ranks = [
            accumulate(model, ids, mask, 2, share=World(r, 2).share(ROWS))[0] for r in range(2)
        ]
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((sum(ranks), torch.cat(gradients)))
        first, first_gradient = found[0]
        assert torch.isfinite(first_gradient).all() and first_gradient.abs().max() > 0
        for loss, gradient in found[1:]:
            assert loss == pytest.approx(first, rel=1e-6)
            torch.testing.assert_close(
                gradient, first_gradient, rtol=1e-3, atol=1e-6 * float(first_gradient.abs().max())
            )


@pytest.mark.skipif(not has_data(), reason=f"no task files under {SHARED} (set FLEDGE_DATA)")
def test_a_context_of_64_keeps_some_and_counts_the_rest(sources, tokenizer):
    source = loader(sources, tokenizer, 64)
    for _ in range(4):
        source.batch(ROWS)
    gsm8k, chats = source.counts()
    assert gsm8k["dropped"] > 0.9 * gsm8k["read"], "a worked answer is longer than 64 tokens"
    kept = chats["read"] - chats["dropped"]
    assert kept > 100 and chats["shortened"] > 0


@pytest.mark.skipif(not has_data(), reason=f"no task files under {SHARED} (set FLEDGE_DATA)")
def test_a_kind_that_never_fits_is_told(sources, tokenizer, monkeypatch):
    monkeypatch.setattr("fledge.data.pack.MOST_EMPTY", 500)
    with pytest.raises(UserError, match="leave nothing to train on"):
        loader({"gsm8k": sources["gsm8k"]}, tokenizer, 16).batch(1)
