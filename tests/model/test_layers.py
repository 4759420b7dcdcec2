"""Fast kernels equal their readable twins."""

import pytest
import torch

from fledge.model import attention, layers


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_its_naive_twin(kv_heads, masked):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 5, 8, generator=generator)
    k, v = torch.randn(2, 3, kv_heads, 5, 8, generator=generator)
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask[1, :, :, 0] = True
        mask[1, :, 3:, 1] = False
    torch.testing.assert_close(
        attention.attend(q, k, v, mask), attention.naive_attend(q, k, v, mask)
    )


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_a_window_equals_its_naive_twin(kv_heads, window):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 7, 8, generator=generator)
    k, v = torch.randn(2, 3, kv_heads, 7, 8, generator=generator)
    ours = attention.attend(q, k, v, None, window=window, scale=0.4)
    twin = attention.naive_attend(q, k, v, None, window=window, scale=0.4)
    torch.testing.assert_close(ours, twin)
    if window == 1:  # a token sees itself alone
        torch.testing.assert_close(ours, v.repeat_interleave(4 // kv_heads, dim=1))


def by_the_words_of_varlen(q, k, v, ends, same, longest, also, *, scale, window_size, enable_gqa):
    """What torch's documentation says `varlen_attn` computes, sequence by sequence."""
    assert torch.equal(ends, same) and longest == also and ends.dtype == torch.int32
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    out = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        a, b, c = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        place = torch.arange(end - start)
        back = place[:, None] - place
        mask = (back <= left) & (back >= -right)
        out.append(attention.naive_attend(a, b, c, mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_kernel_for_windows_is_asked_for_the_same(kv_heads, monkeypatch):
    """It runs on GPUs only; here a stand-in made from its documentation answers."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 7, 8, generator=generator)
    k, v = torch.randn(2, 3, kv_heads, 7, 8, generator=generator)
    expected = attention.attend(q, k, v, None, window=3, scale=0.4)
    monkeypatch.setattr(attention, "window_kernel", lambda q: by_the_words_of_varlen)
    torch.testing.assert_close(attention.attend(q, k, v, None, window=3, scale=0.4), expected)
    # rows that are no longer than the window need none
    monkeypatch.setattr(attention, "window_kernel", lambda q: pytest.fail("asked"))
    attention.attend(q, k, v, None, window=7)


def test_the_kernel_is_there_on_the_gpus_that_have_it(monkeypatch):
    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel = attention.window_kernel(OnGpu())  # type: ignore[arg-type]
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert callable(kernel) or not newer
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert attention.window_kernel(OnGpu()) is None  # type: ignore[arg-type]
    assert attention.window_kernel(torch.zeros(1, 1, 1, 8)) is None


def test_rotation_keeps_length_and_depends_on_distance_only():
    cos, sin = layers.rotary_table(32, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        a = layers.rotate(q, cos[i : i + 1], sin[i : i + 1])
        b = layers.rotate(k, cos[j : j + 1], sin[j : j + 1])
        return float((a * b).sum())

    assert score(3, 1) == pytest.approx(score(20, 18), abs=1e-5)
    turned = layers.rotate(q, cos[7:8], sin[7:8])
    assert float(turned.norm()) == pytest.approx(float(q.norm()), abs=1e-5)


def test_an_embedding_adds_the_same_gradient_in_place():
    ids = torch.tensor([[3, 1, 3], [0, 3, 1]])
    scale = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    tables = [layers.Embedding(6, 4) for _ in range(2)]
    torch.nn.init.normal_(tables[0].weight)
    tables[1].load_state_dict(tables[0].state_dict())
    tables[1].weight.grad = torch.zeros(6, 4)
    for _ in range(2):  # accumulates
        for table in tables:
            (table(ids) * scale).sum().backward()
    assert tables[0].weight.grad is not None and tables[0].weight.grad[[2, 4, 5]].eq(0).all()
    torch.testing.assert_close(tables[1].weight.grad, tables[0].weight.grad)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_norm_has_the_gradients_of_torchs(weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, dtype=torch.double, generator=generator, requires_grad=True)
    weight = torch.randn(7, dtype=torch.double, generator=generator, requires_grad=True)
    scale = torch.randn(2, 3, 7, dtype=torch.double, generator=generator)
    inputs = (x, weight) if weighted else (x,)
    gain = weight if weighted else None
    ours = layers.rms_norm(x, gain, 1e-3)
    theirs = torch.nn.functional.rms_norm(x, (7,), gain, 1e-3)
    torch.testing.assert_close(ours, theirs)
    pairs = (torch.autograd.grad((y * scale).sum(), inputs) for y in (ours, theirs))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_rotation_has_the_gradient_of_its_naive_twin():
    cos, sin = (t.double() for t in layers.rotary_table(5, 8, 10000.0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.double, generator=generator).transpose(1, 2)
    x = x.requires_grad_()
    scale = torch.randn(2, 3, 5, 8, dtype=torch.double, generator=generator)
    ours, theirs = layers.rotate(x, cos, sin), layers.naive_rotate(x, cos, sin)
    torch.testing.assert_close(ours, theirs)
    (a,), (b,) = (torch.autograd.grad((y * scale).sum(), x) for y in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_a_norm_that_overflows_is_not_a_quiet_zero():
    """Weights that exploded must show in the loss, or the trainer would go on with nothing."""
    x = torch.full((1, 4), 1e30, requires_grad=True)
    assert layers.rms_norm(x, None, 1e-6).isnan().all()
