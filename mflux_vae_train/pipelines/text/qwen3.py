"""Qwen3 as a text encoder: hidden states of a causal language model, without its last layers and its head.

Qwen Team, "Qwen3 Technical Report" (2025), section 2: grouped-query attention with rotary positions and normalized
queries and keys, and gated feed-forward layers. Parameter paths are the keys of the published
`text_encoder/model*.safetensors`. These are not mlx-lm's layers: importing those takes seconds, and its model takes no
mask of padding and returns the last state alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Linear
from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.pipelines.layers.modulation import HeadNorm
from mflux_vae_train.pipelines.layers.rotary import Rotation, rotation
from mflux_vae_train.pipelines.loading.config_check import JSONConfig
from mflux_vae_train.pipelines.loading.folder import PartialNetwork
from mflux_vae_train.pipelines.text.t5 import T5LayerNorm as Qwen3RMSNorm

_PREFIX, _HEAD = "model.", "lm_head."
_FREQUENCIES = "model.rotary_emb.inv_freq"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_FIXED = {"hidden_act": "silu", "attention_bias": False, "rope_scaling": None, "use_sliding_window": False}
"""Options with the only supported values."""


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(JSONConfig):
    """`config.json` of Qwen3; field names are those of transformers, the defaults are Qwen3-4B's.

    Attributes:
        head_dim: width of one head; heads x head_dim need not be hidden_size.
        tie_word_embeddings, max_position_embeddings: part of the file format; unused here.
    """

    kinds: ClassVar[dict[str, object]] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Qwen3Config:
        """As `JSONConfig.from_dict`. transformers 5 writes `rope_parameters` instead of `rope_theta`."""
        rope = values.get("rope_parameters") or {}
        read = {**values, **rope}
        if (kind := rope.get("rope_type", "default")) != "default":
            raise SettingsError(f"Qwen3 config: rope_type={kind!r} is not supported, 'default' is")
        for name, value in _FIXED.items():
            if read.get(name, value) != value:
                raise SettingsError(f"Qwen3 config: {name}={read[name]!r} is not supported, {value!r} is")
        return super().from_dict(read)

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise SettingsError(
                f"Qwen3 config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The config.json, which releases 4 and 5 of transformers read."""
        return super().to_dict() | {name: value for name, value in _FIXED.items() if name != "rope_scaling"}


QWEN3_4B = Qwen3Config()
QWEN3_8B = Qwen3Config(hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)


class Qwen3Attention(nn.Module):
    """Self-attention in which several heads share keys and values."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = Linear(config.num_attention_heads * head, width, bias=False)
        self.q_norm = HeadNorm(head, config.rms_norm_eps)
        self.k_norm = HeadNorm(head, config.rms_norm_eps)

    def __call__(self, x: mx.array, bias: mx.array, rope: Rotation) -> mx.array:
        B, L, _ = x.shape
        head = self.config.head_dim
        q, k, v = (layer(x).reshape(B, L, -1, head) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (self._rotated(a, norm, rope) for a, norm in ((q, self.q_norm), (k, self.k_norm)))
        return self.o_proj(kernels.attention(q, k, v, scale=head**-0.5, mask=bias).reshape(B, L, -1))

    def _rotated(self, x: mx.array, norm: HeadNorm, rope: Rotation) -> mx.array:
        if is_cpu():
            return kernels.norm_rotary([x], [norm.weight], rope, norm.eps, halves=True)
        x, base = norm(x).swapaxes(1, 2), self.config.rope_theta
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=base, scale=1.0, offset=0).swapaxes(1, 2)


class Qwen3MLP(nn.Module):
    """SwiGLU: down_proj(silu(gate_proj x) * up_proj x)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(kernels.glu(self.gate_proj(x), self.up_proj(x)))


class Qwen3Layer(nn.Module):
    """Attention and SwiGLU, each after a norm, in a residual stream (B, L, hidden_size)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def __call__(self, x: mx.array, bias: mx.array, rope: Rotation) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), bias, rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Stack(nn.Module):
    """The module that the published files call `model`. Without the last layers, it has no final norm."""

    def __init__(self, config: Qwen3Config, layers: int):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Qwen3Layer(config) for _ in range(layers)]
        if layers == config.num_hidden_layers:
            self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, input_ids: mx.array, attention_mask: mx.array, taps: Sequence[int]) -> mx.array:
        x = self.embed_tokens(input_ids)
        position = mx.arange(x.shape[1])
        seen = (position[:, None] >= position) & attention_mask.astype(mx.bool_)[:, None, None, :]
        bias = mx.where(seen, mx.array(0, x.dtype), mx.array(mx.finfo(x.dtype).min, x.dtype))
        # as T5's, the residual stream has outliers that cost the other channels precision: it stays in float32
        return self._states(x.astype(mx.float32), bias, taps=taps).astype(x.dtype)

    def _states(self, x: mx.array, bias: mx.array, *, taps: Sequence[int]) -> mx.array:
        states = {0: x}
        ids, config = mx.arange(x.shape[1])[:, None], self.config
        rope = rotation(ids, [config.head_dim], config.rope_theta, halves=True)
        for count, layer in enumerate(self.layers[: max(taps)], 1):
            x = layer(x, bias, rope)
            if count in taps:
                states[count] = self.norm(x).astype(x.dtype) if "norm" in self and count == len(self.layers) else x
        return mx.concatenate([states[tap] for tap in taps], axis=-1)


class Qwen3Encoder(PartialNetwork):
    """The hidden states of Qwen3 (transformers' Qwen3Model).

    Args:
        layers: number of layers that are needed; None for all. The others, and the head, are saved with them.
    """

    def __init__(self, config: Qwen3Config, layers: int | None = None):
        super().__init__()
        count = config.num_hidden_layers if layers is None else layers
        if count > config.num_hidden_layers:
            raise SettingsError(
                f"Qwen3 config: the state after {count} layers is needed, and num_hidden_layers is less"
            )
        self.config = config
        self.model = Qwen3Stack(config, count)

    def __call__(self, input_ids: mx.array, attention_mask: mx.array, taps: Sequence[int]) -> mx.array:
        """Hidden states, concatenated per token: (B, L, len(taps) * hidden_size), in the dtype of the weights.

        Args:
            input_ids: (B, L). Positions are 0 ... L - 1, also where the mask is 0.
            attention_mask: (B, L), 0 where a token is padding, which no token attends to; the first is none.
            taps: numbers of layers after which a state is returned, as transformers counts: 0 is the embedding. Only
                the state after all `num_hidden_layers` is normalized.
        """
        return self.model(input_ids, attention_mask, tuple(taps))

    def hidden_states(self, input_ids: mx.array, attention_mask: mx.array, taps: Sequence[int]) -> list[mx.array]:
        """As `__call__`: one array (B, L, hidden_size) per tap."""
        return list(mx.split(self(input_ids, attention_mask, taps), len(taps), axis=-1))

    def is_needed(self, name: str) -> bool:
        """See `PartialNetwork`. Not needed are the head, and what follows the last layer here."""
        count = len(self.model.layers)
        if match := _LAYER.match(name):
            return not count <= int(match[1]) < self.config.num_hidden_layers
        return not name.startswith((_HEAD, "model.norm.") if count < self.config.num_hidden_layers else _HEAD)


def published_names(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of any Qwen3 file under the names of the published ones, which are `Qwen3Encoder`'s.

    transformers writes no `model.` prefix for a model without head. Nor does mflux, which adds rotary frequencies.
    """
    outside = (_PREFIX, _HEAD)
    named = {key if key.startswith(outside) else _PREFIX + key: value for key, value in tensors.items()}
    named.pop(_FREQUENCIES, None)
    return named


def is_quantized_text_layer(path: str) -> bool:
    """Layers of the blocks; the embedding is not quantized."""
    return path.startswith("model.layers.")
