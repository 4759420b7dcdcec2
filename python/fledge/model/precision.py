"""In which numbers a network computes: float32, bfloat16, float16, fp8, said once and openly.

Weights, gradients and optimizer state are float32 whatever is said here, and so are the softmax,
the loss and the sums inside norms and products. What changes is the stream through the blocks and
the inputs of every matrix product: the embeddings hand out 16-bit rows (`layers.Embedding.compute`)
and each layer follows its input. No autocast: torch would choose for every operation by a list, and
what a layer computes in could not be read where it stands (docs/decisions/043). With fp8 the large
linear layers' products are 8-bit ones while gradients are wanted; all else is bfloat16. With
bfloat16_products, made for CPUs, the stream stays float32: products read and give bfloat16 numbers
and sum in float32, while gradients are wanted. Evaluation is float32's.

Called by `Transformer.compute_in`. float16 needs a loss scale (`train.loss_scale`).
"""

from __future__ import annotations

import torch
from torch import nn

from fledge.errors import UserError
from fledge.model.fp8 import worth_fp8
from fledge.model.layers import Embedding, Linear

STREAM: dict[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.bfloat16,
    "bfloat16_products": None,
}
"""Name -> what the stream is in; None = what the weights are in."""

PRODUCTS: dict[str, torch.dtype | None] = STREAM | {"bfloat16_products": torch.bfloat16}
"""Name -> what the loss and Muon multiply; None = what the weights are in."""


def without_gradients(name: str) -> str:
    """What a network that trains in `name` computes in while no gradients are wanted."""
    return {"fp8": "bfloat16", "bfloat16_products": "float32"}.get(name, name)


def set_precision(model: nn.Module, name: str) -> None:
    """Makes every part of a network compute in it. Raises UserError where it can't be had."""
    stream = STREAM[name]
    device = next(model.parameters()).device
    if name == "fp8":
        _require_fp8(device)
    # elsewhere the stream should be in 16 bits, too: the planner refuses to be asked for this
    assert name != "bfloat16_products" or device.type in ("cpu", "meta"), device
    for module in model.modules():
        if isinstance(module, Embedding):
            module.compute = stream
        if isinstance(module, Linear):
            module.rounded = name == "bfloat16_products"
            module.fp8 = name == "fp8" and worth_fp8(module.in_features, module.out_features)


def _require_fp8(device: torch.device) -> None:
    if device.type == "cpu" or (
        device.type == "cuda"
        and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 9))
    ):
        return
    raise UserError(
        "hardware.dtype = fp8 is not possible here",
        f"8-bit products need an H100, an RTX 40 or newer; this is {device}",
        "give --hardware.dtype bfloat16, or leave it out",
    )
