"""What a network computes in: the policy, layer by layer, and how near to float32 it stays."""

import pytest
import torch

from fledge.errors import UserError
from fledge.model import Transformer, fp8, loss, precision
from fledge.model.extras import ReluSquared
from fledge.model.layers import Linear, rms_norm, rotary_table, rotate
from fledge.products import rounded_linear
from tests.model.test_extras import ALL, speedrun
from tests.model.test_transformer import CONFIG, random_model

MAKERS = {"qwen3": random_model, "speedrun": lambda: speedrun(**ALL)}
IDS = torch.randint(0, 96, (4, 33), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.full((4, 32), 1 / 128)
NEAR = {"bfloat16": 0.1, "float16": 0.02}  # a gradient's error over its norm, the worst parameter


def size(gradients: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What a gradient's error is measured by: its norm. A scalar's is a sum over all tokens that
    may cancel, to 1/1000 of the others: then 5 % of them all (12 seeds: 0.36 of its norm, 0.11 of
    this; with bigram_rows 1.8 and 0.07)."""
    own = gradients[name].norm()
    if gradients[name].ndim > 1:
        return own
    return own.maximum(0.05 * torch.nn.utils.get_total_norm(list(gradients.values())))


def gradients(model: Transformer, scale: float = 1.0) -> tuple[float, dict[str, torch.Tensor]]:
    total = model.add_gradients(IDS[:, :-1], IDS[:, 1:], WEIGHTS * scale)
    found = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    return total / scale, found


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", NEAR)
def test_half_precision_is_near_float32_and_keeps_masters(kind, name):
    plain, half = MAKERS[kind](), MAKERS[kind]().compute_in(name)
    expected, right = gradients(plain)
    # float16 with a scale, as the loop has it: a token's share of the loss is small
    found, ours = gradients(half, 2.0**10)
    assert found == pytest.approx(expected, rel=2e-3)
    for key, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert (gradient - right[key]).norm() < NEAR[name] * size(right, key), key
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert not any(torch.equal(ours[k], right[k]) for k in ours if "proj" in k)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_stream_is_in_16_bits_and_logits_are_not(kind):
    model = MAKERS[kind]().compute_in("bfloat16")
    seen = {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _, i, o, n=name: seen.update({n: (i[0].dtype, o.dtype)})
            )
    logits = model(IDS)
    assert logits.dtype == torch.float32 and model.hidden(IDS).dtype == torch.bfloat16
    for name, (inside, outside) in seen.items():
        if name == "lm_head":
            assert (inside, outside) == (torch.bfloat16, torch.float32)
        else:
            assert outside == torch.bfloat16, name
    assert model.compute_dtype == torch.bfloat16 and model.dtype == torch.float32
    assert model.new_cache(2, 8).keys[0].dtype == torch.bfloat16
    losses = model.token_losses(IDS[:, :-1], IDS[:, 1:])
    assert losses.dtype == torch.float32
    model.compute_in("float32")
    assert model.hidden(IDS).dtype == torch.float32


@pytest.mark.parametrize("kind", MAKERS)
def test_rounded_products_leave_the_stream_and_evaluation_alone(kind):
    plain, rounded = MAKERS[kind](), MAKERS[kind]().compute_in("bfloat16_products")
    expected, right = gradients(plain)
    found, ours = gradients(rounded)
    assert found == pytest.approx(expected, rel=2e-3) and found != expected
    for key, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert (gradient - right[key]).norm() < NEAR["bfloat16"] * size(right, key), key
    assert not any(torch.equal(ours[k], right[k]) for k in ours if "proj" in k)
    assert rounded.hidden(IDS).dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(rounded(IDS), plain(IDS))


def test_a_rounded_product_is_that_of_rounded_matrices():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(6, 8, generator=generator, requires_grad=True)
    y = rounded_linear(x, weight)
    (y * torch.arange(6.0)).sum().backward()
    near, small = x.detach().bfloat16().float(), weight.detach().bfloat16().float()
    torch.testing.assert_close(y, near @ small.T, rtol=2**-7, atol=1e-2)
    slope = torch.arange(6.0).expand(2, 5, 6)
    torch.testing.assert_close(x.grad, slope @ small, rtol=2**-7, atol=1e-2)
    expected = slope.flatten(0, 1).T @ near.flatten(0, 1)
    torch.testing.assert_close(weight.grad, expected, rtol=2**-7, atol=1e-2)


def test_norm_and_rotation_round_once():
    """Computed in float32 from 16-bit inputs: the result is the nearest 16-bit number."""
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.rand(64, generator=torch.Generator().manual_seed(2))
    wide = x.float()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.bfloat16().float()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), exact.bfloat16(), rtol=2**-8, atol=0)
    cos, sin = rotary_table(5, 64, 10000.0)
    a, b = wide.chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).bfloat16()
    assert torch.equal(rotate(x, cos, sin), turned)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_sums_in_float32(cap, dtype):
    """Against the naive twin in float64 on the same rounded inputs; the softmax is not rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 32, generator=generator).to(dtype)
    head = 0.3 * torch.randn(5000, 32, generator=generator)
    targets = torch.randint(0, 5000, (40,), generator=generator)
    weights = torch.rand(40, generator=generator)
    total = loss.linear_cross_entropy(x, head, targets, weights, cap=cap)
    exact = loss.naive_linear_cross_entropy(
        x.double(), head.to(dtype).double(), targets, weights, cap=cap
    )
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_loss_that_never_looks_at_its_numbers_is_the_same(cap, monkeypatch):
    """The way of GPUs, here on a CPU; with a target whose probability vanishes."""
    monkeypatch.setattr(loss, "_looks", lambda x: False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    x.data[3] *= 1000
    head = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (9,), generator=generator)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    found = []
    for function in (loss.linear_cross_entropy, loss.naive_linear_cross_entropy):
        total = function(x, head, targets, weights, cap=cap)
        found.append((total, *torch.autograd.grad(total, (x, head))))
    for ours, twin in zip(*found, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-9, atol=1e-9)


def test_larger_chunks_where_products_must_be_large():
    assert loss.chunk_rows(32768) == 256 and loss.chunk_rows(32768, "cuda") == 4096


# -- fp8 -----------------------------------------------------------------------------------------


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_8_bits_are_right_to_four_percent_whatever_the_size(size):
    """Root mean square error of products of normal numbers over that of the product itself."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 256, generator=generator) * size**0.5).bfloat16().requires_grad_()
    weight = (torch.randn(512, 256, generator=generator) * size**0.5).requires_grad_()
    y = fp8.fp8_linear(x, weight)
    assert y.dtype == torch.bfloat16 and y.shape == (64, 512)
    right = x.detach().double() @ weight.detach().double().T
    assert 0.005 < relative(y.detach(), right) < 0.04
    up = torch.randn(64, 512, generator=generator).bfloat16() * size**-0.5
    y.backward(up)
    assert x.grad is not None and weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    # two bits of mantissa: a step of 1/4, an error of 1/4/sqrt(12) relative, about 5.5 %
    assert 0.01 < relative(x.grad, up.double() @ weight.detach().double()) < 0.08
    assert 0.01 < relative(weight.grad, up.double().T @ x.detach().double()) < 0.08


def test_8_bit_gradients_are_those_of_the_rounded_numbers():
    """By hand, in float32 from the rounded tensors: what is left is bfloat16's rounding."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 128, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(144, 128, generator=generator).requires_grad_()
    up = torch.randn(32, 144, generator=generator).bfloat16()
    fp8.fp8_linear(x, weight).backward(up)
    (a, sa), (b, sb) = fp8.rounded(x.detach(), fp8.INPUT), fp8.rounded(weight.detach(), fp8.INPUT)
    g, sg = fp8.rounded(up, fp8.GRADIENT)
    a, b, g = a.float() * sa, b.float() * sb, g.float() * sg
    assert x.grad is not None and weight.grad is not None
    torch.testing.assert_close(x.grad, (g @ b).bfloat16(), rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(weight.grad, (g.T @ a).bfloat16().float(), rtol=2**-7, atol=1e-2)


def test_the_largest_magnitude_meets_the_largest_number_and_nothing_goes_beyond():
    small, scale = fp8.rounded(torch.tensor([[3e38, -1e30, 0.0]]), fp8.INPUT)
    assert small.float().abs().max() == 448 and (small.float() * scale)[0, 0] == pytest.approx(3e38)
    zeros, scale = fp8.rounded(torch.zeros(2, 2), fp8.INPUT)
    assert not zeros.float().any() and torch.isfinite(scale)
    for bad in (float("nan"), float("inf")):
        assert fp8.rounded(torch.tensor([1.0, bad]), fp8.GRADIENT)[0].float().isnan().any()


def wide_model() -> Transformer:
    """Feed-forward layers of 256 x 640, attention of 256 x 256 and, for k and v, 64 x 256."""
    import dataclasses

    shape = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 32}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return random_model(dataclasses.replace(CONFIG, **shape, **heads))


def test_fp8_is_for_large_layers_in_training_only():
    model = wide_model().compute_in("fp8")
    small = {
        n.rpartition(".")[2]
        for n, m in model.named_modules()
        if isinstance(m, Linear) and not m.fp8
    }
    large = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, Linear) and m.fp8
    }
    assert small == {"k_proj", "v_proj"}
    assert large == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    half = wide_model().compute_in("bfloat16")
    with torch.no_grad():  # evaluation is bfloat16's, bit for bit
        assert torch.equal(model(IDS), half(IDS))
    assert not torch.equal(model(IDS[:, :32]), half(IDS[:, :32]))
    expected, right = gradients(wide_model())
    found, ours = gradients(model)
    assert found == pytest.approx(expected, rel=0.02)
    cosines = [
        torch.nn.functional.cosine_similarity(ours[k].flatten(), right[k].flatten(), dim=0).item()
        for k in ours
    ]
    assert min(cosines) > 0.95  # 5.5 % a layer, over several layers


def test_rows_that_make_no_whole_tiles_are_computed_in_bfloat16():
    layer = Linear(128, 128)
    torch.nn.init.normal_(layer.weight)
    layer.fp8 = True
    x = torch.randn(2, 9, 128).bfloat16()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight.bfloat16()))
    assert not torch.equal(
        layer(x[:, :8]), torch.nn.functional.linear(x[:, :8], layer.weight.bfloat16())
    )


def test_the_squared_layer_in_8_bits():
    layer = ReluSquared(128, 256)
    for part in (layer.up_proj, layer.down_proj):
        torch.nn.init.normal_(part.weight, std=0.1)
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = layer(x)
    precision.set_precision(layer, "fp8")
    assert layer.up_proj.fp8
    eight = layer(x)
    assert not torch.equal(eight, plain) and relative(eight, plain.double()) < 0.08


def test_fp8_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="H100"):
        precision._require_fp8(torch.device("cuda"))
    with pytest.raises(UserError, match="mps"):
        precision._require_fp8(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    precision._require_fp8(torch.device("cuda"))


# -- activations ---------------------------------------------------------------------------------


def kept_bytes(model: Transformer) -> int:
    """What a forward pass keeps for the backward pass, weights and their copies left out."""
    shapes = {p.shape for p in model.parameters()} | {
        p.mT.shape for p in model.parameters() if p.ndim > 1
    }
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in shapes and tensor.is_floating_point():
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.hidden(IDS[:, :-1])
    del states
    return sum(found.values())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_checkpointed_activations_change_no_bit_and_keep_little(kind, name):
    plain = MAKERS[kind]().compute_in(name)
    again = MAKERS[kind]().compute_in(name, checkpoint_activations=True)
    assert kept_bytes(again) < 0.3 * kept_bytes(plain)
    for _ in range(2):  # the second pass adds to gradients that exist
        (one, a), (other, b) = gradients(plain), gradients(again)
        assert one == other
        assert all(torch.equal(a[key], b[key]) for key in a)
    with torch.no_grad():
        assert torch.equal(plain(IDS), again(IDS))
