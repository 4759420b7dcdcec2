"""The GRPO family: losses against closed forms, what is trained on and what not, that it learns."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.engine import Completion, Engine, SamplingParams
from fledge.engine.tools import Tools
from fledge.errors import UserError
from fledge.model import Transformer
from fledge.optim.groups import LearningRates, Optimizers
from fledge.optim.schedule import Schedule
from fledge.train import rl
from fledge.train.loop import Job
from tests.helpers_model import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
LOSSES = ("reinforce", "grpo", "dr_grpo", "dapo", "cispo")


def config(loss: Any = "reinforce", **changes: Any) -> rl.RlConfig:
    return rl.RlConfig(4, 8, 4, 1.0, 0, loss=loss, **changes)


def graded(reward: float) -> rl.Graded:
    return rl.Graded(reward, reward >= 1)


def completion(
    ids: list[int], sampled: list[bool] | None = None, finish: str = "stop", logprob: float = -1.0
) -> Completion:
    mask = [True] * len(ids) if sampled is None else sampled
    return Completion(ids, [logprob if s else 0.0 for s in mask], mask, finish)


def group(prompt: list[int], rewards: list[float], *answers: Completion, loss: Any = "reinforce"):
    return rl.group_rollouts(prompt, answers, [graded(r) for r in rewards], loss)


def rollouts_of(loss: Any = "reinforce", model: Transformer | None = None) -> list[rl.Rollout]:
    """Two groups, one with a tool's output inside; log-probabilities of `model`, if given."""
    one = [completion([4, 5]), completion([6, 7, 8]), completion([9], [True])]
    two = [completion([1, 2, 3], [True, False, True]), completion([5], finish="length")]
    found = group([10, 11], [1.0, 0.0, 0.0], *one, loss=loss)
    found += group([12], [0.0, 1.0], *two, loss=loss)
    if model is not None:
        for r in found:
            table = model(torch.tensor([r.ids]))[0].double().log_softmax(-1)
            r.logprobs = [
                table[t - 1, r.ids[t]].item() for t in range(1, len(r.ids)) if r.sampled[t]
            ]
    return found


# --------------------------------------------------------------------------------------- the losses


def closed_form(
    c: rl.RlConfig, rows: list[rl.Rollout], model: Transformer, rewards: list[list[float]]
) -> torch.Tensor:
    """The table of the module's docstring, token by token, from rewards alone."""
    flat = [(r, own) for own in rewards for r in own]
    total, sampled = torch.zeros((), dtype=torch.float64), sum(sum(r.sampled) for r in rows)
    for row, (reward, own) in zip(rows, flat, strict=True):
        advantage = reward - sum(own) / len(own)
        if c.loss in ("grpo", "dapo", "cispo"):
            advantage /= statistics.stdev(own) + 1e-4
        table, at = model(torch.tensor([row.ids]))[0].double().log_softmax(-1), 0
        for t in range(1, len(row.ids)):
            if not row.sampled[t]:
                continue
            logp, sampler = table[t - 1, row.ids[t]], row.logprobs[at]
            old = logp.item() if row.old is None else row.old[at].item()
            at += 1
            r = math.exp(logp.item() - old)
            w = min(
                c.importance_cap,
                math.exp((logp.item() if c.loss == "reinforce" else old) - sampler),
            )
            if c.loss in ("reinforce", "cispo"):
                r = 1.0 if c.loss == "reinforce" else min(r, 1 + c.eps_high)
                term = -w * r * advantage * logp
            else:
                ratio = (logp - old).exp()
                clipped = ratio.clamp(1 - c.eps_low, 1 + c.eps_high)
                term = -w * torch.min(ratio * advantage, clipped * advantage)
            divisor = {
                "grpo": len(rows) * sum(row.sampled),
                "dr_grpo": len(rows) * c.max_new_tokens,
            }
            total = total + term / divisor.get(c.loss, sampled)
    return total


REWARDS = [[1.0, 0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("micro_tokens", [1, 6, 4096])
@pytest.mark.parametrize("lag", [0.0, 0.5])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_the_closed_form(monkeypatch, loss, lag, micro_tokens):
    """With `lag` the trainer has moved since it sampled: ratios are away from 1, some clipped."""
    monkeypatch.setattr(rl, "MICRO_TOKENS", micro_tokens)
    c = config(loss)
    model = tiny_model(TOKENIZER.vocab_size).double()
    twin = copy.deepcopy(model)
    rows = rollouts_of(loss, model)
    if lag:
        generator = torch.Generator().manual_seed(1)
        for r in rows:
            sampler = torch.tensor(r.logprobs, dtype=torch.float64)
            old = sampler + lag * torch.randn(len(sampler), generator=generator).double()
            r.old, r.logprobs = (
                old,
                (old + 0.4 * torch.randn(len(sampler), generator=generator)).tolist(),
            )
    theirs = closed_form(c, rows, twin, REWARDS)
    totals = rl.policy_gradient(model, rows, c)
    assert totals.loss == pytest.approx(theirs.item(), rel=1e-6)
    theirs.backward()
    for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-6, atol=1e-9)
    if lag and loss != "reinforce":
        assert totals.held > 0, "nothing was clipped: the test would not see a wrong clip"


@given(
    loss=st.sampled_from(LOSSES),
    advantage=st.floats(-2, 2),
    new=st.floats(-4, -0.1),
    old=st.floats(-4, -0.1),
    sampler=st.floats(-4, -0.1),
)
@settings(deadline=None, max_examples=300)
def test_slopes_equal_finite_differences(loss, advantage, new, old, sampler):
    """Where the loss has no kink; what is stopped (weights) stands still in the difference."""
    c = config(loss)
    ratio = math.exp(new - old)
    if min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-3:
        return

    def tensors(value: float) -> tuple[torch.Tensor, ...]:
        columns = (value, old, sampler, advantage)
        return tuple(torch.tensor([x], dtype=torch.float64) for x in columns)

    logprob = tensors(new)[0].requires_grad_()
    loss_value, _ = rl.token_losses(c, logprob, *tensors(new)[1:])
    (slope,) = torch.autograd.grad(loss_value.sum(), logprob)
    h = 1e-6
    if loss == "reinforce":  # w is stopped: only log p moves
        weight = min(2.0, math.exp(new - sampler))
        expected = -weight * advantage
    elif loss == "cispo":
        expected = -min(2.0, math.exp(old - sampler)) * min(ratio, 1.2) * advantage
    else:
        up, down = (rl.token_losses(c, *tensors(new + d))[0].item() for d in (h, -h))
        expected = (up - down) / (2 * h)
    assert slope.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_gradient_equals_finite_differences_through_the_model():
    for loss in ("grpo", "dr_grpo", "dapo"):
        model = tiny_model(TOKENIZER.vocab_size).double()
        rows = rollouts_of(loss, model)
        for r in rows:
            r.old = torch.tensor(r.logprobs, dtype=torch.float64) + 0.05
        c = config(loss, kl_beta=0.3)
        rl.add_reference(tiny_model(TOKENIZER.vocab_size, seed=4).double(), rows, 1.0)
        rl.policy_gradient(model, rows, c)
        weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
        assert weight.grad is not None
        slope, h = weight.grad[3, 5].item(), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[3, 5] += sign * h
            values.append(rl.policy_gradient(copy.deepcopy(model), rows, c).loss)
            with torch.no_grad():
                weight[3, 5] -= sign * h
        assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4, abs=1e-9), loss


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_of_equal_reward_leave_the_gradient_exactly_zero(loss):
    model = tiny_model(TOKENIZER.vocab_size)
    rows = group([1], [0.3, 0.3, 0.3], *[completion([t, t + 1]) for t in (2, 3, 4)], loss=loss)
    assert [r.advantage for r in rows] == [0.0] * 3
    assert rl.policy_gradient(model, rows, config(loss)).tokens == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    # beside a group that does learn they only count in the divisor
    alone, beside = (copy.deepcopy(model) for _ in range(2))
    useful = group([1], [1.0, 0.0], completion([5]), completion([6]), loss=loss)
    rl.policy_gradient(alone, useful, config(loss), (5, 8))
    rl.policy_gradient(beside, useful + rows, config(loss), (5, 8))
    for a, b in zip(alone.parameters(), beside.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_advantages():
    assert rl.advantages([1.0, 0.0, 0.0], "reinforce") == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    scaled = rl.advantages([1.0, 0.0], "dapo")
    assert scaled == pytest.approx([0.5 / (math.sqrt(0.5) + 1e-4), -0.5 / (math.sqrt(0.5) + 1e-4)])
    assert rl.advantages([0.1 + 0.2] * 4, "grpo") == [0.0] * 4


def test_the_end_token_is_trained_and_tool_output_is_not():
    """Only the logit of a sampled token's place has a gradient."""
    end = TOKENIZER.eos_id
    answer = completion([5, 6, 7, end], [True, False, False, True])
    rows = group([1, 2], [1.0, 0.0], answer, completion([9, end]))
    _, targets, trained = rl.padded(rows, torch.device("cpu"))
    assert targets[trained].tolist() == [5, end, 9, end]
    model = tiny_model(TOKENIZER.vocab_size)
    before = model(torch.tensor([rows[0].ids]))[0].log_softmax(-1)
    optimizers = Optimizers(model, LearningRates(0.0, 0.0, 0.01, 0.0, 0.0))
    rl.policy_gradient(model, rows, config())
    optimizers.step()
    after = model(torch.tensor([rows[0].ids]))[0].log_softmax(-1)
    assert after[4, end] > before[4, end], "a right answer's end became likelier"


def test_k3_is_zero_at_the_reference_and_pulls_towards_it():
    model = tiny_model(TOKENIZER.vocab_size)
    rows = rollouts_of("reinforce", model)
    rl.add_reference(copy.deepcopy(model), rows, 1.0)
    for r in rows:
        r.advantage = 0.0
    totals = rl.policy_gradient(model, rows, config(kl_beta=0.5))
    assert totals.kl == pytest.approx(0.0, abs=1e-9) and totals.tokens == 9
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-5  # type: ignore[union-attr]
    other = tiny_model(TOKENIZER.vocab_size, seed=9)
    rl.add_reference(other, rows, 1.0)
    apart = rl.policy_gradient(model, rows, config(kl_beta=0.5)).kl
    assert apart > 0.1
    Optimizers(model, LearningRates(0.0, 0.0, 0.005, 0.0, 0.0)).step()
    for r in rows:
        r.old = None
    assert rl.policy_gradient(model, rows, config(kl_beta=0.5)).kl < apart


def test_importance_weights_recover_the_gradient_of_the_policy():
    """Two tokens, the sampler prefers the other one: the mean of w A dlog p over draws is that of
    on-policy draws, within three standard errors."""
    policy = torch.tensor([0.3, -0.2]).double().log_softmax(-1)
    sampler = torch.tensor([-0.6, 0.5]).double().log_softmax(-1)
    reward = torch.tensor([1.0, 0.0]).double()
    wanted = (policy.exp() * (reward - 0.5)).sum()  # of d/dlog p, summed over tokens
    drawn = torch.multinomial(
        sampler.exp(), 20_000, replacement=True, generator=torch.manual_seed(0)
    )
    logprobs = policy[drawn].requires_grad_()
    each, _ = rl.token_losses(
        config(importance_cap=10.0), logprobs, policy[drawn], sampler[drawn], reward[drawn] - 0.5
    )
    slopes = -torch.autograd.grad(each.sum(), logprobs)[0]
    error = slopes.std() / len(drawn) ** 0.5
    assert abs(slopes.mean() - wanted) < 3 * error
    plain = (reward[drawn] - 0.5).mean()
    assert abs(plain - wanted) > 10 * error, "without weights it would be wrong"


# ----------------------------------------------------------------------------------------- the loop


class Hooks:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.restored = 0
        self.back: Any = None

    def evaluate(self, step):
        return {}

    def log(self, row):
        self.rows.append(row)

    def save(self, step): ...

    def stop_requested(self):
        return False

    def restore(self):
        self.restored += 1
        return self.back() if self.back else None

    def note(self, text):
        self.notes.append(text)

    def diverged(self, step):
        return UserError("what", "why", "fix")


def even_share(item: dict[str, Any], answer: Completion) -> rl.Graded:
    share = sum(t % 2 == 0 for t in answer.ids) / len(answer.ids)
    return rl.Graded(share, share == 1)


def job_of(
    model: Transformer, hooks: Hooks, steps: int, *, start: int = 0, optimizers: Any = None
) -> Job:
    optimizers = optimizers or Optimizers(model, LearningRates(0.02, 0.05, 0.02, 0.01, 0.0))
    return Job(model, optimizers, Schedule(steps, 0, 0.0, 1.0), hooks, 100, 100, start)


def train(job: Job, c: rl.RlConfig, *, reward: Any = even_share, reference: Any = None) -> None:
    with Tools() as tools:
        rl.train_rl(
            job,
            engine=Engine(job.model, TOKENIZER, deterministic=True),
            tools=tools,
            problem=lambda i: ({"number": i}, [i % 7 + 1]),
            reward=reward,
            config=c,
            reference=reference,
        )


@pytest.mark.parametrize("loss", LOSSES)
def test_reward_rises_on_a_toy_problem(loss):
    """Say even tokens: learnt within thirty steps from about one half."""
    model, hooks = tiny_model(TOKENIZER.vocab_size), Hooks()
    train(job_of(model, hooks, 30), config(loss, updates_per_batch=1 if loss == "reinforce" else 2))
    rewards = [row["reward"] for row in hooks.rows]
    assert sum(rewards[:3]) / 3 < 0.65 and sum(rewards[-3:]) / 3 > 0.9
    row = hooks.rows[0]
    assert {"pass_at_1", "pass_at_k", "entropy", "clip_fraction", "log_ratio", "length"} <= set(row)
    assert row["entropy"] > hooks.rows[-1]["entropy"] > 0
    assert 0 <= row["pass_at_1"] <= row["pass_at_k"] <= 1
    assert row["log_ratio_max"] < 1e-4  # sampler and trainer agree


def test_resumed_training_equals_uninterrupted_bit_for_bit():
    c = config("grpo", updates_per_batch=2, kl_beta=0.1, refill_rounds=1)
    reference = tiny_model(TOKENIZER.vocab_size)
    whole, whole_hooks = tiny_model(TOKENIZER.vocab_size), Hooks()
    train(job_of(whole, whole_hooks, 6), c, reference=reference)
    half, hooks = tiny_model(TOKENIZER.vocab_size), Hooks()
    first = job_of(half, hooks, 3)
    train(first, c, reference=reference)
    again = Transformer(half.config)
    again.load_state_dict(half.state_dict())
    optimizers = Optimizers(again, LearningRates(0.02, 0.05, 0.02, 0.01, 0.0))
    optimizers.load_state_tensors(first.optimizers.state_tensors())
    second = job_of(again, hooks, 6, start=3, optimizers=optimizers)
    train(second, c, reference=reference)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    timing = {"seconds", "sampling_seconds", "tokens_per_second", "training_tokens_per_second"}
    strip = [[{k: v for k, v in r.items() if k not in timing} for r in h.rows]
             for h in (whole_hooks, hooks)]  # fmt: skip
    assert strip[0] == strip[1]


def test_refill_replaces_groups_of_equal_reward():
    """Only problems of odd number can be learnt from; the others are replaced by new ones."""

    def reward(item: dict[str, Any], answer: Completion) -> rl.Graded:
        return even_share(item, answer) if item["number"] % 2 else graded(0.0)

    seen: list[list[dict[str, Any]]] = []
    for rounds in (0, 3):
        model, hooks = tiny_model(TOKENIZER.vocab_size), Hooks()
        train(job_of(model, hooks, 3), config(refill_rounds=rounds), reward=reward)
        seen.append(hooks.rows)
    assert all(r["sampled_tokens"] <= 4 * 8 * 4 for r in seen[0])
    for plain, refilled in zip(*seen, strict=True):
        assert refilled["sampled_tokens"] > plain["sampled_tokens"]
        useful = (1 - refilled["zero_variance_fraction"]) * (refilled["sampled_tokens"] / 32)
        assert useful > 2.5  # of four wanted, where two came without


def test_every_problem_draws_its_own_numbers():
    """The same prompt sixteen times: with one seed all groups would be alike."""
    model = tiny_model(TOKENIZER.vocab_size)
    items = [({}, [3, 4])] * 4
    with Tools() as tools:
        engine = Engine(model, TOKENIZER, deterministic=True)
        found = rl.sample_groups(engine, tools, items, even_share, config(), numbers=range(8, 12))
        again = rl.sample_groups(engine, tools, items[:2], even_share, config(), numbers=[10, 11])
    rows = [[r.ids for r in group] for group in found]
    assert len({str(group) for group in rows}) == 4
    assert [[r.ids for r in group] for group in again] == rows[2:], "by the problem's number"


def test_overlong_answers_may_be_masked():
    """All answers are cut at four tokens but those that stop: masked, only the latter teach."""
    rows = rollouts_of()
    job = job_of(tiny_model(TOKENIZER.vocab_size), Hooks(), 1)

    def sample(numbers: Sequence[int]) -> list[list[rl.Rollout]]:
        return [rows]

    counted = rl.collect(job, 0, sample, config())
    masked = rl.collect(job, 0, sample, config(overlong="mask"))
    assert len(counted.learnt) == 5 and [r.finished for r in masked.learnt] == [True] * 4
    assert masked.groups == counted.groups  # what is logged is all
    nothing = rl.collect(job, 0, lambda *_: [rows[4:]], config(overlong="mask"))
    assert nothing.learnt == []
    assert rl.policy_gradient(job.model, nothing.learnt, config()).loss == 0.0


def test_a_loss_that_is_not_finite_is_skipped_then_rolled_back_then_given_up():
    model, hooks = tiny_model(TOKENIZER.vocab_size), Hooks()
    good = {k: v.clone() for k, v in model.state_dict().items()}

    def reward(item: dict[str, Any], answer: Completion) -> rl.Graded:
        return rl.Graded(float("nan") if item["number"] >= 8 else answer.ids[0] % 2, False)

    hooks.back = lambda: (model.load_state_dict(good), 0)[1]
    with pytest.raises(UserError, match="what"):
        train(job_of(model, hooks, 30), config(), reward=reward)
    skipped = [row.get("skipped", 0) for row in hooks.rows]
    assert skipped == [0, 0] + [1] * 10
    assert [r["step"] for r in hooks.rows if "rolled_back_to" in r] == [7]
    assert "policy loss nan" in hooks.notes[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_temperature_of_the_draw_is_that_of_the_loss():
    """At temperature 2 the recorded log-probabilities are the trainer's at temperature 2."""
    model = tiny_model(TOKENIZER.vocab_size)
    params = SamplingParams(max_tokens=6, temperature=2.0, n=4, logprobs_at_temperature=True)
    (answers,) = Engine(model, TOKENIZER).generate([[3, 4]], params)
    rows = rl.group_rollouts([3, 4], answers, [graded(float(i)) for i in range(4)], "dapo")
    c = rl.RlConfig(1, 4, 6, 2.0, 0, loss="dapo")
    assert rl.policy_gradient(model, rows, c).largest_log_ratio < 1e-4
    for r in rows:
        r.old = None
    assert rl.policy_gradient(model, rows, rl.RlConfig(1, 4, 6, 1.0, 0)).largest_log_ratio > 0.05
