"""The UNet of Stable Diffusion 1, 2 and XL (Rombach et al. 2022; Podell et al. 2023), driven by diffusers' config.

Modules carry the names of diffusers' UNet2DConditionModel, so that its weights load without a key table; kernels of
convolutions are (O, kh, kw, I).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae.kernels import silu
from mflux_vae.networks.layers import Conv2d, Downsample, GroupNorm, Stage
from mflux_vae_train.pipelines.gradient_checkpointing import checkpointed
from mflux_vae_train.pipelines.layers.embeddings import TwoLayerEmbedder, sinusoidal
from mflux_vae_train.pipelines.stable_diffusion.blocks import ResnetBlock, Transformer2D, Upsample, norm_silu_conv
from mflux_vae_train.pipelines.stable_diffusion.unet_config import Level, UNetConfig


class UNet(nn.Module):
    """The denoiser of Stable Diffusion: noisy latents, time and prompt -> noise or velocity.

    Attributes:
        gradient_checkpointing: keep only the inputs of resnets and transformer blocks for the backward pass, which
            runs them again.
    """

    gradient_checkpointing = False

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first = config.block_out_channels[0]
        self.conv_in = Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TwoLayerEmbedder(first, config.time_width)
        if config.projection_class_embeddings_input_dim and config.addition_embed_type:
            self.add_embedding = TwoLayerEmbedder(config.projection_class_embeddings_input_dim, config.time_width)
        self.down_blocks, channels = [], first
        for level in config.down:
            self.down_blocks.append(_stage(config, level, channels, down=level.resamples))
            channels = level.channels
        if config.mid is not None:
            self.mid_block = _stage(config, config.mid, channels)
        self.up_blocks = []
        for level in config.up:
            self.up_blocks.append(_stage(config, level, channels, up=level.resamples))
            channels = level.channels
        self.conv_norm_out = GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = Conv2d(first, config.out_channels, 3, padding=1)

    def __call__(
        self,
        latents: mx.array,
        timesteps: mx.array,
        text: mx.array,
        added: tuple[mx.array, mx.array] | None = None,
    ) -> mx.array:
        """Predict the noise, or v in models that are trained to.

        Args:
            latents: (B, h, w, in_channels), scaled, of any size.
            timesteps: (B,) in [0, 1000).
            text: (B, L, cross_attention_dim) states of the text encoders.
            added: pooled prompt (B, P) and time ids (B, 6); required if the configuration has `addition_embed_type`,
                else not allowed.

        Returns:
            (B, h, w, out_channels) in the dtype of `latents`.
        """
        time = self._conditioning(timesteps, added, latents.dtype)
        run = checkpointed if self.gradient_checkpointing else _call
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in _layers(block):
                x = run(resnet, x, time)
                x = x if transformer is None else transformer(x, text, run)
                skips.append(x)
            for sampler in block.get("downsamplers", []):
                x = sampler(x)
                skips.append(x)
        if "mid_block" in self:
            for resnet, transformer in _layers(self.mid_block):
                x = run(resnet, x, time)
                x = x if transformer is None else transformer(x, text, run)
        for block in self.up_blocks:
            for resnet, transformer in _layers(block):
                x = run(resnet, x, time, skips.pop())
                x = x if transformer is None else transformer(x, text, run)
            for sampler in block.get("upsamplers", []):
                x = sampler(x, skips[-1].shape[1:3])
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)

    def _conditioning(self, timesteps: mx.array, added: tuple[mx.array, mx.array] | None, dtype: mx.Dtype) -> mx.array:
        """Activated embedding (B, T) of time, and of the pooled prompt and sizes."""
        if (added is not None) != ("add_embedding" in self):
            needs = "needs" if added is None else "takes no"
            raise ValueError(f"this UNet {needs} pooled prompt and time ids")
        # sinusoids in float32: half precision cannot represent sizes and timesteps
        embedding = self.time_embedding(sinusoidal(timesteps, self.config.block_out_channels[0]).astype(dtype))
        if added is not None:
            pooled, time_ids = added
            size = self.config.addition_time_embed_dim
            assert size is not None
            sizes = sinusoidal(time_ids.flatten(), size).reshape(len(pooled), -1)
            embedding = embedding + self.add_embedding(mx.concatenate([pooled.astype(dtype), sizes.astype(dtype)], -1))
        return silu(embedding)


def _call(block: nn.Module, *arrays: mx.array) -> mx.array:
    # separate nodes of the graph, so that gradients are summed in the same order as with gradient checkpointing
    y: mx.array = block(*mx.depends(list(arrays), []))
    return y


def _layers(block: Stage) -> Iterator[tuple[Any, Any]]:
    """Resnets, each with the transformer after it or None."""
    yield from zip_longest(block.resnets, block.get("attentions", []))


def _stage(config: UNetConfig, level: Level, inputs: int, *, down: bool = False, up: bool = False) -> Stage:
    channels, groups = level.channels, config.norm_num_groups
    widths = [inputs] + [channels] * (level.layers - 1)
    resnets = [
        ResnetBlock(width + skip, channels, config.time_width, groups, config.norm_eps)
        for width, skip in zip_longest(widths, level.skips, fillvalue=0)
    ]
    transformers = [
        Transformer2D(
            channels,
            config.cross_attention_dim,
            heads=level.heads,
            depth=depth,
            groups=groups,
            linear=config.use_linear_projection,
            upcast=config.upcast_attention,
        )
        for depth in level.depths
    ]
    return Stage(
        resnets,
        transformers,
        down=Downsample(channels, padding=1) if down else None,
        up=Upsample(channels) if up else None,
    )


ZERO = ("conv2", "proj_out", "conv_out")
"""Last layers of residual blocks, of groups of transformer layers, and of the UNet."""


def init_weights(model: UNet, key: mx.array) -> None:
    """Set initial weights, random by `key`, as in Stable Diffusion's first code: each residual branch is zero.

    Weights and biases of linear layers and convolutions are uniform within one over the root of a unit's number of
    inputs; norms are the identity; the last layers of `ZERO` are zero.
    """
    shapes: dict[str, Sequence[int]] = {
        name: value.shape for name, value in dict(tree_flatten(model.parameters())).items()
    }
    drawn: list[tuple[str, Any]] = []
    for (name, shape), one in zip(shapes.items(), mx.random.split(key, len(shapes)), strict=True):
        layer, kind = name.rsplit(".", 1)
        inputs = math.prod(shapes[f"{layer}.weight"][1:])
        if len(shapes[f"{layer}.weight"]) == 1:
            value = mx.full(shape, float(kind == "weight"))
        elif layer.endswith(ZERO):
            value = mx.zeros(shape)
        else:
            value = mx.random.uniform(-(inputs**-0.5), inputs**-0.5, shape, key=one)
        drawn.append((name, value))
    model.update(tree_unflatten(drawn))
