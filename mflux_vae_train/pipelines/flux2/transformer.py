"""FLUX.2's transformer without embedded guidance: FLUX.2 [klein] (Black Forest Labs 2026).

Modules carry the names of diffusers' Flux2Transformer2DModel, so that its weights load without a key table. No layer
has a bias. Shapes: B batch, L text tokens, N image tokens, D width (heads * head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.kernels import gated_add, glu, silu
from mflux_vae.networks.layers import Linear
from mflux_vae_train.pipelines.gradient_checkpointing import block_runner
from mflux_vae_train.pipelines.layers.attention import JointAttention, attend, split_heads
from mflux_vae_train.pipelines.layers.embeddings import TwoLayerEmbedder, sinusoidal
from mflux_vae_train.pipelines.layers.modulation import NORM_EPS, HeadNorm, Modulation, modulated_norm
from mflux_vae_train.pipelines.layers.rotary import Rotation, rotation
from mflux_vae_train.pipelines.loading.config_check import JSONConfig


@dataclass(frozen=True, kw_only=True)
class Flux2TransformerConfig(JSONConfig):
    """config.json of diffusers' Flux2Transformer2DModel; the defaults are FLUX.2 klein 4B's."""

    kinds: ClassVar[dict[str, object]] = {"_class_name": "Flux2Transformer2DModel"}

    patch_size: int = 1
    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000
    eps: float = NORM_EPS
    guidance_embeds: bool = False

    def __post_init__(self) -> None:
        if self.guidance_embeds:
            raise SettingsError("guidance_embeds=True: FLUX.2 [dev] is not supported, FLUX.2 [klein] is")
        fixed = {"patch_size": 1, "eps": NORM_EPS, "out_channels": self.in_channels}
        for name, value in fixed.items():
            if getattr(self, name) not in (value, None):
                raise SettingsError(f"{name}={getattr(self, name)!r} is not supported, {value!r} is")
        axes = self.axes_dims_rope
        if len(axes) != 4 or sum(axes) != self.attention_head_dim or any(dims % 2 for dims in axes):
            raise WeightsError(
                f"FLUX.2 transformer: axes_dims_rope {list(axes)} must be 4 even numbers that sum to "
                f"attention_head_dim {self.attention_head_dim}; correct its config.json"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_width(self) -> int:
        """Width of the gated hidden layer."""
        return int(self.mlp_ratio * self.width)


class TimeEmbedding(nn.Module):
    """Embedded timestep: (B,) -> (B, D)."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        self._channels = config.timestep_guidance_channels
        self.timestep_embedder = TwoLayerEmbedder(self._channels, config.width, bias=False)

    def __call__(self, timestep: mx.array, dtype: mx.Dtype) -> mx.array:
        # sinusoids in float32: bfloat16 cannot represent 1000 * sigma
        return self.timestep_embedder(sinusoidal(timestep, self._channels).astype(dtype))


class FeedForward(nn.Module):
    """SwiGLU: gate and hidden layer in one projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = Linear(width, 2 * hidden, bias=False)
        self.linear_out = Linear(hidden, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_out(glu(self.linear_in(x)))


class DoubleBlock(nn.Module):
    """Text and image streams with separate weights and joint attention."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        self.attn = JointAttention(config.width, config.num_attention_heads, bias=False)
        self.ff = FeedForward(config.width, config.mlp_width)
        self.ff_context = FeedForward(config.width, config.mlp_width)

    def __call__(
        self, image: mx.array, text: mx.array, *modulation: mx.array, rope: Rotation
    ) -> tuple[mx.array, mx.array]:
        """
        Args:
            modulation: shift, scale and gate (B, 1, D) of attention and feed-forward layers, first the image's six.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:6]
        t_shift_a, t_scale_a, t_gate_a, t_shift_m, t_scale_m, t_gate_m = modulation[6:]
        to_image, to_text = self.attn.joint(
            modulated_norm(image, shift_a, scale_a), modulated_norm(text, t_shift_a, t_scale_a), rope
        )
        image = gated_add(image, gate_a, to_image)
        image = gated_add(image, gate_m, self.ff(modulated_norm(image, shift_m, scale_m)))
        text = gated_add(text, t_gate_a, to_text)
        text = gated_add(text, t_gate_m, self.ff_context(modulated_norm(text, t_shift_m, t_scale_m)))
        return image, text


class ParallelAttention(nn.Module):
    """Attention and SwiGLU side by side, with one projection before and one after them."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        width, hidden, self._heads = config.width, config.mlp_width, config.num_attention_heads
        self._ends = [width, 2 * width, 3 * width, 3 * width + hidden]
        self.to_qkv_mlp_proj = Linear(width, 3 * width + 2 * hidden, bias=False)
        self.norm_q = HeadNorm(config.attention_head_dim)
        self.norm_k = HeadNorm(config.attention_head_dim)
        self.to_out = Linear(width + hidden, width, bias=False)

    def __call__(self, x: mx.array, rope: Rotation) -> mx.array:
        q, k, v, gate, up = mx.split(self.to_qkv_mlp_proj(x), self._ends, axis=-1)
        q, k, v = (split_heads(a, self._heads) for a in (q, k, v))
        attended = attend([(q, self.norm_q)], [(k, self.norm_k)], v, rope)
        return self.to_out(mx.concatenate([attended, glu(gate, up)], axis=-1))


class SingleBlock(nn.Module):
    """One stream of text and image tokens."""

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        self.attn = ParallelAttention(config)

    def __call__(self, x: mx.array, shift: mx.array, scale: mx.array, gate: mx.array, *, rope: Rotation) -> mx.array:
        return gated_add(x, gate, self.attn(modulated_norm(x, shift, scale), rope))


class Flux2Transformer(nn.Module):
    """The denoiser of FLUX.2 klein: noisy latents, prompt and time -> velocity.

    Attributes:
        gradient_checkpointing: keep only the inputs of blocks for the backward pass, which runs the blocks again.
    """

    gradient_checkpointing = False

    def __init__(self, config: Flux2TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.time_guidance_embed = TimeEmbedding(config)
        self.double_stream_modulation_img = Modulation(width, 6, bias=False)
        self.double_stream_modulation_txt = Modulation(width, 6, bias=False)
        self.single_stream_modulation = Modulation(width, 3, bias=False)
        self.x_embedder = Linear(config.in_channels, width, bias=False)
        self.context_embedder = Linear(config.joint_attention_dim, width, bias=False)
        self.transformer_blocks = [DoubleBlock(config) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [SingleBlock(config) for _ in range(config.num_single_layers)]
        self.norm_out = Modulation(width, 2, bias=False)
        self.proj_out = Linear(width, config.in_channels, bias=False)

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array,
        timestep: mx.array,
        img_ids: mx.array,
        txt_ids: mx.array,
    ) -> mx.array:
        """Predict the velocity noise - image.

        Args:
            hidden_states: (B, N, in_channels) latents.
            encoder_hidden_states: (B, L, joint_attention_dim) text encoder's hidden states.
            timestep: (B,) in [0, 1], the noise level sigma; times 1000 inside.
            img_ids: (N, 4) and txt_ids: (L, 4): positions of the tokens.

        Returns:
            (B, N, in_channels).
        """
        time = silu(self.time_guidance_embed(timestep.astype(mx.float32) * 1000, hidden_states.dtype))
        of_double = [*self.double_stream_modulation_img(time), *self.double_stream_modulation_txt(time)]
        of_single = self.single_stream_modulation(time)
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        rope = rotation(mx.concatenate([txt_ids, img_ids]), self.config.axes_dims_rope, self.config.rope_theta)
        run = block_runner(self.gradient_checkpointing)
        for double_block in self.transformer_blocks:
            image, text = run(double_block, image, text, *of_double, rope=rope)
        # text stream + image stream -> one stream
        x = mx.concatenate([text, image], axis=1)
        for single_block in self.single_transformer_blocks:
            x = run(single_block, x, *of_single, rope=rope)
        scale, shift = self.norm_out(time)
        return self.proj_out(modulated_norm(x[:, text.shape[1] :], shift, scale))


def image_ids(height: int, width: int) -> mx.array:
    """Positions (0, row, column, 0) of latents of this size: (H * W, 4) float32."""
    row, column = mx.meshgrid(mx.arange(height), mx.arange(width), indexing="ij")
    none = mx.zeros_like(row)
    return mx.stack([none, row, column, none], axis=-1).reshape(-1, 4).astype(mx.float32)


def text_ids(length: int) -> mx.array:
    """Positions (0, 0, 0, n) of text tokens: (L, 4) float32."""
    return mx.pad(mx.arange(length, dtype=mx.float32)[:, None], [(0, 0), (3, 0)])
