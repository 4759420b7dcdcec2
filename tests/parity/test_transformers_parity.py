"""A folder written by fledge is a Qwen3 for transformers: same logits, no custom code."""

import dataclasses

import pytest
import torch
from tests.model.test_transformer import CONFIG, random_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_transformers(tmp_path, tied):
    model = random_model(dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
