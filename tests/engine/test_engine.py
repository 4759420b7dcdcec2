"""The batched engine equals a twenty-line generator, whatever shares its batch."""

import random

import pytest
import torch
from tests.helpers_model import tiny_model, tiny_tokenizer

from fledge.engine import Engine, SamplingParams
from fledge.engine.sampling import sample, uniform
from fledge.engine.tools import Tools
from fledge.errors import UserError

TOKENIZER = tiny_tokenizer()


def engine(slots: int = 5) -> Engine:
    return Engine(tiny_model(TOKENIZER.vocab_size), TOKENIZER, slots=slots)


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@torch.inference_mode()
def naive_greedy(model, prompt: list[int], stop_ids, max_tokens: int) -> list[int]:
    """The readable twin: the whole sequence through the model for every token."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stop_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_equals_the_naive_generator(slots):
    subject = engine(slots)
    got = subject.generate(prompts(13), SamplingParams(max_tokens=9))
    for prompt, (completion,) in zip(prompts(13), got, strict=True):
        assert completion.ids == naive_greedy(subject.model, prompt, subject.stop_ids, 9)
        assert completion.finish_reason in ("stop", "length")


def test_a_sample_does_not_depend_on_its_batch():
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=7, n=2)
    together = engine().generate(prompts(9), params)
    for prompt, expected in zip(prompts(9), together, strict=True):
        (alone,) = engine().generate([prompt], params)
        assert [c.ids for c in alone] == [c.ids for c in expected]
        assert alone[0].ids != alone[1].ids


def test_log_probabilities_equal_teacher_forcing():
    subject = engine()
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=1)
    for prompt, (completion,) in zip(prompts(6), subject.generate(prompts(6), params), strict=True):
        (scored,) = subject.score([prompt + completion.ids])
        assert completion.logprobs == pytest.approx(scored[len(prompt) :], abs=1e-4)


def test_scores_and_next_token_do_not_depend_on_the_batch():
    subject, rows = engine(), prompts(9)
    batched = subject.score(rows)
    for row, expected in zip(rows, batched, strict=True):
        (alone,) = subject.score([row])
        assert alone == pytest.approx(expected, abs=1e-5)
    table = subject.next_logprobs(rows, [5, 6])
    for row, expected in zip(rows, table, strict=True):
        logits = subject.model(torch.tensor([row]))[0, -1].log_softmax(-1)
        assert expected == pytest.approx(logits[[5, 6]].tolist(), abs=1e-4)


def test_stream_gives_the_tokens_of_generate():
    prompt, params = prompts(1)[0], SamplingParams(max_tokens=7)
    ((completion,),) = engine().generate([prompt], params)
    assert list(engine().stream(prompt, params)) == completion.ids


class Scripted(torch.nn.Module):
    """Says a fixed script, whatever it reads; then stops."""

    def __init__(self, script: list[int], prompt_length: int) -> None:
        super().__init__()
        model = tiny_model(TOKENIZER.vocab_size)
        self.config, self.cos, self.new_cache = model.config, model.cos, model.new_cache
        self.script, self.prompt_length = script, prompt_length

    def hidden(self, ids, view):
        return view.positions[..., None].float()

    def lm_head(self, hidden):
        place = hidden[..., 0].long() - self.prompt_length + 1
        script = torch.tensor([*self.script, *[TOKENIZER.eos_id] * 99])
        return 50 * torch.nn.functional.one_hot(script[place], TOKENIZER.vocab_size).float()


def test_a_python_block_runs_and_its_output_is_forced_back():
    special = TOKENIZER.special_tokens
    code = TOKENIZER.encode("20+22")
    call = [special["<|python_start|>"], *code, special["<|python_end|>"]]
    output = [special["<|output_start|>"], *TOKENIZER.encode("42"), special["<|output_end|>"]]
    script = [*call, *[0] * len(output), TOKENIZER.eos_id]  # the zeros are overruled by the tool
    prompt = [1, 2, 3]
    subject = Engine(Scripted(script, len(prompt)), TOKENIZER)  # type: ignore[arg-type]
    with Tools() as tools:
        ((completion,),) = subject.generate([prompt], SamplingParams(max_tokens=40), tools)
    assert completion.ids == [*call, *output, TOKENIZER.eos_id]
    forced = [False] * len(call) + [True] * len(output) + [False]
    assert [not s for s in completion.sampled_mask] == forced
    assert completion.finish_reason == "stop"


def test_a_circle_is_left_when_asked():
    script, prompt = [5, 6, 7] * 15, [1, 2, 3]
    said = []
    for dry in (0.0, 0.8):
        subject = Engine(Scripted(script, len(prompt)), TOKENIZER)  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=40, dry_multiplier=dry)
        ((completion,),) = subject.generate([prompt], params)
        said.append(completion.ids)
    assert said[0] == script[:40]
    # 0.8 x 1.75^8 is more than the 50 by which the script leads: after a run of 11 it is left
    assert said[1][:14] == script[:14] and said[1][14] != script[14]


@pytest.mark.parametrize("bad", [[], [1] * 128, [1] * 1000])
def test_a_prompt_that_cannot_be_read_is_refused_in_words(bad):
    with pytest.raises(UserError):
        engine().generate([bad], SamplingParams(max_tokens=1))


def test_a_completion_ends_where_the_context_ends():
    subject = engine()
    ((completion,),) = subject.generate([[1] * 120], SamplingParams(max_tokens=100))
    assert 120 + len(completion.ids) <= 128


def test_uniform_numbers_are_uniform_and_keyed():
    draws = [uniform(0, c, p) for c in range(40) for p in range(500)]
    assert min(draws) >= 0 and max(draws) < 1
    counts = torch.histc(torch.tensor(draws), bins=20, min=0, max=1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8  # 0.1 % point of chi-square with 19 degrees of freedom
    assert uniform(1, 2, 3) == uniform(1, 2, 3) != uniform(1, 3, 2)


def test_sampling_follows_the_distribution_and_its_truncations():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    draws = torch.tensor([uniform(9, i, 0) for i in range(20000)], dtype=torch.float64)

    def shares(**options) -> torch.Tensor:
        picked = sample(logits, draws, SamplingParams(**options))
        return torch.bincount(picked, minlength=4) / 20000

    expected = logits[0].softmax(-1)
    torch.testing.assert_close(shares(temperature=1.0), expected, atol=0.012, rtol=0)
    colder = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(shares(temperature=0.5), colder, atol=0.012, rtol=0)
    assert (shares(temperature=1.0, top_k=2)[2:] == 0).all()
    assert (shares(temperature=1.0, top_p=0.7)[2:] == 0).all()
    assert shares(temperature=1.0, top_p=0.1)[0] == 1 == shares(temperature=0.0)[0]
