"""arch "speedrun" of fledge for transformers: `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)`.

fledge copies this file into every checkpoint of that arch; it needs torch and transformers only and
is never imported by fledge itself. The extras and their formulas are those of
`fledge.model.extras`. Without a key-value cache: `generate` reads the whole text for every token.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24


class FledgeConfig(PretrainedConfig):
    """Shape of the network; `ModelConfig` of fledge says what each field means."""

    model_type = "fledge"

    def __init__(
        self,
        vocab_size=32768,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        norm_weights=True,
        embedding_norm=False,
        qk_scale=1.0,
        final_logit_softcapping=None,
        window_pattern="L",
        sliding_window=None,
        value_embeddings=False,
        residual_scalars=False,
        embedding_scalars=False,
        smear=False,
        backout=False,
        bigram_rows=0,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.hidden_act = hidden_act
        self.norm_weights = norm_weights
        self.embedding_norm = embedding_norm
        self.qk_scale = qk_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.window_pattern = window_pattern
        self.sliding_window = sliding_window
        self.value_embeddings = value_embeddings
        self.residual_scalars = residual_scalars
        self.embedding_scalars = embedding_scalars
        self.smear = smear
        self.backout = backout
        self.bigram_rows = bigram_rows
        kwargs["use_cache"] = False
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)


class Norm(nn.Module):
    def __init__(self, config, size, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if weights else None
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def has_value_embedding(config, layer):
    return config.value_embeddings and (config.num_hidden_layers - 1 - layer) % 2 == 0


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = Norm(config, config.head_dim, config.norm_weights)
        self.k_norm = Norm(config, config.head_dim, config.norm_weights)
        self.scale = config.qk_scale**2 / math.sqrt(config.head_dim)
        letter = config.window_pattern[layer % len(config.window_pattern)]
        last = layer == config.num_hidden_layers - 1
        self.window = config.sliding_window if letter == "S" and not last else None
        self.value_gate = None
        if has_value_embedding(config, layer):
            self.value_gate = nn.Linear(VALUE_GATE_CHANNELS, config.num_key_value_heads, bias=False)

    def forward(self, x, cos, sin, real, table):
        batch, tokens, _ = x.shape
        heads = (batch, tokens, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if table is not None and self.value_gate is not None:
            gate = 3.0 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + (gate[..., None] * table.view(heads)).transpose(1, 2)
        place = torch.arange(tokens, device=x.device)
        back = place[:, None] - place
        mask = back >= 0
        if self.window is not None:
            mask = mask & (back < self.window)
        mask = mask & (real[:, None, None, :] | (back == 0))  # a padded row sees itself
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = None
        if config.hidden_act == "silu":
            self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        up = self.up_proj(x)
        inner = F.relu(up).square() if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        return self.down_proj(inner)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = Norm(config, config.hidden_size, config.norm_weights)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config, config.hidden_size, config.norm_weights)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, real, table):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, real, table)
        return x + self.mlp(self.post_attention_layernorm(x))


class Smear(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x, real):
        previous = F.pad((x * real[..., None])[:, :-1], (0, 0, 1, 0))
        return x + self.scale * torch.sigmoid(self.gate(x[..., :SMEAR_GATE_CHANNELS])) * previous


def bigram_hash(ids, real, rows):
    """The row of each token and the real one before it, which counts as 0 where there is none."""
    before = F.pad(real[:, :-1], (1, 0))
    previous = F.pad(ids[:, :-1], (1, 0)) + 1
    mixed = torch.where(before, previous, 0) * 2654435761 ^ ids * 2246822519
    return (mixed ^ mixed >> 15) % rows


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in layers)
        self.norm = Norm(config, config.hidden_size, config.norm_weights)
        value_size = config.num_key_value_heads * config.head_dim
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): nn.Embedding(config.vocab_size, value_size)
                for i in layers
                if has_value_embedding(config, i)
            }
        )
        self.smear = Smear() if config.smear else None
        count = config.num_hidden_layers
        self.residual_scalars = scalars(count) if config.residual_scalars else None
        self.embedding_scalars = scalars(count) if config.embedding_scalars else None
        self.backout_scale = scalars(1) if config.backout else None
        rows = config.bigram_rows
        self.bigram_embeddings = nn.Embedding(rows, config.hidden_size) if rows else None
        self.bigram_scale = scalars(count) if rows else None

    def forward(self, ids, real):
        config = self.config
        places = (real.long().cumsum(dim=1) - 1).clamp_min(0)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=ids.device)
        angle = places[:, None, :, None] * config.rope_theta ** (-half / config.head_dim)
        x = self.embed_tokens(ids)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        if config.embedding_norm:
            x = F.rms_norm(x, (x.shape[-1],), None, config.rms_norm_eps)
        if self.smear is not None:
            x = self.smear(x, real)
        first, middle, pairs = x, None, None
        if self.bigram_embeddings is not None:
            pairs = self.bigram_embeddings(bigram_hash(ids, real, config.bigram_rows))
            x = x + pairs
        for i, block in enumerate(self.layers):
            if self.residual_scalars is not None:
                x = self.residual_scalars[i] * x
            if self.embedding_scalars is not None:
                x = x + self.embedding_scalars[i] * first
            if self.bigram_scale is not None and pairs is not None:
                x = x + self.bigram_scale[i] * pairs
            key = str(i)
            table = self.value_embeddings[key](ids) if key in self.value_embeddings else None
            x = block(x, cos, sin, real, table)
            if i == len(self.layers) // 2:
                middle = x
        if self.backout_scale is not None and middle is not None:
            x = x - self.backout_scale * middle
        return self.norm(x)


def scalars(count):
    return nn.Parameter(torch.ones(count))


class FledgeForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model; logits as fledge's own `Transformer` gives them."""

    config_class = FledgeConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.lm_head(self.model(input_ids, real.bool()))
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * torch.tanh(logits.float() / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
