"""FLUX.1's transformer (Black Forest Labs 2024).

Modules carry the names of diffusers' FluxTransformer2DModel, so that its weights load without a key table. Shapes:
B batch, L text tokens, N image tokens, D width (heads * head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.errors import WeightsError
from mflux_vae.kernels import gated_add, gelu_tanh, silu
from mflux_vae.networks.layers import Linear
from mflux_vae_train.pipelines.gradient_checkpointing import block_runner
from mflux_vae_train.pipelines.layers.attention import JointAttention, SingleAttention
from mflux_vae_train.pipelines.layers.embeddings import SINUSOIDAL_CHANNELS, TwoLayerEmbedder, sinusoidal
from mflux_vae_train.pipelines.layers.modulation import Modulation, modulated_norm
from mflux_vae_train.pipelines.layers.rotary import Rotation, rotation
from mflux_vae_train.pipelines.loading.config_check import JSONConfig

MLP_RATIO = 4


@dataclass(frozen=True, kw_only=True)
class FluxTransformerConfig(JSONConfig):
    """config.json of diffusers' FluxTransformer2DModel; the defaults are FLUX.1-schnell's."""

    kinds: ClassVar[dict[str, object]] = {"_class_name": "FluxTransformer2DModel"}

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self) -> None:
        axes = self.axes_dims_rope
        if sum(axes) != self.attention_head_dim or any(dims % 2 for dims in axes):
            raise WeightsError(
                f"FLUX transformer: axes_dims_rope {list(axes)} must be even and sum to "
                f"attention_head_dim {self.attention_head_dim}; correct its config.json"
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class TimeTextEmbedding(nn.Module):
    """Sum of embedded timestep, guidance (if the model has it) and pooled prompt: (B, D)."""

    def __init__(self, width: int, pooled: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayerEmbedder(SINUSOIDAL_CHANNELS, width)
        if guidance_embeds:
            self.guidance_embedder = TwoLayerEmbedder(SINUSOIDAL_CHANNELS, width)
        self.text_embedder = TwoLayerEmbedder(pooled, width)

    def __call__(self, timestep: mx.array, guidance: mx.array | None, pooled: mx.array) -> mx.array:
        # sinusoids in float32: bfloat16 cannot represent 1000 * sigma
        embedding = self.timestep_embedder(sinusoidal(timestep).astype(pooled.dtype))
        if guidance is not None:
            embedding = embedding + self.guidance_embedder(sinusoidal(guidance).astype(pooled.dtype))
        return embedding + self.text_embedder(pooled)


class GeluProjection(nn.Module):
    """Linear, then GELU (tanh form)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = Linear(inputs, outputs)

    def __call__(self, x: mx.array) -> mx.array:
        return gelu_tanh(self.proj(x))


class FeedForward(nn.Module):
    """D -> 4 D -> D; the second entry of `net` stands for diffusers' dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = [
            GeluProjection(width, MLP_RATIO * width),
            nn.Identity(),
            Linear(MLP_RATIO * width, width),
        ]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.net:
            x = layer(x)
        return x


class DoubleBlock(nn.Module):
    """Text and image streams with separate weights and joint attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 6)
        self.attn = JointAttention(width, heads)
        self.ff = FeedForward(width)
        self.ff_context = FeedForward(width)

    def __call__(
        self, image: mx.array, text: mx.array, conditioning: mx.array, rope: Rotation
    ) -> tuple[mx.array, mx.array]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.norm1(conditioning)
        t_shift_a, t_scale_a, t_gate_a, t_shift_m, t_scale_m, t_gate_m = self.norm1_context(conditioning)
        to_image, to_text = self.attn.joint(
            modulated_norm(image, shift_a, scale_a), modulated_norm(text, t_shift_a, t_scale_a), rope
        )
        image = gated_add(image, gate_a, to_image)
        image = gated_add(image, gate_m, self.ff(modulated_norm(image, shift_m, scale_m)))
        text = gated_add(text, t_gate_a, to_text)
        text = gated_add(text, t_gate_m, self.ff_context(modulated_norm(text, t_shift_m, t_scale_m)))
        return image, text


class SingleBlock(nn.Module):
    """One stream; attention and MLP in parallel, with one output projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = Linear(width, MLP_RATIO * width)
        self.proj_out = Linear((1 + MLP_RATIO) * width, width)
        self.attn = SingleAttention(width, heads)

    def __call__(self, x: mx.array, conditioning: mx.array, rope: Rotation) -> mx.array:
        shift, scale, gate = self.norm(conditioning)
        normed = modulated_norm(x, shift, scale)
        branches = [self.attn(normed, rope), gelu_tanh(self.proj_mlp(normed))]
        return gated_add(x, gate, self.proj_out(mx.concatenate(branches, axis=-1)))


class FluxTransformer(nn.Module):
    """The denoiser of FLUX.1: noisy packed latents, prompt and time -> velocity.

    Attributes:
        gradient_checkpointing: keep only the inputs of blocks for the backward pass, which runs the blocks again.
    """

    gradient_checkpointing = False

    def __init__(self, config: FluxTransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.num_attention_heads
        self.x_embedder = Linear(config.in_channels, width)
        self.context_embedder = Linear(config.joint_attention_dim, width)
        self.time_text_embed = TimeTextEmbedding(width, config.pooled_projection_dim, config.guidance_embeds)
        self.transformer_blocks = [DoubleBlock(width, heads) for _ in range(config.num_layers)]
        self.single_transformer_blocks = [SingleBlock(width, heads) for _ in range(config.num_single_layers)]
        self.norm_out = Modulation(width, 2)
        self.proj_out = Linear(width, config.patch_size**2 * (config.out_channels or config.in_channels))

    def __call__(
        self,
        hidden_states: mx.array,
        encoder_hidden_states: mx.array,
        pooled_projections: mx.array,
        timestep: mx.array,
        img_ids: mx.array,
        txt_ids: mx.array,
        guidance: mx.array | None = None,
    ) -> mx.array:
        """Predict the velocity noise - image.

        Args:
            hidden_states: (B, N, in_channels) packed latents.
            encoder_hidden_states: (B, L, joint_attention_dim) T5's embeddings.
            pooled_projections: (B, pooled_projection_dim) CLIP's pooled embedding.
            timestep: (B,) in [0, 1], the noise level sigma; times 1000 inside.
            img_ids: (N, 3) and txt_ids: (L, 3): positions of the tokens.
            guidance: (B,) guidance scale; required if the configuration has `guidance_embeds`, else not allowed.

        Returns:
            (B, N, patch_size^2 * out_channels).
        """
        if (guidance is not None) != self.config.guidance_embeds:
            needs = "needs" if self.config.guidance_embeds else "takes no"
            raise ValueError(f"this FLUX transformer {needs} guidance (guidance_embeds={self.config.guidance_embeds})")
        conditioning = silu(
            self.time_text_embed(
                timestep.astype(mx.float32) * 1000,
                None if guidance is None else guidance.astype(mx.float32) * 1000,
                pooled_projections,
            )
        )
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        rope = rotation(mx.concatenate([txt_ids, img_ids]), self.config.axes_dims_rope)
        run = block_runner(self.gradient_checkpointing)
        for double_block in self.transformer_blocks:
            image, text = run(double_block, image, text, conditioning, rope=rope)
        # text stream + image stream -> one stream
        x = mx.concatenate([text, image], axis=1)
        for single_block in self.single_transformer_blocks:
            x = run(single_block, x, conditioning, rope=rope)
        scale, shift = self.norm_out(conditioning)
        return self.proj_out(modulated_norm(x[:, text.shape[1] :], shift, scale))


def init_weights(model: FluxTransformer, key: mx.array) -> None:
    """Set initial weights, random by `key`: each block is the identity, the velocity zero.

    Linear layers are Xavier-uniform; time, guidance and text embedders normal with standard deviation 0.02;
    modulations, the last projection and all biases zero; norm weights one.
    """
    shapes = {name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()}
    keys = mx.random.split(key, len(shapes))
    drawn = [(name, _initial(name, shape, one)) for (name, shape), one in zip(shapes.items(), keys, strict=True)]
    model.update(tree_unflatten(drawn))


def _initial(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    if len(shape) == 1:
        return mx.ones(shape) if ".norm_" in name and name.endswith("weight") else mx.zeros(shape)
    module = name.removesuffix(".weight")
    if module == "proj_out" or module == "norm_out.linear" or ".norm" in module:
        return mx.zeros(shape)
    if module.startswith(("time_text_embed", "context_embedder")):
        return mx.random.normal(shape, scale=0.02, key=key)
    bound = (6 / sum(shape)) ** 0.5
    return mx.random.uniform(-bound, bound, shape, key=key)
