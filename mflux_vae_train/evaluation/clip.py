"""CLIP (Radford et al., 2021): images and prompts as vectors whose cosine says how well they fit.

ViT-B/32 (`openai/clip-vit-base-patch32`, 151,277,313 parameters, one of them the temperature of its training, which is
dropped). Other sizes follow config.json: ViT-B/16, ViT-L/14, OpenCLIP's as transformers publishes them.
Parameter paths are the keys of the published files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.networks.layers import Linear
from mflux_vae.runtime.threads import exclusive, thread_safe
from mflux_vae.utils.formatting import first_few
from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx, to_mlx
from mflux_vae_train.evaluation.features import in_batches
from mflux_vae_train.evaluation.preprocessing import OPENAI, Preprocessing
from mflux_vae_train.evaluation.vit import VisionConfig, VisionTransformer
from mflux_vae_train.evaluation.weights import fill, locate, read_config, read_weights
from mflux_vae_train.pipelines.text.clip import CLIPTextConfigWithProjection, CLIPTextModelWithProjection
from mflux_vae_train.pipelines.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

VIT_B32 = CLIPTextConfigWithProjection(), VisionConfig()
"""Configurations of text and vision."""

_PATCHES = "vision_model.embeddings.patch_embedding.weight"

TABLE = (
    Rule(_PATCHES, _PATCHES, conv_to_mlx, conv_from_mlx),
    Rule("{tower}.embeddings.position_ids", None),  # 0, 1, 2, ... in older files
    Rule("logit_scale", None),
)


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One part of a `CLIPModel`'s config.json. As in transformers, the older `*_config_dict` counts where it stands."""
    if (kind := values.get("model_type")) != "clip":
        raise SettingsError(f"config of a {kind!r}, which is not supported; clip is")
    older = values.get(f"{name}_config_dict")
    part = values.get(f"{name}_config") if older is None else older
    return {**(part or {}), "projection_dim": values.get("projection_dim", 512)}


class Clip(CLIPTextModelWithProjection):
    """Text encoder with projection, and beside it the vision transformer, as the published files hold them.

    Args:
        text, vision: configurations; the former's `projection_dim` is that of both.
        tokenizer: needed for `text_features`.
    """

    def __init__(
        self,
        text: CLIPTextConfigWithProjection,
        vision: VisionConfig,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__(text)
        self.vision_model = VisionTransformer(vision, clip=True)
        self.width = text.projection_dim or text.hidden_size
        self.visual_projection = Linear(vision.hidden_size, self.width, bias=False)
        self.preprocess = Preprocessing(short_side=vision.image_size, crop=vision.image_size, statistics=OPENAI)
        self._tokenizer = tokenizer

    @classmethod
    @exclusive()
    def from_pretrained(cls, source: str | Path) -> Clip:
        """Load networks, in float32, and tokenizer.

        Args:
            source: hub repository, or folder with config.json, weights (safetensors, or pytorch_model.bin) and the
                tokenizer's files.

        Raises:
            WeightsError: no such source, or a file is missing, broken or of another network.
            SettingsError: a configuration of another kind of model.
        """
        folder = locate(source)
        file = folder / "config.json"
        text = read_config(file, lambda values: CLIPTextConfigWithProjection.from_dict(_part(values, "text")))
        vision = read_config(file, lambda values: VisionConfig.from_dict(_part(values, "vision")))
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > text.vocab_size:
            raise WeightsError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the network {text.vocab_size}; "
                "take both from the same model"
            )
        network = cls(text, vision, tokenizer)
        fill(network, to_mlx(read_weights(folder), TABLE), folder)
        return network

    def embed_images(self, pixels: mx.array) -> mx.array:
        """Pixels (B, image_size, image_size, 3), preprocessed -> (B, projection_dim)."""
        return self.visual_projection(self.vision_model(pixels))

    def embed_text(self, input_ids: mx.array) -> mx.array:
        """Token ids (B, L) -> (B, projection_dim)."""
        return self(input_ids)[1]

    @thread_safe
    def image_features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Images uint8 (H, W, 3) of any sizes -> features of length 1, float32 (N, projection_dim).

        Raises:
            ImageError: an image has another shape or range.
        """
        return in_batches(lambda part: self.embed_images(mx.array(self.preprocess(part))), images, self.width)

    @thread_safe
    def text_features(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> features of length 1, float32 (N, projection_dim).

        Logs a warning about prompts that are cut because they have more tokens than CLIP reads.
        """
        if self._tokenizer is None:
            raise SettingsError("text features need a tokenizer; load CLIP by from_pretrained")
        encode, limit = self._tokenizer.encode, self.config.max_position_embeddings
        read = zip(prompts, self._tokenizer.inspect(prompts, limit), strict=True)
        if cut := [prompt for prompt, tokens in read if tokens.count > limit]:
            logger.warning("CLIP reads %d tokens; the end of these prompts does not count: %s", limit, first_few(cut))
        return in_batches(lambda part: self.embed_text(encode(part, limit)), prompts, self.width)
