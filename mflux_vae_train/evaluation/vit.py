"""Vision transformer (Dosovitskiy et al., 2021): patches of an image and a class token through pre-norm layers.

Parameter paths are the keys below `vision_model` in published CLIP models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Conv2d
from mflux_vae_train.pipelines.layers.encoder import Encoder, LayerNorm, check_encoder
from mflux_vae_train.pipelines.loading.config_check import JSONConfig


@dataclass(frozen=True, kw_only=True)
class VisionConfig(JSONConfig):
    """`vision_config` in CLIP's config.json; field names and defaults are those of transformers."""

    kinds: ClassVar[dict[str, object]] = {"model_type": "clip_vision_model"}

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_encoder(self, "vision config")
        if self.image_size % self.patch_size:
            raise SettingsError(
                f"vision config: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )


class PatchEmbedding(Conv2d):
    """Convolution with stride = kernel, as one matrix product: (B, H, W, C) -> (B, patches, D)."""

    def __call__(self, pixels: mx.array) -> mx.array:
        B, H, W, C = pixels.shape
        _, height, width, _ = self.weight.shape
        x = pixels.reshape(B, H // height, height, W // width, width, C).transpose(0, 1, 3, 2, 4, 5)
        y = x.reshape(B, -1, height * width * C) @ self.weight.flatten(1).T
        return y + self.bias if "bias" in self else y


class VisionEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig, *, bias: bool):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = mx.zeros((width,))
        self.patch_embedding = PatchEmbedding(3, width, patch, stride=patch, bias=bias)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels)
        token = mx.broadcast_to(self.class_embedding, (patches.shape[0], 1, patches.shape[2]))
        return mx.concatenate([token, patches], axis=1) + self.position_embedding.weight


class VisionTransformer(nn.Module):
    """Pixels (B, image_size, image_size, 3) -> class token after the final norm (B, hidden_size).

    Args:
        clip: as in CLIP: a norm before the first layer, and patches without bias.
    """

    def __init__(self, config: VisionConfig, *, clip: bool):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config, bias=not clip)
        if clip:
            self.pre_layrnorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the published spelling
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.embeddings(pixels)
        if "pre_layrnorm" in self:
            x = self.pre_layrnorm(x)
        return self.post_layernorm(self.encoder(x)[:, 0])
