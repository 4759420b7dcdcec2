"""What a plan will cost: tokens, FLOPs, seconds, memory, disk and dollars, per stage.

A first, true form: FLOPs are counted, speed is a share of what the machine's matmul reaches, and
that share is a table, not a measurement of this machine. Every result says so in `basis`. Called by
the planner; its seconds are also the weights of the progress bar.
"""

from __future__ import annotations

from typing import Any

from fledge.config import ModelConfig
from fledge.plan.hardware import Hardware
from fledge.plan.memory import training_memory
from fledge.plan.scaling import count, nanochat_flops_per_token

# depth -> share of the bf16 peak while pretraining on GPUs: reference/planner.md 3.4
_GPU_MFU = ((4, 0.15), (8, 0.28), (12, 0.40), (18, 0.46), (20, 0.48), (24, 0.50))
_DTYPE_SPEED = {"bfloat16": 1.0, "float16": 1.0, "fp8": 1.0, "float32": 1 / 16}
"""Of a GPU, against bf16: float32 does not go through the matrix units (A100 19.5 against 312
TFLOP/s, H100 67 against 989, data sheets)."""
_FP8_GAIN, _FP8_DEPTH = 1.17, 20
"""Tokens per second of nanochat's d26 in fp8 against bf16; shallow networks gain nothing."""
_AGAIN = 4 / 3
"""Time with checkpointed activations: a second forward pass beside a forward and two backward."""
_CPU_SHARE = 0.6
"""Share of the cores' matmul rate that training a small model reaches; 0.73 to 1.04 on
2 Zen 5 cores in float32 (benchmarks/train_cpu.md), less where others compute, too."""
_ROUNDED_GAIN = 1.5
"""Of training in bfloat16_products where the planner chooses it (docs/log.md: 1.6 to 1.7)."""
_DECODE_SHARE = 0.25
"""The same for batched decoding (a quickstart of 2026-11-25: rl 39 s, evaluate 28 s)."""
_DECODE_BANDWIDTH_SHARE = 0.5
"""Of the memory bandwidth, while one token after the other is decoded: assumed, not measured."""
_ROLLOUT_SHARE = 0.25
"""Length of a rollout with its prompt over rl.max_new_tokens (that run: 155K of 655K tokens)."""
_TOKENIZER_BYTES_PER_SECOND = 8e6
_EXAM_ROWS: dict[str, tuple[int, int]] = {
    "core": (91_000, 900),
    "arc_easy": (2376, 110),
    "arc_challenge": (1172, 110),
    "mmlu": (14_042, 150),
    "gsm8k": (1319, 400),
    "humaneval": (164, 500),
    "chat": (200, 300),
}
"""Rows of the real exams, and tokens of one with its few-shot examples and answer (core: 344 MB of
prompts, shots times rows, of the 22 published files)."""
_ANSWERED = ("gsm8k", "humaneval", "chat")  # in words; the others are scored choices
_EXAM_TOKENS = 50
_EXAM_UNIT = 32  # evals/records.py: UNIT
_EXAM_ITEMS = 2400
"""Items of all exams of a world together, and tokens per item (prompt and answer)."""


def training_rate(
    model: ModelConfig, hardware: Hardware, dtype: str, *, checkpoint_activations: bool = False
) -> float:
    """Useful FLOP/s of the whole machine while training in that dtype."""
    if hardware.training_flops is not None:
        return hardware.training_flops
    again = _AGAIN if checkpoint_activations else 1.0
    if hardware.device == "cuda":
        # the published shares count attention as if it were not causal, and so does this
        counted = count(model).flops_per_token / nanochat_flops_per_token(model)
        share = _mfu(model.num_hidden_layers) * counted * _DTYPE_SPEED[dtype]
        if dtype == "fp8" and model.num_hidden_layers >= _FP8_DEPTH:
            share *= _FP8_GAIN
        return hardware.peak_flops * hardware.device_count * share / again
    gain = _ROUNDED_GAIN if dtype == "bfloat16_products" else 1.0
    return hardware.matmul_flops * _CPU_SHARE * gain / again


def _mfu(depth: int) -> float:
    """Straight lines between the table's rows."""
    below = max((row for row in _GPU_MFU if row[0] <= depth), default=_GPU_MFU[0])
    above = min((row for row in _GPU_MFU if row[0] >= depth), default=_GPU_MFU[-1])
    if above[0] == below[0]:
        return below[1]
    part = (depth - below[0]) / (above[0] - below[0])
    return below[1] + part * (above[1] - below[1])


def estimates(model: ModelConfig, values: dict[str, Any], hardware: Hardware) -> dict[str, Any]:
    """The estimates of a plan as one JSON-able dict."""
    counts = count(model)
    dtype, again = values["hardware.dtype"], values["hardware.checkpoint_activations"]
    rate = training_rate(model, hardware, dtype, checkpoint_activations=again)
    forward = counts.flops_per_token / 3
    stages: dict[str, dict[str, float]] = {
        "tokenizer": {
            "tokens": 0,
            "flops": 0.0,
            "seconds": 3 + values["tokenizer.train_bytes"] / _TOKENIZER_BYTES_PER_SECOND,
        }
    }
    for stage in ("base", "mid", "sft"):
        tokens = values[f"{stage}.tokens"]
        measured = 8 * values["base.eval_tokens"] if stage == "base" else 0
        flops = tokens * counts.flops_per_token + measured * forward
        stages[stage] = {"tokens": tokens, "flops": flops, "seconds": 2 + flops / rate}
    # what a decoded token reads: all weights, but one row of the table of pairs
    weights = counts.parameters - model.bigram_rows * model.hidden_size
    token = 4 * weights / (hardware.memory_bandwidth * _DECODE_BANDWIDTH_SHARE)
    alone = rate / hardware.device_count
    shared = alone * min(hardware.device_count, values["rl.prompts_per_step"])  # no prompt is cut
    stages["rl"] = _rl(values, counts.flops_per_token, forward, shared, token)
    stages["evaluate"] = _evaluate(values, forward, alone, hardware.device_count)
    seconds = sum(stage["seconds"] for stage in stages.values())
    price = hardware.dollars_per_hour
    for stage in stages.values():
        stage["seconds"] = round(stage["seconds"], 1)
        if price is not None:
            stage["dollars"] = round(stage["seconds"] / 3600 * price, 4)
    rows = values["base.device_batch_size"] * model.max_position_embeddings
    memory = training_memory(
        model,
        rows,
        dtype=dtype,
        on_cpu=values["hardware.device"] == "cpu",
        checkpoint_activations=again,
    )
    return {
        "parameters": counts.parameters,
        "matrix_parameters": counts.matrix_parameters,
        "scaling_parameters": counts.scaling_parameters,
        "flops_per_token": counts.flops_per_token,
        "tokens": sum(int(stage["tokens"]) for stage in stages.values()),
        "flops": sum(stage["flops"] for stage in stages.values()),
        "seconds": round(seconds, 1),
        "dollars": None if price is None else round(seconds / 3600 * price, 2),
        "memory_bytes": memory.total,
        "download_bytes": _downloads(values),
        "disk_bytes": _disk(values, counts.parameters, counts.matrix_parameters),
        "stages": stages,
        "basis": _basis(model, hardware, dtype),
    }


def _rl(
    values: dict[str, Any], flops: float, forward: float, rate: float, token: float
) -> dict[str, float]:
    """`rate`: of all devices that have a prompt; `token`: seconds that reading the weights takes,
    once for each token of the longest reply, on every device at the same time."""
    rollouts = values["rl.steps"] * values["rl.prompts_per_step"] * values["rl.samples_per_prompt"]
    tokens = int(rollouts * values["rl.max_new_tokens"] * _ROLLOUT_SHARE)
    decode = max(
        tokens * forward / (rate * _DECODE_SHARE / _CPU_SHARE),
        values["rl.steps"] * values["rl.max_new_tokens"] * token,
    )
    total = tokens * (flops + forward)
    seconds = (2 + tokens * flops / rate + decode) if rollouts else 0.0
    return {"tokens": tokens, "flops": total, "seconds": seconds}


def _evaluate(
    values: dict[str, Any], forward: float, rate: float, devices: int
) -> dict[str, float]:
    """`rate`: of one device. Choices go to the devices _EXAM_UNIT at a time, so that few keep few
    busy; answers one by one."""
    limit = values["evaluate.max_examples"]
    asked = [name for name in values["evaluate.tasks"] or () if name in _EXAM_ROWS]
    items = _EXAM_ITEMS if limit is None else min(_EXAM_ITEMS, 5 * limit)
    stages = len(values["evaluate.stages"]) - (
        "rl" in values["evaluate.stages"] and not values["rl.steps"]
    )
    # (tokens, how many devices share them) of each exam
    loads = [(items * _EXAM_TOKENS, devices if limit is None else -(-limit // _EXAM_UNIT))]
    if asked:
        loads = []
        for name in asked:
            rows, length = _EXAM_ROWS[name]
            rows = rows if limit is None else min(rows, 22 * limit if name == "core" else limit)
            each = rows if limit is None else limit  # of core's tasks: they are taken in turn
            loads.append((rows * length, each if name in _ANSWERED else -(-each // _EXAM_UNIT)))
    tokens = stages * sum(tokens for tokens, _ in loads)
    alone = stages * sum(tokens / min(devices, shared) for tokens, shared in loads)
    seconds = 2 + alone * forward / (rate * _DECODE_SHARE / _CPU_SHARE)
    return {"tokens": 0, "flops": tokens * forward, "seconds": seconds}


def _disk(values: dict[str, Any], parameters: int, matrices: int) -> int:
    """Bytes of the two checkpoints with training state that each stage keeps."""
    one = 4 * parameters + 4 * matrices + 8 * (parameters - matrices) + 3_000_000
    stages = 4 if values["rl.steps"] else 3
    return 2 * stages * one


_BYTES_PER_TOKEN = 4.8  # nanochat's rule of thumb for English
_PACKED = 0.4  # of a byte of text in the hub's zstd Parquet: 100 MB of 250M characters
_TASK_BYTES = 250_000_000  # the task files and CORE's bundle of 162 MB
_SMOLTALK_BYTES = 1_100_000_000


def _downloads(values: dict[str, Any]) -> int:
    """Bytes that the hub will be asked for: shards of the corpus as far as base reads, and tasks.

    0 for a world and for text of this machine.
    """
    source = values["data.source"] or ""
    if source not in ("fineweb-edu", "climbmix") and not source.startswith("hub:"):
        return 0
    shards = values["base.tokens"] * _BYTES_PER_TOKEN * _PACKED
    if values["data.max_bytes"] is not None:
        shards = min(shards, values["data.max_bytes"])
    chats = _SMOLTALK_BYTES if values["data.chats"] == "smoltalk" else 0
    return int(shards) + 100_000_000 + _TASK_BYTES + chats


def _basis(model: ModelConfig, hardware: Hardware, dtype: str) -> str:
    if hardware.training_flops is not None:
        share = f"measured with this network: {hardware.training_flops / 1e9:,.0f} GFLOP/s"
    elif hardware.device == "cuda":
        share = f"taken as {_mfu(model.num_hidden_layers):.0%} of the {dtype} peak (published runs)"
        if dtype == "fp8":
            share = f"taken as what published runs in {dtype} reached"
    else:
        how = "measured by fledge bench" if hardware.source == "measured" else "assumed per core"
        share = f"taken as {_CPU_SHARE:.0%} of the matmul rate, {how}"
    return (
        f"estimates: FLOPs are counted, speed is {share}; "
        "evaluation and rl are rougher than pretraining"
    )
