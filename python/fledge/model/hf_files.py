"""A model as a Hugging Face folder: config.json, generation_config.json, model.safetensors.

Used by `Transformer.save` and `.load`. A folder written here loads in transformers as
Qwen3ForCausalLM with no custom code; one of arch "speedrun" brings `modeling_fledge.py` and loads
with trust_remote_code. fp32 masters are kept as they are. Tokenizer files are `tokenizer.files`'
business; training state is `train.checkpoint`'s.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fledge.config import ModelConfig
from fledge.errors import UserError
from fledge.model.transformer import Transformer

_SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


_MODELING = Path(__file__).with_name("modeling_fledge.py")
_OWN_KEYS = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name not in (*_SHAPE_KEYS, "rope_theta", "arch")
)
_LATER = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.metadata.get("later")}
"""Fields that older checkpoints lack."""


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """config.json; rope is written in both the old and the transformers-5 form."""
    shape = {key: getattr(config, key) for key in _SHAPE_KEYS}
    if config.arch == "speedrun":
        module = _MODELING.stem
        return {
            "architectures": ["FledgeForCausalLM"],
            "model_type": "fledge",
            "auto_map": {
                "AutoConfig": f"{module}.FledgeConfig",
                "AutoModelForCausalLM": f"{module}.FledgeForCausalLM",
            },
            **shape,
            **{key: getattr(config, key) for key in _OWN_KEYS},
            "rope_theta": config.rope_theta,
            "use_cache": False,
            "dtype": "float32",
        }
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **shape,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }


def config_from_hf(table: dict[str, Any], *, where: str) -> ModelConfig:
    """The ModelConfig of a config.json; UserError for another architecture or a missing key."""
    kind = table.get("model_type")
    if kind not in ("qwen3", "fledge"):
        raise UserError(
            f"{where} describes a {kind!r} model",
            "fledge runs models of the qwen3 shape and its own",
            "give a folder that fledge wrote, or a Qwen3 checkpoint",
        )
    rope = table.get("rope_parameters") or {}
    try:
        shape = {key: table[key] for key in _SHAPE_KEYS}
        if kind == "fledge":
            table = _LATER | table
            shape |= {"arch": "speedrun"} | {key: table[key] for key in _OWN_KEYS}
        theta = float(rope.get("rope_theta", table.get("rope_theta", 10000.0)))
        return ModelConfig(**shape, rope_theta=theta)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{where} is not a complete model configuration",
            f"{type(error).__name__}: {error}",
            "write the checkpoint again, or take the one before it",
        ) from None


def save_model(
    model: Transformer,
    folder: Path,
    *,
    token_ids: dict[str, int] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes the files; `token_ids` adds bos_token_id, eos_token_id and pad_token_id.

    weights: copies by name, where the model itself is being trained meanwhile.
    """
    config = config_to_hf(model.config) | (token_ids or {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"do_sample": False, **(token_ids or {})}
    (folder / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )
    if model.config.arch == "speedrun":
        shutil.copyfile(_MODELING, folder / _MODELING.name)
    named = dict(model.named_parameters()) if weights is None else weights
    tensors = {name: p.detach().cpu().contiguous() for name, p in named.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: Path, *, device: torch.device | str | None = None) -> Transformer:
    """The Transformer of a folder, on `device` (the CPU where none is given), in float32."""
    path = folder / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    config = config_from_hf(table, where=str(path))
    model = Transformer(config, device=device)
    load_weights(model, folder)
    return model


@torch.no_grad()
def load_weights(model: Transformer, folder: Path) -> None:
    """Copies a folder's weights into a model, tensor by tensor: no second copy is ever in memory.

    UserError if the file cannot be read or holds other names or shapes.
    """
    wanted = dict(model.named_parameters())
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            found = set(file.keys())
            if model.config.tie_word_embeddings:
                found -= {"lm_head.weight"}
            if found != set(wanted):
                name = min(found ^ set(wanted))
                raise _unfit(folder, f"{name} is only in one of them")
            for name, parameter in wanted.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    raise _unfit(folder, f"{name} is {shape}, not {tuple(parameter.shape)}")
                parameter.copy_(file.get_tensor(name))
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"{folder} is not a readable model folder",
        f"{type(error).__name__}: {error}",
        "give a checkpoint folder with config.json and model.safetensors, or a run directory",
    )


def _unfit(folder: Path, why: str) -> UserError:
    return UserError(
        f"the weights in {folder} do not fit its config.json",
        why,
        "take both files from the same checkpoint",
    )
