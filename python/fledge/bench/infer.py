"""`fledge bench infer`: the engine on this machine, beside transformers with the same weights.

Random weights in the shapes of nanochat's d4 and d12 (width 256 and 768, 32,768 tokens; the feed-
forward width makes the number of matrix parameters equal), a prompt of 512 tokens, drawn at
temperature 1 from the best 50. The bound of a decode step is what it has to read, weights and keys
and values, over the measured copy bandwidth. Also the code behind benchmarks/infer_cpu.py.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fledge.bench import Row
from fledge.config import ModelConfig
from fledge.engine import Engine, Request, SamplingParams
from fledge.model import Transformer

PROMPT_TOKENS = 512
SPECIAL = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")


def _shape(hidden: int, layers: int, heads: int, head_dim: int, inner: int) -> ModelConfig:
    return ModelConfig(
        32768, hidden, layers, heads, heads, head_dim, inner, 2048, tie_word_embeddings=False
    )


SHAPES = {"d4": _shape(256, 4, 4, 64, 672), "d12": _shape(768, 12, 6, 128, 2048)}


class NoText:
    """Stands in for a tokenizer where there is no text: the engine asks for special tokens only."""

    def __init__(self) -> None:
        self.special_tokens = {f"<|{name}|>": 32000 + i for i, name in enumerate(SPECIAL)}

    def encode(self, text: str) -> list[int]:
        raise AssertionError("no text here")

    def decode(self, ids: list[int]) -> str:
        raise AssertionError("no text here")


def make_model(shape: str) -> Transformer:
    """Random weights of a spread that keeps activations of order 1."""
    model = Transformer(SHAPES[shape], seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model.eval()


def prompt(index: int) -> list[int]:
    """512 tokens; prompts of different index share no beginning."""
    return [(7 * i + 131 * index + 5) % 30000 for i in range(PROMPT_TOKENS)]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 256 MiB: the median of 9."""
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * source.numel() * 4 / statistics.median(times)


@dataclass(frozen=True)
class Timed:
    """Seconds of each decode step of a batch, and until the first token of its last row."""

    first: float
    steps: list[float]

    @property
    def step(self) -> float:
        return statistics.median(self.steps)


def make_engine(model: Transformer, weights: str = "float32", *, chunk: int = 512) -> Engine:
    return Engine(
        model,
        NoText(),  # type: ignore[arg-type]
        slots=32,
        weights=weights,
        chunk_tokens=chunk,
        prefix_reuse=False,
    )


def time_engine(engine: Engine, batch: int, steps: int, *, shared: bool = False) -> Timed:
    """`batch` rows of their own prompts, or of one prompt that they share."""
    params = SamplingParams(
        max_tokens=1400,
        temperature=1.0,
        top_k=50,
        ignore_eos=True,
        n=batch if shared else 1,
        logprobs=False,  # the peer computes none either
    )
    began = time.perf_counter()
    ids = [engine.add(Request(prompt(i), params)) for i in range(1 if shared else batch)]
    begun: set[tuple[int, int]] = set()
    while len(begun) < batch:
        begun |= {(e.request_id, e.choice) for e in engine.step()}
    first = time.perf_counter() - began
    engine.step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    for request_id in ids:
        engine.cancel(request_id)
    engine.step()
    return Timed(first, times)


class Peer:
    """transformers' Qwen3 with the weights of our model, through its own `generate`."""

    def __init__(self, model: Transformer) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        c = model.config
        config: Any = Qwen3Config
        self.model: Any = Qwen3ForCausalLM(
            config(
                vocab_size=c.vocab_size,
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_hidden_layers,
                num_attention_heads=c.num_attention_heads,
                num_key_value_heads=c.num_key_value_heads,
                head_dim=c.head_dim,
                max_position_embeddings=c.max_position_embeddings,
                rope_theta=c.rope_theta,
                rms_norm_eps=c.rms_norm_eps,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        ).eval()
        self.model.load_state_dict(model.state_dict())

    @torch.inference_mode()
    def time(self, batch: int, steps: int) -> Timed:
        """As `time_engine`; the clock is read where a step's logits are ready to be drawn from."""
        stamps: list[float] = []

        def stamp(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            stamps.append(time.perf_counter())
            return scores

        ids = torch.tensor([prompt(i) for i in range(batch)])
        began = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps + 2,
            do_sample=True,
            temperature=1.0,
            top_k=50,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=[stamp],
        )
        differences = [b - a for a, b in itertools.pairwise(stamps)]
        return Timed(stamps[0] - began, differences[1:])


def step_bytes(shape: str, batch: int, *, weights: str = "float32", shared: bool = False) -> float:
    """Bytes that a decode step must read: every matrix once, keys and values of every row once."""
    c = SHAPES[shape]
    inner = c.num_attention_heads * c.head_dim
    layer = 4 * c.hidden_size * inner + 3 * c.hidden_size * c.intermediate_size
    parameters = c.num_hidden_layers * layer + c.hidden_size * c.vocab_size
    token = 2 * 4 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    size = {"float32": 4, "bfloat16": 2, "int8": 1}[weights]
    return parameters * size + token * PROMPT_TOKENS * (1 if shared else batch)


def best_of(runs: int, one: Callable[[], Timed]) -> Timed:
    """The run of the smallest median step: what else ran on the machine only ever adds."""
    return min((one() for _ in range(runs)), key=lambda timed: timed.step)


def measure(
    shape: str, *, batches: tuple[int, ...], formats: tuple[str, ...], steps: int, peer: bool
) -> list[dict[str, Any]]:
    """One entry per batch and layout: step and first-token seconds of ours and of the peer.

    Ours and the peer's runs alternate, so that a slow minute of the machine meets both.
    """
    model = make_model(shape)
    bandwidth = copy_bandwidth()
    other = Peer(model) if peer else None
    engines = {weights: make_engine(model, weights) for weights in formats}
    for engine in engines.values():
        time_engine(engine, 1, 2)
    found = []
    for batch in batches:
        cells: dict[tuple[str, bool], list[Timed]] = {}
        theirs: list[Timed] = []
        for _ in range(2):
            for weights, engine in engines.items():
                for shared in (False, True) if batch > 1 else (False,):
                    timed = time_engine(engine, batch, steps, shared=shared)
                    cells.setdefault((weights, shared), []).append(timed)
            if other is not None:
                theirs.append(other.time(batch, steps))
        for (weights, shared), runs in cells.items():
            ours = min(runs, key=lambda t: t.step)
            bound = step_bytes(shape, batch, weights=weights, shared=shared) / bandwidth
            entry = {
                "shape": shape,
                "batch": batch,
                "weights": weights,
                "shared_prompt": shared,
                "step_seconds": ours.step,
                "steps": sorted(t for run in runs for t in run.steps),
                "first_seconds": min(t.first for t in runs),
                "bound_seconds": bound,
                "bandwidth": bandwidth,
                "threads": torch.get_num_threads(),
            }
            if theirs:
                entry["peer_step_seconds"] = min(t.step for t in theirs)
                entry["peer_steps"] = sorted(t for run in theirs for t in run.steps)
                entry["peer_first_seconds"] = min(t.first for t in theirs)
            found.append(entry)
    for engine in engines.values():
        engine.close()
    del other, engines, model
    gc.collect()
    return found


def run_default() -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of `fledge bench infer`: d4 at batch 1 and 16, float32 and int8."""
    try:
        import transformers

        peer: str | None = f"transformers {transformers.__version__}"
    except ImportError:
        peer = None
    found = measure(
        "d4", batches=(1, 16), formats=("float32", "int8"), steps=24, peer=peer is not None
    )
    rows = []
    for entry in found:
        batch, times = entry["batch"], entry["steps"]
        name = f"decode d4 batch {batch} {entry['weights']}"
        name += ", one prompt" if entry["shared_prompt"] else ""
        low, high = times[int(0.975 * (len(times) - 1))], times[int(0.025 * (len(times) - 1))]
        theirs = batch / entry["peer_step_seconds"] if peer else None
        row = Row(
            name,
            batch / entry["step_seconds"],
            "tok/s",
            batch / low,
            batch / high,
            peer,
            theirs,
        )
        rows.append(row.to_dict())
    notes = [
        f"copy bandwidth {found[0]['bandwidth'] / 1e9:.1f} GB/s, {found[0]['threads']} threads;"
        f" {PROMPT_TOKENS} prompt tokens; the interval holds 95 % of the steps",
    ]
    if peer is None:
        notes.append("no peer: pip install transformers (extra hf) to have one beside it")
    return rows, notes
