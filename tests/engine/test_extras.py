"""Models with every extra answer through the engine as they do token by token."""

import dataclasses

import torch
from tests.helpers_model import tiny_tokenizer
from tests.model.test_extras import ALL, PLAIN

from fledge.engine import Engine, SamplingParams
from fledge.model import Transformer

TOKENIZER = tiny_tokenizer()


@torch.inference_mode()
def naive(model: Transformer, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_engine_runs_a_model_with_every_extra():
    config = dataclasses.replace(
        PLAIN, **(ALL | {"vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 128})
    )
    model = Transformer(config, seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    engine = Engine(model, TOKENIZER, chunk_tokens=20, slots=6, poison=True)
    params = SamplingParams(max_tokens=8, n=2, ignore_eos=True)
    stem = [*range(60)]
    prompts = [[*stem, i, 2 * i + 1] for i in range(3)] + [[5, 6], [7]]
    for prompt, choices in zip(prompts, engine.generate(prompts, params), strict=True):
        assert [c.ids for c in choices] == [naive(model, prompt, 8)] * 2
