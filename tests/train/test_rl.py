"""GRPO: advantages, the closed-form gradient, and that it learns."""

import pytest
import torch

from fledge.engine import Completion, Engine
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.train import rl
from fledge.train.loop import Job
from tests.helpers_model import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def completion(ids: list[int], sampled: list[bool] | None = None) -> Completion:
    mask = [True] * len(ids) if sampled is None else sampled
    return Completion(ids, [0.0] * len(ids), mask, "stop")


def groups() -> list[rl.Rollout]:
    one = [completion([4, 5]), completion([6, 7, 8]), completion([9], [True])]
    two = [completion([1, 2, 3], [True, False, True]), completion([5])]
    return rl.group_rollouts([10, 11], one, [1.0, 0.0, 0.0]) + rl.group_rollouts(
        [12], two, [0.0, 1.0]
    )


def test_advantage_is_reward_minus_group_mean_and_zero_for_equal_groups():
    assert [r.advantage for r in groups()][:3] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    equal = rl.group_rollouts([1], [completion([2]), completion([3])], [1.0, 1.0])
    assert [r.advantage for r in equal] == [0.0, 0.0]


@pytest.mark.parametrize("micro_tokens", [1, 6, 4096])
def test_gradient_equals_the_closed_form(monkeypatch, micro_tokens):
    monkeypatch.setattr(rl, "MICRO_TOKENS", micro_tokens)
    model, rollouts = tiny_model(TOKENIZER.vocab_size), groups()
    rl.policy_gradient(model, rollouts)
    twin = tiny_model(TOKENIZER.vocab_size)
    tokens = sum(sum(r.sampled) for r in rollouts)
    loss = torch.zeros(())
    for r in rollouts:  # -sum(advantage * log p(sampled token)) / sampled tokens of the step
        logprobs = twin(torch.tensor([r.ids]))[0].log_softmax(-1)
        for t in range(1, len(r.ids)):
            if r.sampled[t]:
                loss = loss - r.advantage * logprobs[t - 1, r.ids[t]] / tokens
    loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_groups_of_equal_reward_leave_the_model_alone():
    model = tiny_model(TOKENIZER.vocab_size)
    rollouts = rl.group_rollouts([1], [completion([2]), completion([3])], [0.0, 0.0])
    assert rl.policy_gradient(model, rollouts) == 0.0
    assert all(p.grad is None for p in model.parameters())


class Hooks:
    def __init__(self) -> None:
        self.rows: list[dict] = []

    def evaluate(self, step):
        return {}

    def log(self, row):
        self.rows.append(row)

    def save(self, step): ...

    def stop_requested(self):
        return False

    def restore(self):
        return None

    def note(self, text): ...

    def diverged(self, step):
        return UserError("what", "why", "fix")


def test_reward_rises_on_a_toy_problem():
    """Say an even token: learnt within thirty steps from about one half."""
    model = tiny_model(TOKENIZER.vocab_size)
    hooks = Hooks()
    with Tools() as tools:
        optimizers = Optimizers(model, LearningRates(0.02, 0.05, 0.02, 0.01, 0.0))
        rl.train_rl(
            Job(model, optimizers, Schedule(30, 0, 0.0, 1.0), hooks, 100, 100),
            engine=Engine(model, TOKENIZER),
            tools=tools,
            problem=lambda i: ({}, [i % 7 + 1]),
            reward=lambda item, ids: sum(t % 2 == 0 for t in ids) / len(ids),
            config=rl.RlConfig(4, 8, 4, 1.0, 0),
        )
    rewards = [row["reward"] for row in hooks.rows]
    assert sum(rewards[:3]) / 3 < 0.65 and sum(rewards[-3:]) / 3 > 0.9
