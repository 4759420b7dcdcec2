"""How much memory training takes: weights, gradients, optimizer state, activations.

A formula, not a measurement: within about 20 % on small models, and on the safe side. Called by the
planner to choose the rows per forward pass. Source of the shape: reference/planner.md 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from fledge.config import ModelConfig
from fledge.plan.scaling import count

ACTIVATION_BYTES = 34
"""Bytes kept per token, layer and unit of width in bf16 (no checkpointing); fp32 keeps twice."""
KEPT_BYTES = 2
"""The same of a checkpointed layer: its input, one number in bf16."""
CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS = 2**23, 2**27
"""Logits alive at once: `model.loss` never holds all of them."""
PROCESS_BYTES = 780_000_000
"""Python, torch, libraries, data: a depth-2 run peaked at 0.85 GB, 0.07 of it tensors."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    process: int

    @property
    def total(self) -> int:
        """All of it, with 6 % for the allocator."""
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.logits
        return int(1.06 * parts) + self.process


def training_memory(
    model: ModelConfig,
    tokens_per_pass: int,
    *,
    dtype: str = "float32",
    on_cpu: bool = True,
    checkpoint_activations: bool = False,
) -> Memory:
    """Memory with `tokens_per_pass` tokens in one forward and backward pass.

    dtype: as hardware.dtype; activations are fp32 in float32 and bfloat16_products, else of 16
    bits. Masters, gradients, Muon's one buffer (matrices) and AdamW's two (the rest) are fp32; in
    16 bits a pass also keeps a rounded copy of every matrix that it multiplies.
    """
    bytes_per_value = 4 if dtype in ("float32", "bfloat16_products") else 2
    counts = count(model)
    rest = counts.parameters - counts.matrix_parameters
    scale = bytes_per_value / 2
    layers = model.num_hidden_layers
    per_width = ACTIVATION_BYTES * layers
    if checkpoint_activations:
        per_width = KEPT_BYTES * layers + ACTIVATION_BYTES  # one layer's at a time
    width = model.hidden_size
    rounded = 0 if bytes_per_value == 4 else bytes_per_value * counts.scaling_parameters
    logits = min(
        tokens_per_pass * model.vocab_size, CPU_CHUNK_LOGITS if on_cpu else GPU_CHUNK_LOGITS
    )
    return Memory(
        weights=4 * counts.parameters + rounded,
        gradients=4 * counts.parameters,
        optimizer=4 * counts.matrix_parameters + 8 * rest,
        activations=int(per_width * scale * width * tokens_per_pass),
        logits=logits * (bytes_per_value + 4 + 4),
        process=PROCESS_BYTES,
    )


def rows_that_fit(
    model: ModelConfig,
    seq_len: int,
    *,
    budget_bytes: int,
    dtype: str = "float32",
    on_cpu: bool = True,
    checkpoint_activations: bool = False,
) -> int:
    """The largest power of two of rows whose training fits the budget; 0 if not even one does."""
    rows = 0
    candidate = 1
    while candidate <= 1024:
        need = training_memory(
            model,
            candidate * seq_len,
            dtype=dtype,
            on_cpu=on_cpu,
            checkpoint_activations=checkpoint_activations,
        )
        if need.total > budget_bytes:
            break
        rows, candidate = candidate, candidate * 2
    return rows
