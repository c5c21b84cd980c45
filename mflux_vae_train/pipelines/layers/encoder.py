"""Pre-norm transformer layers of CLIP and of vision transformers. Attribute names are CLIP's in transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Linear

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "quick_gelu": kernels.quick_gelu,
    "gelu": kernels.gelu,
}


class EncoderConfig(Protocol):
    """Sizes of an encoder, by their names in transformers."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


def check_encoder(config: EncoderConfig, title: str) -> None:
    """
    Args:
        title: of the configuration, for messages.

    Raises:
        SettingsError: an unknown activation, or a width that the heads do not divide.
    """
    if config.hidden_act not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise SettingsError(f"{title}: hidden_act {config.hidden_act!r} is unknown; known are {known}")
    if config.hidden_size % config.num_attention_heads:
        raise SettingsError(
            f"{title}: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` through this project's kernel."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        B, L, D = x.shape
        q, k, v = (
            projection(x).reshape(B, L, self.heads, -1) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = kernels.attention(q, k, v, scale=(D // self.heads) ** -0.5, mask=mask)
        return self.out_proj(out.reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.act = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array | None) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """Layers without a final norm: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, mask: mx.array | None = None, layers: slice = slice(None)) -> mx.array:
        """
        Args:
            mask: additive, broadcastable to (B, heads, L, L).
            layers: those to compute.
        """
        for layer in self.layers[layers]:
            x = layer(x, mask)
        return x
