"""Z-Image's transformer (Tongyi Lab 2025): one stream of image and caption tokens.

Modules carry the names of diffusers' ZImageTransformer2DModel, so that its weights load without a key table. Shapes:
B batch, L caption tokens, N image tokens, D width (heads * head_dim).

The reference takes captions of their true lengths, and pads each to P, the next multiple of 32, with a trained token
that is attended to. Here captions have one length L for all rows, with a mask of keys beyond P and positions per row:
results are the same, and shapes do not depend on the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import WeightsError
from mflux_vae.kernels import glu, rms_norm, silu, tanh, widened
from mflux_vae.networks.layers import Linear
from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.pipelines.gradient_checkpointing import block_runner
from mflux_vae_train.pipelines.layers.attention import SingleAttention
from mflux_vae_train.pipelines.layers.embeddings import SINUSOIDAL_CHANNELS, sinusoidal
from mflux_vae_train.pipelines.layers.modulation import modulated_norm
from mflux_vae_train.pipelines.layers.rotary import Rotation, rotation
from mflux_vae_train.pipelines.loading.config_check import JSONConfig
from mflux_vae_train.pipelines.z_image.packing import PATCH, image_ids, pack, padded, text_ids, unpack

CONDITIONING_WIDTH, TIME_WIDTH = 256, 1024
HEAD_EPS = 1e-5
KIND = f"{PATCH}-1"
"""Name of the only patch size: rows and columns of a patch, and its frames."""

MASKED = -1e9
"""Added to the scores of keys that are not attended to."""

_FIXED = {
    "all_patch_size": (PATCH,),
    "all_f_patch_size": (1,),
    "siglip_feat_dim": None,
    "qk_norm": True,
    "t_scale": 1000.0,
}


@dataclass(frozen=True, kw_only=True)
class ZImageTransformerConfig(JSONConfig):
    """config.json of diffusers' ZImageTransformer2DModel; the defaults are those of the published models.

    Attributes:
        axes_lens: sizes of the reference's table of positions; there is none here.
    """

    kinds: ClassVar[dict[str, object]] = {"_class_name": "ZImageTransformer2DModel"}

    all_patch_size: tuple[int, ...] = (PATCH,)
    all_f_patch_size: tuple[int, ...] = (1,)
    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)
    axes_lens: tuple[int, ...] = (1536, 512, 512)

    def __post_init__(self) -> None:
        for name, value in (*_FIXED.items(), ("n_kv_heads", self.n_heads)):
            if (found := getattr(self, name)) != value:
                raise WeightsError(f"Z-Image transformer: {name} is {found!r}, which is not supported; {value!r} is")
        if (
            len(self.axes_dims) != 3
            or sum(self.axes_dims) * self.n_heads != self.dim
            or any(dims % 2 for dims in self.axes_dims)
        ):
            raise WeightsError(
                f"Z-Image transformer: axes_dims {list(self.axes_dims)} must be three even numbers that sum to the "
                f"width of a head, dim {self.dim} / {self.n_heads} heads; correct its config.json"
            )

    @property
    def feed_forward(self) -> int:
        """Width inside feed-forward layers."""
        return int(self.dim / 3 * 8)

    @property
    def conditioning(self) -> int:
        """Width of the embedded timestep."""
        return min(self.dim, CONDITIONING_WIDTH)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) -> (B, width) in `dtype`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = [Linear(SINUSOIDAL_CHANNELS, TIME_WIDTH), nn.SiLU(), Linear(TIME_WIDTH, width)]

    def __call__(self, timestep: mx.array, dtype: mx.Dtype) -> mx.array:
        first, _, last = self.mlp
        # sinusoids in float32: bfloat16 cannot represent 1000 * sigma
        return last(silu(first(sinusoidal(timestep).astype(dtype))))


class Attention(SingleAttention):
    """Self-attention over all tokens: (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, bias=False, eps=HEAD_EPS)
        self.to_out = [Linear(width, width, bias=False)]

    def __call__(self, x: mx.array, rope: Rotation, mask: mx.array | None = None) -> mx.array:
        return self.to_out[0](super().__call__(x, rope, mask))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = Linear(width, inner, bias=False)
        self.w2 = Linear(inner, width, bias=False)
        self.w3 = Linear(width, inner, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.w2(glu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward layers, each between two norms.

    Args:
        modulated: whether the timestep scales the inputs of both, and gates their outputs.
    """

    def __init__(self, config: ZImageTransformerConfig, *, modulated: bool) -> None:
        super().__init__()
        width, eps = config.dim, config.norm_eps
        self.attention = Attention(width, config.n_heads)
        self.feed_forward = FeedForward(width, config.feed_forward)
        self.attention_norm1 = nn.RMSNorm(width, eps)
        self.attention_norm2 = nn.RMSNorm(width, eps)
        self.ffn_norm1 = nn.RMSNorm(width, eps)
        self.ffn_norm2 = nn.RMSNorm(width, eps)
        if modulated:
            self.adaLN_modulation = [Linear(config.conditioning, 4 * width)]

    def __call__(
        self, x: mx.array, conditioning: mx.array | None = None, *, rope: Rotation, mask: mx.array | None = None
    ) -> mx.array:
        """
        Args:
            x: (B, S, D).
            conditioning: (B, `config.conditioning`), if the block is modulated.
            mask: additive, (B, 1, 1, S).
        """
        scales: list[mx.array | None] = [None] * 4
        if conditioning is not None:
            scales = list(mx.split(self.adaLN_modulation[0](conditioning)[:, None], 4, axis=-1))
        scale_a, gate_a, scale_m, gate_m = scales
        attended = self.attention(_scaled(x, self.attention_norm1, scale_a), rope, mask)
        x = _gated(x, attended, self.attention_norm2, gate_a)
        return _gated(x, self.feed_forward(_scaled(x, self.ffn_norm1, scale_m)), self.ffn_norm2, gate_m)


def _scaled(x: mx.array, norm: nn.RMSNorm, scale: mx.array | None) -> mx.array:
    """norm(x) * (1 + scale); scale (B, 1, D)."""
    if scale is None:
        return rms_norm(x, norm.weight, norm.eps)
    if is_cpu():
        return rms_norm(x, norm.weight * (1 + scale), norm.eps)
    return _scaled_gpu(norm.eps)(x, norm.weight, scale)


def _gated(x: mx.array, update: mx.array, norm: nn.RMSNorm, gate: mx.array | None) -> mx.array:
    """x + tanh(gate) * norm(update); gate (B, 1, D)."""
    if gate is None:
        return x + rms_norm(update, norm.weight, norm.eps)
    if is_cpu():
        return x + rms_norm(update, norm.weight * tanh(gate), norm.eps)
    return _gated_gpu(norm.eps)(x, update, norm.weight, gate)


@cache
def _scaled_gpu(eps: float) -> Any:
    return widened(lambda x, weight, scale: rms_norm(x, weight, eps) * (1 + scale))


@cache
def _gated_gpu(eps: float) -> Any:
    return widened(lambda x, update, weight, gate: x + mx.tanh(gate) * rms_norm(update, weight, eps))


class FinalLayer(nn.Module):
    """Modulated norm and projection: (B, N, D) -> (B, N, outputs)."""

    def __init__(self, width: int, conditioning: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(width, outputs)
        self.adaLN_modulation = [nn.SiLU(), Linear(conditioning, width)]

    def __call__(self, x: mx.array, conditioning: mx.array) -> mx.array:
        scale = self.adaLN_modulation[1](silu(conditioning))[:, None]
        return self.linear(modulated_norm(x, mx.zeros_like(scale), scale))


class ZImageTransformer(nn.Module):
    """The denoiser of Z-Image: noisy latents, caption and time -> negative velocity.

    Attributes:
        gradient_checkpointing: keep only the inputs of blocks for the backward pass, which runs the blocks again.
    """

    gradient_checkpointing = False

    def __init__(self, config: ZImageTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, channels, refiners = config.dim, PATCH**2 * config.in_channels, range(config.n_refiner_layers)
        self.all_x_embedder = {KIND: Linear(channels, width)}
        self.all_final_layer = {KIND: FinalLayer(width, config.conditioning, channels)}
        self.t_embedder = TimestepEmbedder(config.conditioning)
        self.cap_embedder = [nn.RMSNorm(config.cap_feat_dim, config.norm_eps), Linear(config.cap_feat_dim, width)]
        self.x_pad_token, self.cap_pad_token = mx.zeros((1, width)), mx.zeros((1, width))
        self.noise_refiner = [Block(config, modulated=True) for _ in refiners]
        self.context_refiner = [Block(config, modulated=False) for _ in refiners]
        self.layers = [Block(config, modulated=True) for _ in range(config.n_layers)]

    def __call__(self, latents: mx.array, timestep: mx.array, caption: mx.array, lengths: mx.array) -> mx.array:
        """Predict image - noise.

        Args:
            latents: (B, H, W, in_channels), noisy.
            timestep: (B,) in [0, 1], 1 - sigma; times 1000 inside.
            caption: (B, L, cap_feat_dim), of which the first `lengths` tokens of each row are read.
            lengths: (B,) integers.

        Returns:
            (B, H, W, in_channels).
        """
        height, width = latents.shape[1:3]
        conditioning = self.t_embedder(timestep.astype(mx.float32) * self.config.t_scale, latents.dtype)
        image, text, attended = self._image_tokens(latents), *self._text_tokens(caption, lengths)
        image_rope, text_rope = (
            rotation(ids, self.config.axes_dims, self.config.rope_theta)
            for ids in (image_ids(height, width, attended), text_ids(text.shape[1])[None])
        )
        beyond = mx.arange(text.shape[1]) >= attended[:, None]
        mask = mx.where(beyond, MASKED, 0.0).astype(text.dtype)[:, None, None]
        run = block_runner(self.gradient_checkpointing)
        for block in self.noise_refiner:
            image = run(block, image, conditioning, rope=image_rope)
        for block in self.context_refiner:
            text = run(block, text, rope=text_rope, mask=mask)
        tokens = image.shape[1]
        mask = mx.pad(mask, [(0, 0), (0, 0), (0, 0), (tokens, 0)])
        rope = tuple(
            mx.concatenate([ours, mx.broadcast_to(theirs, (len(ours), *theirs.shape[1:]))], axis=1)
            for ours, theirs in zip(image_rope, text_rope, strict=True)
        )
        x = mx.concatenate([image, text], axis=1)
        for block in self.layers:
            x = run(block, x, conditioning, rope=rope, mask=mask)
        patches = x[:, : height * width // PATCH**2]
        return unpack(self.all_final_layer[KIND](patches, conditioning), height, width)

    def _image_tokens(self, latents: mx.array) -> mx.array:
        """Embedded patches, and pads: (B, N, D)."""
        tokens = self.all_x_embedder[KIND](pack(latents))
        batch, count, width = tokens.shape
        pads = mx.broadcast_to(self.x_pad_token.astype(tokens.dtype), (batch, padded(count) - count, width))
        return mx.concatenate([tokens, pads], axis=1)

    def _text_tokens(self, caption: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        """Embedded tokens of the caption, and pads: (B, L, D); and how many of them are attended to: (B,)."""
        caption = mx.pad(caption, [(0, 0), (0, padded(caption.shape[1]) - caption.shape[1]), (0, 0)])
        norm, linear = self.cap_embedder
        tokens = linear(rms_norm(caption, norm.weight, norm.eps))
        is_pad = mx.arange(caption.shape[1]) >= lengths[:, None]
        return mx.where(is_pad[..., None], self.cap_pad_token.astype(tokens.dtype), tokens), padded(lengths)
