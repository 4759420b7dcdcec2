"""Any causal model of transformers, scored by our evaluator: `fledge eval HF_FOLDER --tasks core`.

So the evaluator itself can be checked against published numbers (GPT-2's CORE) where weights are to
be had. `open_hf` gives an engine-shaped object with what `scoring` needs: states, head, context,
encoder. Needs the `hf` extra. Generation and chat tasks are not offered: such a model has no chat
format of ours. Called by `stages.evaluate` for folders that fledge did not write.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fledge.errors import UserError
from fledge.evals.scoring import TreeView

DEFAULT_CONTEXT = 2048


class HfModel(nn.Module):
    """The states and the head of a causal model, as `fledge.model.Transformer` shows its own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model.eval()
        config = model.config
        context = getattr(config, "max_position_embeddings", None) or getattr(
            config, "n_positions", DEFAULT_CONTEXT
        )
        layers = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", 0)
        self.config = SimpleNamespace(max_position_embeddings=context, num_hidden_layers=layers)
        self.lm_head = model.get_output_embeddings()

    @property
    def cos(self) -> Tensor:
        """A tensor on the model's device."""
        return next(self.inner.parameters())

    def hidden(self, ids: Tensor, view: TreeView | None = None) -> Tensor:
        """States [B, T, D] just before the head; of a trie with its positions and mask."""
        options: dict[str, Any] = {}
        if view is not None:
            seen = view.mask
            shut = torch.finfo(self.cos.dtype).min
            mask = torch.zeros(seen.shape, dtype=self.cos.dtype, device=seen.device)
            options = {
                "attention_mask": mask.masked_fill_(~seen, shut),
                "position_ids": view.positions,
            }
        return self.inner.base_model(input_ids=ids, use_cache=False, **options).last_hidden_state

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        return self.lm_head(self.hidden(ids))


class HfTokenizer:
    """A tokenizer of transformers with the few methods that scoring calls."""

    def __init__(self, tokenizer: Any) -> None:
        self._inner = tokenizer
        bos = tokenizer.bos_token_id
        self.bos_id: int = bos if bos is not None else tokenizer.eos_token_id
        self.eos_id: int = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        return len(self._inner)


def is_foreign(folder: Path) -> bool:
    """Whether a model folder was not written by fledge: no tokenizer with our chat format."""
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except OSError:
        return True
    return "<|assistant_start|>" not in text


def open_hf(folder: Path) -> Any:
    """An object with `model` and `tokenizer` for `scoring`. UserError if it cannot be had or if
    its head is more than a matrix (a softcap, say), which would be scored wrongly."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(
            f"{folder} was not written by fledge",
            "reading other models needs transformers, which is not installed",
            "pip install 'fledge[hf]'",
        ) from None
    try:
        inner = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{folder} is not a model that can be read",
            f"{type(error).__name__}: {str(error).splitlines()[0]}",
            "give a checkpoint folder of fledge, or a causal model with its tokenizer",
        ) from None
    model = HfModel(inner)
    probe = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        apart = (inner(probe).logits - model(probe)).abs().max()
    if not float(apart) < 1e-4:
        raise UserError(
            f"{folder} holds a model whose logits are more than its last matrix",
            "they differ from head x states, so scores would be wrong",
            "evaluate it with lm-eval",
        )
    return SimpleNamespace(model=model, tokenizer=HfTokenizer(tokenizer))
