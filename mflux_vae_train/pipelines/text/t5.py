"""T5's encoder: bidirectional, relative position bias, no biases, no score scaling.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020),
section 2.1; the gated feed-forward of T5 1.1 is Shazeer's "GLU Variants Improve Transformer" (2020).
Parameter paths are the keys of the published `text_encoder_2/model*.safetensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Linear
from mflux_vae_train.pipelines.loading.config_check import JSONConfig
from mflux_vae_train.pipelines.text.init_weights import draw_weights

_FEED_FORWARDS = ("relu", "gated-gelu")


@dataclass(frozen=True, kw_only=True)
class T5Config(JSONConfig):
    """`config.json` of a T5 encoder; field names and defaults are those of transformers.

    Attributes:
        d_kv: width of one head; heads x d_kv need not be d_model.
        feed_forward_proj: "relu" (T5) or "gated-gelu" (T5 1.1 and later).
        dropout_rate, pad_token_id, eos_token_id: part of the file format; unused, as the encoder is
            deterministic, also in training.
        initializer_factor: scales every standard deviation of `init_weights`.
    """

    kinds: ClassVar[dict[str, object]] = {"model_type": "t5", "architectures": ["T5EncoderModel"]}

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in _FEED_FORWARDS:
            known = ", ".join(_FEED_FORWARDS)
            raise SettingsError(
                f"T5 config: feed_forward_proj {self.feed_forward_proj!r} is unknown; known are {known}"
            )


class T5LayerNorm(nn.RMSNorm):
    """Root-mean-square norm; a float32 residual goes in, the weight's dtype comes out."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.rms_norm(x, self.weight.astype(x.dtype), self.eps).astype(self.weight.dtype)


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 (L, L): bidirectional scheme of Raffel et al., section 2.1.

    Half of the buckets are for keys after the query. In each half, one half is for exact distances; the rest
    grows logarithmically up to `max_distance`, and the last bucket holds all larger distances.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    side = num_buckets // 2
    exact = side // 2
    distance = np.abs(offset)
    # float32 as in transformers: powers of two lie on the edges of buckets, where rounding decides
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    step = ratio / np.float32(math.log(max_distance / exact)) * np.float32(side - exact)
    grown = exact + step.astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(grown, side - 1))
    return (bucket + side * (offset > 0)).astype(np.int32)


class T5Attention(nn.Module):
    """Self-attention of unscaled dot products; block 0 holds the position bias of all blocks."""

    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.config = config
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def position_bias(self, length: int) -> mx.array:
        """Additive attention bias (1, heads, L, L)."""
        config = self.config
        buckets = relative_position_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        # copied: every block adds it, and strides would take longer each time
        return mx.contiguous(self.relative_attention_bias(mx.array(buckets)).transpose(2, 0, 1))[None]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        B, L, _ = x.shape
        q, k, v = (layer(x).reshape(B, L, self.config.num_heads, -1) for layer in (self.q, self.k, self.v))
        return self.o(kernels.attention(q, k, v, scale=1.0, mask=bias).reshape(B, L, -1))


def _widened(x: mx.array) -> mx.array:
    """float16 -> float32: T5-XXL's feed-forward layers overflow float16. Other dtypes are unchanged."""
    return x.astype(mx.float32) if x.dtype == mx.float16 else x


class T5DenseActDense(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        # a float32 input makes wo a float32 product even where its weight is stored in float16
        return self.wo(_widened(mx.maximum(self.wi(x), 0)))


class T5DenseGatedActDense(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.wo(kernels.glu(_widened(self.wi_0(x)), _widened(self.wi_1(x)), activation="gelu_tanh"))


class T5LayerSelfAttention(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_bias=has_bias)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5LayerFF(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        gated = config.feed_forward_proj == "gated-gelu"
        self.DenseReluDense = T5DenseGatedActDense(config) if gated else T5DenseActDense(config)
        self.layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        self.layer = [T5LayerSelfAttention(config, has_bias=has_bias), T5LayerFF(config)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class T5Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [T5Block(config, has_bias=index == 0) for index in range(config.num_layers)]
        self.final_layer_norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def __call__(self, x: mx.array, attention_mask: mx.array | None) -> mx.array:
        bias = self.block[0].layer[0].SelfAttention.position_bias(x.shape[1])
        if attention_mask is not None:
            seen = attention_mask.astype(mx.bool_)[:, None, None, :]
            bias = mx.where(seen, bias, mx.array(mx.finfo(bias.dtype).min, bias.dtype))
        # the residual stream outgrows float16 and loses too much in bfloat16: it stays in float32
        x = x.astype(mx.float32)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """The encoder half of T5 (transformers' T5EncoderModel), as FLUX.1 uses it."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    def __call__(self, input_ids: mx.array, attention_mask: mx.array | None = None) -> mx.array:
        """Token ids (B, L) -> last hidden state (B, L, d_model), in the dtype of the weights.

        Args:
            attention_mask: (B, L), 0 where a token must not be seen; None: all are seen, as in FLUX.1.
        """
        return self.encoder(self.shared(input_ids), attention_mask)


def published_names(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of any T5 encoder file under the names FLUX.1 publishes, which are `T5Encoder`'s.

    `encoder.embed_tokens.weight` is a copy of `shared.weight`: it is dropped, or used if `shared.weight` is missing.
    """
    named = dict(tensors)
    copy = named.pop("encoder.embed_tokens.weight", None)
    return named if copy is None else {"shared.weight": copy, **named}


def init_weights(model: T5Encoder, key: mx.array, *, relative_bias_std: float | None = None) -> None:
    """Set random initial weights as transformers' `T5PreTrainedModel._init_weights` does.

    Args:
        key: MLX random key; the same key gives the same weights.
        relative_bias_std: standard deviation of the relative position bias; None: T5's d_model^-0.5 (times
            `initializer_factor`). A small encoder learns word order sooner from 2.
    """
    config, factor = model.config, model.config.initializer_factor
    width = factor * config.d_model**-0.5
    std = {
        "shared": factor,
        "relative_attention_bias": width if relative_bias_std is None else relative_bias_std,
        "q": factor * (config.d_model * config.d_kv) ** -0.5,
        "o": factor * (config.num_heads * config.d_kv) ** -0.5,
        "wo": factor * config.d_ff**-0.5,
    } | dict.fromkeys(("k", "v", "wi", "wi_0", "wi_1"), width)
    draw_weights(model, key, std, norm=factor)
