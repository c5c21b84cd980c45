"""FLUX.1 as a trainable pipeline: encodes images and prompts, predicts for the loss, samples images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.pipelines.flux1 import memory, naming
from mflux_vae_train.pipelines.flux1.family import FAMILY
from mflux_vae_train.pipelines.flux1.packing import image_ids, pack, text_ids, unpack
from mflux_vae_train.pipelines.flux1.prompts import CLIP, EMBEDS, POOLED, FluxPrompts
from mflux_vae_train.pipelines.footprint import Phase, Workload
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.clip import CLIPTextModel


class FluxPipeline(FlowPipeline):
    """FLUX.1 behind the `DiffusionPipeline` protocol.

    Args:
        parts: see `flux1.family.flux_parts`.
    """

    family = FAMILY
    prompts: FluxPrompts

    def _new_prompts(self, parts: Parts) -> FluxPrompts:
        return FluxPrompts(parts, guidance_embeds=self._guidance_embeds)

    @property
    def _guidance_embeds(self) -> bool:
        return self.configs.transformer.guidance_embeds

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the transformer computes in."""
        embedder: Any = self.denoiser.x_embedder
        return getattr(embedder, "linear", embedder).bias.dtype  # an adapter holds the layer as `linear`

    @property
    def _is_guided(self) -> bool:
        """Not if the model embeds guidance."""
        return not self._guidance_embeds

    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity, float32; the transformer computes in `dtype`."""
        height, width = latents.shape[1:3]
        prompt, pooled = (conditioning[name].astype(self.dtype) for name in (EMBEDS, POOLED))
        velocity = self.denoiser(
            pack(latents).astype(self.dtype),
            prompt,
            pooled,
            sigma,
            image_ids(height, width),
            text_ids(prompt.shape[1]),
            mx.full(sigma.shape, guidance) if self._guidance_embeds else None,
        )
        return unpack(velocity.astype(mx.float32), height, width)

    def _phases(self, work: Workload, text_tokens: int) -> list[Phase]:
        return memory.phases(self.configs, work, text_tokens=text_tokens)

    def lora_targets(self) -> Sequence[str]:
        """Attention and feed-forward layers of all blocks."""
        return naming.PRESETS["attention+mlp"]

    # capabilities.SupportsTextEncoderTraining

    def encode_text_in_step(self, on: bool) -> None:
        """See `FluxPrompts.clip_in_step`."""
        self.prompts.clip_in_step = on

    def text_encoders_to_train(self) -> Mapping[str, nn.Module]:
        """CLIP, which stays loaded from now on. T5, forty times as large, is not trained."""
        return {CLIP: self.prompts.clip.keep()}

    def text_encoder_skeletons(self) -> Mapping[str, nn.Module]:
        """CLIP if it is loaded; else its layers with random weights, which are lazy."""
        return {CLIP: self.prompts.clip.loaded or CLIPTextModel(self.configs.text_encoder)}

    def text_encoder_targets(self) -> Mapping[str, Sequence[str]]:
        """The four projections of CLIP's attention, as in diffusers' scripts."""
        return {CLIP: naming.CLIP_ATTENTION}

    # capabilities.SupportsAdapterExport

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        return naming.kohya_naming(self.configs.transformer, self.configs.text_encoder)

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """See `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, self.recommended, dora=dora, text_encoder=text_encoder)
