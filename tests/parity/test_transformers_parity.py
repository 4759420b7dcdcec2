"""A folder written by fledge gives the same logits in transformers: as Qwen3 with no custom code,
or with the `modeling_fledge.py` that it brings."""

import dataclasses

import pytest
import torch
from tests.model.test_extras import ALL, FLAGS, speedrun
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


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where transformers copies a checkpoint's code to."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "modules"


@pytest.mark.parametrize("name", ["all", "none", "windows", "smear", "bigram_rows", "tied"])
def test_logits_of_speedrun_equal_those_of_its_own_code(tmp_path, modules, name):
    flags = {"all": ALL, "none": {}, "tied": ALL | FLAGS["tied"]}.get(name) or FLAGS.get(name, {})
    model, folder = speedrun(**flags), tmp_path / "model"
    folder.mkdir()
    model.save(folder)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs.eval()).__module__.endswith("modeling_fledge")
    assert type(theirs).__module__.startswith("transformers_modules")  # the copy in the folder
    ids = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
        padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
        mask = torch.ones_like(padded)
        mask[:, :4] = 0  # padded on the left, as generate does
        logits = theirs(padded, attention_mask=mask).logits[:, 4:]
        torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-4)
        ones = torch.ones_like(ids[:1])
        more = theirs.generate(
            ids[:1], attention_mask=ones, max_new_tokens=3, do_sample=False, pad_token_id=0
        )
    row = ids[:1]
    for _ in range(3):
        row = torch.cat([row, model(row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(more, row)
