"""The network as a whole: first loss, cache, files, determinism."""

import dataclasses
import math

import pytest
import torch

from fledge.errors import UserError
from fledge.model import ModelConfig, Transformer
from fledge.model.kv_cache import CacheView, Piece

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def random_model(config: ModelConfig = CONFIG) -> Transformer:
    """Every weight random: a fresh model's zero projections would hide mistakes."""
    model = Transformer(config, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_fresh_untied_model_predicts_the_uniform_distribution():
    model = Transformer(CONFIG, seed=0)
    ids = torch.randint(0, 96, (2, 9))
    loss = model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(2, 8)) / 16
    assert loss.item() == pytest.approx(math.log(96), abs=1e-5)


def test_initial_weights_depend_on_the_seed_only():
    one, same, other = (Transformer(CONFIG, seed=s).state_dict() for s in (5, 5, 6))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@torch.inference_mode()
def test_cached_decoding_equals_the_full_forward_pass():
    model = random_model()
    ids = torch.randint(0, 96, (3, 12))
    full = model(ids)
    cache = model.new_cache(3, 16)

    def read(start: int, end: int) -> torch.Tensor:
        view = CacheView(cache, [Piece(slot, start, end - start) for slot in range(3)])
        hidden = model.hidden(ids[:, start:end].reshape(1, -1), view)
        return model.lm_head(hidden).view(3, end - start, -1)

    got = [read(0, 7), *(read(t, t + 1) for t in range(7, 12))]
    torch.testing.assert_close(torch.cat(got, dim=1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_give_the_same_logits(tmp_path, tied):
    model = random_model(dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    model.save(tmp_path)
    again = Transformer.load(tmp_path)
    ids = torch.randint(0, 96, (2, 9))
    assert again.config == model.config
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("damage", ["missing", "truncated", "other_model", "half_config", "shape"])
def test_a_damaged_folder_is_refused_in_words(tmp_path, damage):
    random_model().save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "other_model":
        config.write_text(config.read_text().replace('"qwen3"', '"llama"'))
    elif damage == "half_config":
        config.write_text('{"model_type": "qwen3", "vocab_size": 96}')
    else:
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(UserError):
        Transformer.load(tmp_path)


def test_token_losses_equal_the_loss_sum():
    model = random_model()
    ids = torch.randint(0, 96, (2, 9))
    losses = model.token_losses(ids[:, :-1], ids[:, 1:])
    total = model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(2, 8))
    assert losses.sum().item() == pytest.approx(total.item(), rel=1e-5)
