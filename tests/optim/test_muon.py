"""Muon's orthogonalisation and step; schedules; optimizer state by name."""

import pytest
import torch
from tests.model.test_transformer import CONFIG

from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.muon import Muon, orthogonalize
from fledge.optim.schedule import Schedule

RATES = LearningRates(0.02, 0.1, 0.01, 0.01, 0.1)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_orthogonalize_is_close_to_the_polar_factor(shape, condition):
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    singular = torch.logspace(0, -torch.log10(torch.tensor(condition)), u.shape[1])
    result = orthogonalize((u * singular) @ vh)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.2
    polar = u @ vh
    cosine = (result * polar).sum() / (result.norm() * polar.norm())
    assert cosine > 0.99


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
