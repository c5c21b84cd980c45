"""DINO (Caron et al., 2021): a vision transformer trained without labels, whose features tell subjects apart.

ViT-S/16 (`facebook/dino-vits16`): 384 wide, 21,665,664 parameters. Files of transformers and of the authors are read;
the norms' epsilon is that of config.json (transformers wrote 1e-12), or the authors' 1e-6 without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mflux_vae.runtime.threads import exclusive, thread_safe
from mflux_vae.weights.keymaps.rules import Rule, Tensors, conv_from_mlx, conv_to_mlx, to_mlx
from mflux_vae_train.evaluation.features import in_batches
from mflux_vae_train.evaluation.preprocessing import IMAGENET, Preprocessing
from mflux_vae_train.evaluation.vit import VisionConfig, VisionTransformer
from mflux_vae_train.evaluation.weights import fill, locate, read_config, read_weights
from mflux_vae_train.pipelines.loading.folder import read_file
from mflux_vae_train.pipelines.loading.fused_layers import QKV, split_fused

_LAYERS = {
    "layer_norm1": ("layernorm_before", "norm1"),
    "self_attn.q_proj": ("attention.attention.query", "attn.qkv.q"),
    "self_attn.k_proj": ("attention.attention.key", "attn.qkv.k"),
    "self_attn.v_proj": ("attention.attention.value", "attn.qkv.v"),
    "self_attn.out_proj": ("attention.output.dense", "attn.proj"),
    "layer_norm2": ("layernorm_after", "norm2"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
"""Parts of a layer: our names, those of transformers, and the authors'."""


_EMBEDDINGS = (
    ("embeddings.class_embedding", ("embeddings.cls_token", "cls_token"), mx.flatten, lambda token: token[None, None]),
    (
        "embeddings.position_embedding.weight",
        ("embeddings.position_embeddings", "pos_embed"),
        lambda rows: rows[0] if rows.ndim == 3 else rows,
        lambda rows: rows[None],
    ),
    (
        "embeddings.patch_embedding.{kind}",
        ("embeddings.patch_embeddings.projection.{kind}", "patch_embed.proj.{kind}"),
        conv_to_mlx,
        conv_from_mlx,
    ),
    ("post_layernorm.{kind}", ("layernorm.{kind}", "norm.{kind}"), None, None),
)
"""Other parts."""


def _rules(layers: str, column: int) -> list[Rule]:
    """
    Args:
        layers: path of a layer in the files.
        column: of their names in `_LAYERS` and `_EMBEDDINGS`.
    """
    parts = ((f"{layers}.{names[column]}", f"encoder.layers.{{n}}.{ours}") for ours, names in _LAYERS.items())
    return [
        *(Rule(f"{theirs}.{{kind}}", f"{ours}.{{kind}}") for theirs, ours in parts),
        *(Rule(names[column], ours, *change) for ours, names, *change in _EMBEDDINGS),
    ]


AUTHORS = _rules("blocks.{n}", 1)
"""Naming of the authors' files, with fused projections split."""

TABLE = (*_rules("encoder.layer.{n}", 0), *AUTHORS, Rule("pooler.{path}", None))
"""Naming of transformers, which is written, and of the authors. transformers adds a pooler that DINO does not have."""


@dataclass(frozen=True, kw_only=True)
class DinoConfig(VisionConfig):
    """config.json of a `ViTModel`; field names and defaults are those of transformers."""

    kinds: ClassVar[dict[str, object]] = {"model_type": "vit", "architectures": ["ViTModel"]}

    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12


VIT_S16 = DinoConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6, layer_norm_eps=1e-6)
"""The authors' ViT-S/16."""


class Dino(VisionTransformer):
    """DINO's vision transformer: pixels -> class token, see `VisionTransformer`."""

    def __init__(self, config: DinoConfig = VIT_S16):
        super().__init__(config, clip=False)
        # 256 for 224, as in DINO's evaluation
        short_side = config.image_size * 256 // 224
        self.preprocess = Preprocessing(short_side=short_side, crop=config.image_size, statistics=IMAGENET)

    @classmethod
    @exclusive()
    def from_pretrained(cls, source: str | Path) -> Dino:
        """Load a network in float32.

        Args:
            source: hub repository; folder with config.json and weights (safetensors, or pytorch_model.bin); or the
                authors' file, such as dino_deitsmall16_pretrain.pth.

        Raises:
            WeightsError: no such source, or a file is missing, broken or of another network.
            SettingsError: a configuration of another kind of model.
        """
        place = locate(source)
        stored = read_file(place) if place.is_file() else read_weights(place)
        tensors = to_mlx(split_fused(stored, {"qkv": QKV}), TABLE)
        is_folder = place.is_dir()
        config = read_config(place / "config.json", DinoConfig.from_dict) if is_folder else _original_config(tensors)
        network = cls(config)
        fill(network, tensors, place)
        return network

    @thread_safe
    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 (H, W, 3) of any sizes -> features of length 1, float32 (N, hidden_size).

        Raises:
            ImageError: an image has another shape or range.
        """
        return in_batches(lambda part: self(mx.array(self.preprocess(part))), images, self.config.hidden_size)


def _original_config(tensors: Tensors) -> DinoConfig:
    """Sizes of the authors' ViT-S and ViT-B, whose heads are 64 wide and whose patches are 16 or 8."""
    patches = tensors.get("embeddings.patch_embedding.weight")
    if patches is None or patches.ndim != 4 or patches.shape[0] < 64 or 224 % patches.shape[1]:
        return VIT_S16  # loading lists what differs
    width, side = patches.shape[:2]
    heads = width // 64
    return replace(
        VIT_S16, hidden_size=heads * 64, intermediate_size=heads * 256, num_attention_heads=heads, patch_size=side
    )
