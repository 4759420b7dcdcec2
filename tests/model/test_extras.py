"""Each extra of arch "speedrun" against its formula; windows, cache and files with all of them."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from fledge.errors import UserError
from fledge.model import ModelConfig, Transformer, extras
from fledge.model.kv_cache import CacheView, Piece, Segment

PLAIN = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    arch="speedrun",
)
FLAGS = {
    "relu2": {"hidden_act": "relu2"},
    "norm": {"norm_weights": False},
    "embedding_norm": {"embedding_norm": True},
    "qk_scale": {"qk_scale": 1.2},
    "softcap": {"final_logit_softcapping": 3.0},
    "windows": {"window_pattern": "SSL", "sliding_window": 5},
    "value_embeddings": {"value_embeddings": True},
    "residual_scalars": {"residual_scalars": True},
    "embedding_scalars": {"embedding_scalars": True},
    "smear": {"smear": True},
    "backout": {"backout": True},
    "bigram_rows": {"bigram_rows": 40},
    "tied": {"tie_word_embeddings": True},
}
ALL: dict = {k: v for name, flag in FLAGS.items() if name != "tied" for k, v in flag.items()}


def speedrun(**flags) -> Transformer:
    """Every weight random: a fresh model's zeros would hide mistakes."""
    model = Transformer(dataclasses.replace(PLAIN, **flags), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(rows: int = 2, count: int = 12) -> torch.Tensor:
    return torch.randint(0, 96, (rows, count), generator=torch.Generator().manual_seed(1))


def pair_row(previous: int | torch.Tensor, this: int | torch.Tensor, rows: int) -> int:
    """In Python's integers, which never overflow; `previous` is -1 where there is no token."""
    mixed = ((int(previous) + 1) * 2654435761) ^ (int(this) * 2246822519)
    return (mixed ^ (mixed >> 15)) % rows


def hand_made(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Logits of one row of ids from the formulas, token by token where that is plainer."""
    config, decoder = model.config, model.model
    p = dict(model.named_parameters())
    count, groups = len(ids), config.num_attention_heads // config.num_key_value_heads

    def norm(x, name):
        y = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return y * p[f"model.{name}.weight"] if config.norm_weights else y

    def turn(x):  # [count, heads, K]
        half = config.head_dim // 2
        angle = torch.arange(count)[:, None] * config.rope_theta ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = p["model.embed_tokens.weight"][ids]
    if config.embedding_norm:
        x = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    if config.smear:
        gate = torch.sigmoid(x[:, :24] @ p["model.smear.gate.weight"].T) * p["model.smear.scale"]
        x = torch.stack([x[t] + (gate[t] * x[t - 1] if t else 0) for t in range(count)])
    first, middle, pairs = x, None, torch.zeros_like(x)
    if config.bigram_rows:
        row_of = [pair_row(a, b, config.bigram_rows) for a, b in zip([-1, *ids], ids, strict=False)]
        pairs = p["model.bigram_embeddings.weight"][row_of]
    x = first + pairs
    for i in range(config.num_hidden_layers):
        name = f"layers.{i}"
        if config.residual_scalars:
            x = p["model.residual_scalars"][i] * x
        if config.embedding_scalars:
            x = x + p["model.embedding_scalars"][i] * first
        if config.bigram_rows:
            x = x + p["model.bigram_scale"][i] * pairs
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            (h @ p[f"model.{name}.self_attn.{m}_proj.weight"].T).view(count, -1, config.head_dim)
            for m in "qkv"
        )
        q = turn(norm(q, f"{name}.self_attn.q_norm")) * config.qk_scale
        k = turn(norm(k, f"{name}.self_attn.k_norm")) * config.qk_scale
        if config.value_embeddings and i in (1, 3):
            gate = 3 * torch.sigmoid(h[:, :12] @ p[f"model.{name}.self_attn.value_gate.weight"].T)
            v = v + gate[:, :, None] * p[f"model.value_embeddings.{i}.weight"][ids].view(v.shape)
        short = config.window_pattern != "L" and i in (0, 1)
        window = (short and config.sliding_window) or count
        out = torch.zeros(count, config.num_attention_heads, config.head_dim)
        for t in range(count):
            seen = slice(max(0, t - window + 1), t + 1)
            for head in range(config.num_attention_heads):
                scores = k[seen, head // groups] @ q[t, head] / math.sqrt(config.head_dim)
                out[t, head] = scores.softmax(0) @ v[seen, head // groups]
        x = x + out.flatten(1) @ p[f"model.{name}.self_attn.o_proj.weight"].T
        h = norm(x, f"{name}.post_attention_layernorm")
        up = h @ p[f"model.{name}.mlp.up_proj.weight"].T
        if config.hidden_act == "relu2":
            inner = up.clamp_min(0) ** 2
        else:
            inner = F.silu(h @ p[f"model.{name}.mlp.gate_proj.weight"].T) * up
        x = x + inner @ p[f"model.{name}.mlp.down_proj.weight"].T
        middle = x if i == 2 else middle
    if config.backout and middle is not None:
        x = x - p["model.backout_scale"] * middle
    head = decoder.embed_tokens.weight if config.tie_word_embeddings else p["lm_head.weight"]
    logits = norm(x, "norm") @ head.T
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize("name", [*FLAGS, "all"])
@torch.inference_mode()
def test_an_extra_equals_its_formula_and_changes_the_logits(name):
    flags = ALL if name == "all" else FLAGS[name]
    model, ids = speedrun(**flags), tokens()
    logits = model(ids)
    for row, got in zip(ids, logits, strict=True):
        torch.testing.assert_close(got, hand_made(model, row), rtol=1e-4, atol=1e-4)
    if name == "tied":
        return
    # the same weights without the flag, where they fit, say something else: the flag is alive
    plain = speedrun()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(ids), logits, rtol=1e-3, atol=1e-3)


def test_relu_squared_has_the_gradients_of_autograd():
    layer = extras.ReluSquared(6, 10).double()
    for part in (layer.up_proj, layer.down_proj):
        torch.nn.init.normal_(part.weight)
    x = torch.randn(2, 3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    inputs = (x.requires_grad_(), layer.up_proj.weight, layer.down_proj.weight)

    def plain(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.relu(x @ up.T).square() @ down.T

    scale = torch.randn(2, 3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), plain(*inputs))
    ours = torch.autograd.grad((layer(x) * scale).sum(), inputs)
    theirs = torch.autograd.grad((plain(*inputs) * scale).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_without_extras_speedrun_is_qwen3():
    model = speedrun()
    qwen3 = Transformer(dataclasses.replace(PLAIN, arch="qwen3"))
    qwen3.load_state_dict(model.state_dict())
    assert torch.equal(qwen3(tokens()), model(tokens()))
    assert model.config.extras() == {}


@pytest.mark.parametrize("window", [1, 3, 12, 40])
def test_a_window_equals_a_dense_mask(window):
    generator = torch.Generator().manual_seed(0)
    config = dataclasses.replace(PLAIN, window_pattern="S", sliding_window=window)
    attention = extras.SpeedrunAttention(config, 0)
    q = torch.randn(2, 4, 12, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 12, 8, generator=generator)
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
    for i in range(12):
        for j in range(12):
            if j > i or j <= i - window:
                scores[:, :, i, j] = -math.inf
    expected = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(attention.attend(q, k, v), expected)


def test_the_last_layer_sees_everything():
    config = dataclasses.replace(PLAIN, window_pattern="SSL", sliding_window=5)
    windows = [extras.layer_window(config, i) for i in range(4)]
    assert windows == [5, 5, None, None]


@pytest.mark.parametrize("name", [*FLAGS, "all"])
@torch.inference_mode()
def test_cached_decoding_equals_the_full_forward_pass(name):
    """A shared beginning of 4, the rest of the prompt, a chunk of 3, then one by one."""
    model = speedrun(**(ALL if name == "all" else FLAGS[name]))
    ids = tokens(3, 16)
    ids[:, :4] = ids[0, :4]
    full = model(ids)
    cache = model.new_cache(4, 20)
    shared = (Segment(3, 0, 4),)
    first = model.hidden(ids[:1, :4], CacheView(cache, [Piece(3, 0, 4)]))
    got = [model.lm_head(first).expand(3, 4, -1)]

    def read(start: int, end: int) -> torch.Tensor:
        pieces = [Piece(slot, start, end - start, shared) for slot in range(3)]
        hidden = model.hidden(ids[:, start:end].reshape(1, -1), CacheView(cache, pieces))
        return model.lm_head(hidden).view(3, end - start, -1)

    got += [read(4, 7), read(7, 10), *(read(t, t + 1) for t in range(10, 16))]
    torch.testing.assert_close(torch.cat(got, dim=1), full, rtol=1e-4, atol=1e-4)


def test_a_pair_of_tokens_has_the_same_row_in_exact_integers():
    """The largest ids that no arithmetic of 64 bits overflows for, and no token before."""
    ids = torch.tensor([[0, 1, 2**30 - 1, 2**30 - 1, 50303]])
    previous = extras.previous_tokens(ids, None)
    assert previous.tolist() == [[-1, 0, 1, 2**30 - 1, 2**30 - 1]]
    for rows in (1, 40, 32768, 163840):
        found = extras.bigram_hash(previous, ids, rows)[0].tolist()
        pairs = zip(previous[0], ids[0], strict=True)
        assert found == [pair_row(a, b, rows) for a, b in pairs]
    none, zero = (extras.bigram_hash(torch.tensor(p), ids[0], 32768) for p in (-1, 0))
    assert (none != zero).all()  # no token before is not token 0


@pytest.mark.parametrize("rows", [1000, 32768, 32771])
@pytest.mark.parametrize("vocab", [512, 4096, 151936])
def test_pairs_spread_over_the_table_as_by_chance(rows, vocab):
    """Of a grid of 512 x 512 pairs: rows' loads vary as Poisson's do, whatever divides what."""
    steps = vocab // 512 * torch.arange(512)
    found = extras.bigram_hash(steps[:, None], steps, rows)
    loads = torch.bincount(found.flatten(), minlength=rows).double()
    assert loads.sum() == 512 * 512 and len(loads) == rows
    assert 0.7 < loads.var() / loads.mean() < 1.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16_products"])
def test_only_rows_of_pairs_that_occur_get_a_gradient(dtype, monkeypatch):
    """Its sum over the places of a pair, as of a twin whose table has a row for each place; and
    once more where there is a gradient to add to."""
    model, ids = speedrun(**(ALL | {"bigram_rows": 200})).compute_in(dtype), tokens()
    inputs, targets, weights = ids[:, :-1], ids[:, 1:], torch.ones(2, 11) / 22
    rows = extras.bigram_hash(extras.previous_tokens(inputs, None), inputs, 200)
    met = torch.zeros(200, dtype=torch.bool)
    met[rows.flatten()] = True
    table = "model.bigram_embeddings.weight"

    def gradient(model: Transformer) -> torch.Tensor:
        model.loss_sum(inputs, targets, weights).backward()
        found = model.get_parameter(table).grad
        assert found is not None
        return found.clone()

    first, twice = gradient(model), gradient(model)
    assert first[met].any(1).all() and not first[~met].any()
    torch.testing.assert_close(twice, 2 * first)
    twin = speedrun(**(ALL | {"bigram_rows": 22})).compute_in(dtype)
    twin.load_state_dict(model.state_dict() | {table: model.get_parameter(table)[rows.flatten()]})
    monkeypatch.setattr(extras, "bigram_hash", lambda *_: torch.arange(22).view(2, 11))
    expected = torch.zeros_like(first).index_add_(0, rows.flatten(), gradient(twin))
    torch.testing.assert_close(first, expected)


def test_fresh_weights_start_as_nanochat_says():
    config = dataclasses.replace(PLAIN, **(ALL | {"final_logit_softcapping": 15.0}))
    model, again = Transformer(config, seed=4), Transformer(config, seed=4)
    p = dict(model.named_parameters())
    assert all(torch.equal(p[n], q) for n, q in again.named_parameters())
    assert p["model.residual_scalars"].tolist() == pytest.approx([1.15, 1.1167, 1.0833, 1.05], 1e-4)
    assert p["model.embedding_scalars"].tolist() == pytest.approx([0.2, 0.15, 0.1, 0.05], 1e-4)
    assert p["model.backout_scale"].item() == pytest.approx(0.2)
    assert p["model.smear.scale"].item() == 0
    assert not p["model.bigram_embeddings.weight"].any()
    assert p["model.bigram_scale"].tolist() == pytest.approx([0.1] * 4)
    without = Transformer(dataclasses.replace(config, bigram_rows=0), seed=4)
    assert all(torch.equal(p[n], q) for n, q in without.named_parameters())
    assert all(not p[n].any() for n in p if n.endswith(("o_proj.weight", "down_proj.weight")))
    ids = tokens()
    loss = model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(2, 11)) / 22
    assert loss.item() == pytest.approx(math.log(96), abs=0.01)


@pytest.mark.parametrize("name", ["all", "tied"])
def test_save_and_load_give_the_same_logits(tmp_path, name):
    model = speedrun(**(ALL if name == "all" else ALL | FLAGS["tied"]))
    model.save(tmp_path)
    again = Transformer.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"window_pattern": "S", "sliding_window": None},
        {"smear": None},
        {"bigram_rows": -1},
        {"bigram_rows": "40"},
        {"bigram_rows": 41},
    ],
)
def test_a_broken_config_is_refused_in_words(tmp_path, change):
    speedrun(**ALL).save(tmp_path)
    path = tmp_path / "config.json"
    table = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in table.items() if k != "smear" or v is not None}))
    with pytest.raises(UserError):
        Transformer.load(tmp_path)


def test_a_checkpoint_that_is_older_than_the_table_loads(tmp_path):
    model = speedrun(**(ALL | {"bigram_rows": 0}))
    model.save(tmp_path)
    path = tmp_path / "config.json"
    table = json.loads(path.read_text())
    assert table.pop("bigram_rows") == 0
    path.write_text(json.dumps(table))
    again = Transformer.load(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(tokens()), model(tokens()))
