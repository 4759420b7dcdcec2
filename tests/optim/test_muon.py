"""Muon's orthogonalisation and step; schedules; optimizer state by name."""

import subprocess
import sys

import pytest
import torch

from fledge.model import Transformer
from fledge.optim.groups import (
    ADAM_GROUPS,
    SPEEDRUN_GROUPS,
    LearningRates,
    Optimizers,
    kind_of,
)
from fledge.optim.muon import Muon, even_out, orthogonalize
from fledge.optim.schedule import Schedule
from tests.helpers_mini import environment
from tests.model.test_extras import ALL, speedrun
from tests.model.test_transformer import CONFIG

RATES = LearningRates(0.02, 0.1, 0.01, 0.01, 0.1)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("products", [None, torch.bfloat16, torch.float16])
def test_orthogonalize_is_close_to_the_polar_factor(shape, condition, products):
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    singular = torch.logspace(0, -torch.log10(torch.tensor(condition)), u.shape[1])
    result = orthogonalize((u * singular) @ vh, products=products)
    assert result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.2
    polar = u @ vh
    cosine = (result * polar).sum() / (result.norm() * polar.norm())
    assert cosine > 0.99


def test_small_gradients_are_not_lost_in_16_bits():
    gradient = 1e-5 * torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    whole = orthogonalize(gradient)
    for products in (torch.bfloat16, torch.float16):
        half = orthogonalize(gradient, products=products)
        cosine = (half * whole).sum() / (half.norm() * whole.norm())
        assert cosine > 0.999 and not torch.equal(half, whole)


def test_muon_multiplies_in_what_the_network_does():
    for dtype, products in (("float32", None), ("fp8", torch.bfloat16), ("float16", torch.float16)):
        model = Transformer(CONFIG, seed=0).compute_in(dtype)
        assert Optimizers(model, RATES).muon.products == products
    assert Optimizers(Transformer(CONFIG, seed=0).double(), RATES).muon.products is None


def test_a_stack_of_matrices_is_orthogonalised_matrix_by_matrix():
    stack = torch.randn(3, 8, 20)
    one_by_one = torch.stack([orthogonalize(m) for m in stack])
    torch.testing.assert_close(orthogonalize(stack), one_by_one, rtol=1e-4, atol=1e-4)


def test_a_step_moves_every_direction_by_the_learning_rate():
    weight = torch.nn.Parameter(torch.zeros(32, 16))
    muon = Muon([weight], lr=0.5)
    weight.grad = torch.randn(32, 16)
    muon.step()
    moved = torch.linalg.svdvals(weight.detach()) / (0.5 * 2**0.5)  # sqrt(rows / columns)
    assert moved.min() > 0.7 and moved.max() < 1.2


def test_every_parameter_has_exactly_one_optimizer():
    model = Transformer(CONFIG, seed=0)
    optimizers = Optimizers(model, RATES)
    seen = [p for o in optimizers.all for g in o.param_groups for p in g["params"]]
    assert len(seen) == len(set(seen)) == len(list(model.parameters()))
    muon = {optimizers.names[p] for g in optimizers.muon.param_groups for p in g["params"]}
    assert muon == {n for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}


def test_state_by_name_continues_exactly():
    def step(model: Transformer, optimizers: Optimizers, seed: int) -> None:
        ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(seed))
        model.loss_sum(ids[:, :-1], ids[:, 1:], torch.ones(2, 8)).backward()
        optimizers.step()

    model = Transformer(CONFIG, seed=0)
    optimizers = Optimizers(model, RATES)
    for seed in range(3):
        step(model, optimizers, seed)
    copy = Transformer(CONFIG)
    copy.load_state_dict(model.state_dict())
    resumed = Optimizers(copy, RATES)
    resumed.load_state_tensors(optimizers.state_tensors())
    step(model, optimizers, 9)
    step(copy, resumed, 9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name]), name


def test_schedule_warms_up_holds_and_cools_down():
    schedule = Schedule(steps=100, warmup_steps=10, cooldown_fraction=0.4, final_lr_fraction=0.1)
    factors = [schedule.factor(s) for s in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0
    assert all(f == 1.0 for f in factors[9:60])
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert 0.1 < factors[99] < 0.13


def test_rows_move_equally_fast_and_the_norm_of_the_matrix_stays():
    """NorMuon by its formula, two steps, for a tall, a wide and a stack of matrices."""
    generator = torch.Generator().manual_seed(0)
    for shape, across in (((12, 5), -1), ((5, 12), -2), ((3, 12, 5), -1)):
        average = torch.full_like(torch.zeros(shape).mean(across, keepdim=True), 0.25)
        expected = average.clone()
        for _ in range(2):
            update = torch.randn(shape, generator=generator) * torch.rand(shape).sqrt()
            got = even_out(update, average, 0.9)
            expected = 0.9 * expected + 0.1 * update.square().mean(across, keepdim=True)
            divided = update / expected.sqrt()
            norms = update.norm(dim=(-2, -1), keepdim=True)
            divided = divided * norms / divided.norm(dim=(-2, -1), keepdim=True)
            torch.testing.assert_close(average, expected)
            torch.testing.assert_close(got, divided)


def test_variance_scaling_leaves_the_first_step_nearly_plain():
    start = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    moved = []
    for beta2 in (0.0, 0.9):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        Muon([weight], lr=0.1, beta2=beta2).step()
        moved.append(start - weight.detach())
    assert not torch.equal(*moved)
    cosine = (moved[0] * moved[1]).sum() / (moved[0].norm() * moved[1].norm())
    assert cosine > 0.99 and moved[1].norm() == pytest.approx(moved[0].norm().item(), rel=1e-4)


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_a_stack_of_experts_is_trained_like_its_matrices(beta2):
    """[E, rows, columns] moves exactly as E parameters of [rows, columns] do, over three steps."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 10, 6, generator=generator)
    stack = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(m.clone()) for m in start]
    one = Muon([stack], lr=0.1, weight_decay=0.1, beta2=beta2)
    many = Muon(parts, lr=0.1, weight_decay=0.1, beta2=beta2)
    for _ in range(3):
        stack.grad = torch.randn(3, 10, 6, generator=generator)
        for part, grad in zip(parts, stack.grad, strict=True):
            part.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in parts]))


def test_decay_is_cautious():
    """Only where the update has the sign of the weight is the weight shrunk."""
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
    after = []
    for decay in (0.0, 0.5):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        Muon([weight], lr=0.1, weight_decay=decay).step()
        after.append(weight.detach())
    shrunk = after[0] - after[1]
    agrees = (start - after[0]) * start > 0
    torch.testing.assert_close(shrunk[agrees], 0.05 * start[agrees])
    assert shrunk[~agrees].eq(0).all() and 0 < agrees.sum() < 64


def test_muon_moves_along_torchs_own():
    """torch.optim.Muon has other polynomials and no cautious decay; the direction is the same."""
    start = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    own = Muon([ours], lr=0.1)
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        ours.grad = torch.randn(32, 16, generator=generator)
        theirs.grad = ours.grad.clone()
        own.step()
        other.step()
    a, b = (start - p.detach() for p in (ours, theirs))
    assert (a * b).sum() / (a.norm() * b.norm()) > 0.98


@pytest.mark.parametrize("arch", ["qwen3", "speedrun"])
def test_what_muon_does_not_train_moves_as_under_torchs_adamw(arch):
    every = ALL | {"norm_weights": True}
    model = speedrun(**every) if arch == "speedrun" else Transformer(CONFIG, seed=0)
    optimizers = Optimizers(model, RATES)
    twins = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    table = SPEEDRUN_GROUPS if arch == "speedrun" else ADAM_GROUPS
    plain = {}
    for name, twin in twins.items():
        kind = kind_of(name, twin)
        if kind != "matrix":
            g = table[kind]
            plain[name] = torch.optim.AdamW(
                [twin],
                lr=getattr(RATES, g.lr) * g.share,
                betas=g.betas,
                weight_decay=g.weight_decay,
                eps=1e-10,
                fused=True,
            )
    assert {kind_of(n, p) for n, p in twins.items()} == {"matrix", *table}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name in plain:
                twins[name].grad = parameter.grad.clone()
                plain[name].step()
        optimizers.step()
    for name, parameter in model.named_parameters():
        if name in plain:
            assert torch.equal(parameter, twins[name]), name


def test_the_optimizers_do_not_import_torchs_compiler():
    program = (
        "import sys, torch, fledge.optim.groups as g\n"
        "from fledge.model import ModelConfig, Transformer\n"
        "m = Transformer(ModelConfig(64, 32, 1, 2, 2, 16, 48, 16), seed=0)\n"
        "o = g.Optimizers(m, g.LearningRates(0.1, 0.1, 0.1, 0.1, 0.1))\n"
        "i = torch.arange(8)[None]\n"
        "m.add_gradients(i, i, torch.ones(1, 8))\n"
        "o.step()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=environment())


def test_gradients_are_zero_and_keep_their_memory_after_a_step():
    model = Transformer(CONFIG, seed=0)
    optimizers = Optimizers(model, RATES)
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    model.add_gradients(ids[:, :-1], ids[:, 1:], torch.ones(2, 8) / 16)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizers.step()
    assert not any(g.any() for g in gradients)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_sqrt_cooldown_falls_fast_first():
    linear = Schedule(100, 0, 0.5, 0.1)
    sqrt = Schedule(100, 0, 0.5, 0.1, cooldown_shape="sqrt")
    assert [sqrt.factor(s) for s in range(51)] == [1.0] * 51
    assert sqrt.factor(75) == pytest.approx(0.1 + 0.9 * (1 - 0.5**0.5))
    assert all(sqrt.factor(s) < linear.factor(s) for s in range(51, 100))
    factors = [sqrt.factor(s) for s in range(50, 100)]
    assert factors == sorted(factors, reverse=True) and factors[-1] > 0.1


def test_decay_and_momentum_follow_their_schedules():
    plain = Schedule(1000, 0, 0.4, 0.1)
    assert {plain.decay_factor(s) for s in range(1000)} == {1.0}
    assert {plain.momentum(s) for s in range(1000)} == {0.95}
    moving = Schedule(1000, 0, 0.4, 0.1, decay_schedule="cosine", momentum_schedule="warm")
    assert moving.decay_factor(0) == 1.0 and moving.decay_factor(500) == pytest.approx(0.5)
    assert moving.decay_factor(999) < 1e-4
    assert moving.momentum(0) == 0.85 and moving.momentum(200) == pytest.approx(0.91)
    assert moving.momentum(400) == moving.momentum(600) == pytest.approx(0.97)
    assert moving.momentum(800) == pytest.approx(0.935)
    optimizers = Optimizers(Transformer(CONFIG, seed=0), RATES)
    optimizers.follow(moving, 800)
    (group,) = optimizers.muon.param_groups
    assert group["momentum"] == pytest.approx(0.935)
    assert group["weight_decay"] == pytest.approx(0.1 * moving.decay_factor(800))
    assert group["lr"] == pytest.approx(0.02 * moving.factor(800))
