"""The Transformer: embedding, blocks, final norm, head. Exactly Qwen3 when arch is "qwen3".

The decoder and the head of arch "speedrun" stand in `model.extras`.

Used by `train` (loss), `engine` (hidden states with a cache, logits of the last position) and
`evals` through the engine. Parameter names are Hugging Face's, so `state_dict()` is the checkpoint.
Never knows about tokens' text, files of a run, or optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fledge.config import ModelConfig
from fledge.model.attention import Attention
from fledge.model.extras import CappedHead, SpeedrunDecoder, initialize_speedrun
from fledge.model.kv_cache import AttentionView, KVCache
from fledge.model.layers import (
    Embedding,
    Head,
    RMSNorm,
    SwiGLU,
    filled_on_host,
    rotary_table,
    run_block,
    widened,
)
from fledge.model.loss import (
    Workspace,
    add_loss_gradients,
    linear_cross_entropy,
    token_logprobs,
)
from fledge.model.precision import PRODUCTS, set_precision


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: AttentionView | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, view)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the `model.` part of the parameter names."""

    checkpoint_activations = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor, view: AttentionView | None) -> Tensor:
        """Normed states [B, T, D] of token ids [B, T]."""
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = run_block(block, x, cos, sin, view, again=self.checkpoint_activations)
        return self.norm(x)


class Transformer(nn.Module):
    """A decoder-only language model of `config`'s shape; build with a seed, or `load` a folder."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Built where it will live, on `device`; "meta" takes no memory, to look at shapes.

        `seed` None leaves the weights unset (they are about to be loaded).
        """
        super().__init__()
        self.config = config
        with contextlib.nullcontext() if device is None else torch.device(device):
            if config.arch == "speedrun":
                self.model: Decoder | SpeedrunDecoder = SpeedrunDecoder(config)
                self.lm_head: Head = CappedHead(config)
            else:
                self.model = Decoder(config)
                self.lm_head = Head(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        table = rotary_table(config.max_position_embeddings, config.head_dim, config.rope_theta)
        cos, sin = (part.to(self.lm_head.weight.device) for part in table)
        self.workspace = Workspace()
        self.product_dtype: torch.dtype | None = None  # of the head's and Muon's products
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if seed is not None:
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Deterministic initial weights, the same for every world size and device.

        Matrices that read the stream: uniform with std 1/sqrt(hidden); matrices that write to it:
        zero, so that every block starts as the identity; the untied head: zero, so that the first
        loss is exactly log(vocab_size) (nanochat, gpt.py, 92d63d4).
        """
        generator = torch.Generator().manual_seed(seed)
        if self.config.arch == "speedrun":
            return initialize_speedrun(self, self.config, generator)
        bound = (3.0 / self.config.hidden_size) ** 0.5
        for name, parameter in filled_on_host(self):
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("embed_tokens.weight"):
                std = 0.02 if self.config.tie_word_embeddings else 0.8
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
            else:
                parameter.uniform_(-bound, bound, generator=generator)

    def hidden(self, ids: Tensor, view: AttentionView | None = None) -> Tensor:
        """Normed states [B, T, D] of token ids [B, T]; with a view, cached tokens are seen too."""
        if view is None:
            cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # [T, K/2]
        else:
            cos, sin = self.cos[view.positions, None], self.sin[view.positions, None]
            cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)  # [B, 1, T, K/2]
        return self.model(ids, cos, sin, view)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of token ids [B, T]."""
        return self.lm_head(self.hidden(ids))

    def loss_sum(self, ids: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Summed weighted cross-entropy in nats: ids, targets and weights are [B, T]."""
        x = self.hidden(ids).flatten(0, 1)
        return linear_cross_entropy(
            x,
            self.lm_head.weight,
            targets.flatten(),
            weights.flatten(),
            cap=self.config.final_logit_softcapping,
            workspace=self.workspace,
        )

    def add_gradients(self, ids: Tensor, targets: Tensor, weights: Tensor) -> float:
        """The same sum, its gradients added to every parameter's `grad`: a training step's pass."""
        self._make_gradients()
        x = self.hidden(ids).flatten(0, 1)
        total = add_loss_gradients(
            x if self.product_dtype is None else x.to(self.product_dtype),
            self.lm_head.weight,
            targets.flatten(),
            weights.flatten(),
            cap=self.config.final_logit_softcapping,
            workspace=self.workspace,
        )
        return total.item()

    def add_policy_gradients(
        self,
        ids: Tensor,
        targets: Tensor,
        trained: Tensor,
        slopes: Callable[[Tensor], Tensor],
        *,
        temperature: float = 1.0,
    ) -> None:
        """Adds the gradients of any function of the trained tokens' log-probabilities.

        ids, targets and trained (bool) are [B, T]. `slopes` is told the log-probabilities [N] of
        the trained tokens, row by row, at `temperature`, and says the function's derivative by
        each: by the chain rule that is a weighted sum of cross-entropies, for which no logits need
        be held. One pass through the layers.
        """
        self._make_gradients()
        cap = self.config.final_logit_softcapping
        cap = None if cap is None else cap / temperature  # c tanh(l / c) / t: l and c over t
        head, workspace = self.lm_head.weight, self.workspace
        x, places = self.hidden(ids).flatten(0, 1) / temperature, trained.flatten().nonzero()[:, 0]
        targets = targets.flatten()
        logprobs = token_logprobs(
            x.detach()[places], head.detach(), targets[places], cap=cap, workspace=workspace
        )
        weights = torch.zeros(len(x), dtype=widened(x).dtype, device=x.device)
        weights[places] = -slopes(logprobs).to(weights.dtype)
        add_loss_gradients(x, head, targets, weights, cap=cap, workspace=workspace)

    def _make_gradients(self) -> None:
        for parameter in self.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every target in nats, [B, T], no gradient (validation, scoring)."""
        with torch.no_grad():
            hidden = self.hidden(ids)
            rows = [
                nn.functional.cross_entropy(self.lm_head(h).float(), t, reduction="none")
                for h, t in zip(hidden, targets, strict=True)
            ]
        return torch.stack(rows)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the stream through the blocks."""
        return self.model.embed_tokens.compute or self.dtype

    def compute_in(self, name: str, *, checkpoint_activations: bool = False) -> Transformer:
        """From now on computes in one of `precision.STREAM`; the weights stay. Self.

        checkpoint_activations: training keeps only each layer's input and computes the rest again.
        """
        set_precision(self, name)
        self.product_dtype = PRODUCTS[name]
        self.model.checkpoint_activations = checkpoint_activations
        return self

    def new_cache(self, slots: int, max_len: int) -> KVCache:
        """An empty cache on the model's device."""
        dtype = self.model.embed_tokens.compute or torch.float32
        return KVCache(self.config, slots, max_len, device=self.cos.device, dtype=dtype)

    def save(self, folder: str | Path) -> None:
        """Writes the Hugging Face weights and configs into an existing folder."""
        from fledge.model.hf_files import save_model

        save_model(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str | None = None) -> Transformer:
        """The model of a Hugging Face folder (Qwen3), built on `device`, where its weights are read
        to one after the other. UserError if it is missing or damaged."""
        from fledge.model.hf_files import load_model

        return load_model(Path(folder), device=device)

    def load_weights(self, folder: str | Path) -> None:
        """Overwrites the weights by those of a folder with the same configuration."""
        from fledge.model.hf_files import load_weights

        load_weights(self, Path(folder))
