"""Z-Image as a trainable pipeline: encodes images and prompts, predicts for the loss, samples images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.pipelines.footprint import Phase, Workload
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.qwen3_prompts import EMBEDS, LENGTH, ZImagePrompts
from mflux_vae_train.pipelines.z_image import memory, naming
from mflux_vae_train.pipelines.z_image.family import FAMILY
from mflux_vae_train.pipelines.z_image.packing import padded
from mflux_vae_train.pipelines.z_image.transformer import KIND


class ZImagePipeline(FlowPipeline):
    """Z-Image behind the `DiffusionPipeline` protocol.

    Guidance g draws with v + g (v - v of the empty prompt), as in diffusers: 0 is no guidance.
    """

    family = FAMILY
    prompts_class = ZImagePrompts

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the transformer computes in."""
        embedder: Any = self.denoiser.all_x_embedder[KIND]
        return getattr(embedder, "linear", embedder).bias.dtype  # an adapter holds the layer as `linear`

    def _guidance_scale(self, guidance: float) -> float | None:
        """See `FlowPipeline`."""
        return 1 + guidance if guidance > 0 else None

    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity, float32; the transformer computes in `dtype`."""
        prompt = conditioning[EMBEDS].astype(self.dtype)
        return -self.denoiser(latents.astype(self.dtype), 1 - sigma, prompt, conditioning[LENGTH]).astype(mx.float32)

    def _phases(self, work: Workload, text_tokens: int) -> list[Phase]:
        return memory.phases(self.configs, work, text_tokens=text_tokens)

    def lora_targets(self) -> Sequence[str]:
        """Attention of all blocks, refiners included, as in diffusers' script."""
        return naming.PRESETS["attention"]

    # capabilities.SupportsTrimming

    def trim(self, conditioning: Conditioning) -> Conditioning:
        """As many tokens as the transformer attends to in the longest row, a multiple of 32."""
        longest: Any = conditioning[LENGTH].max().item()
        return {**conditioning, EMBEDS: conditioning[EMBEDS][:, : padded(longest)]}

    # capabilities.SupportsAdapterExport

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        return naming.kohya_naming(self.configs.transformer)

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """See `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, self.recommended, dora=dora)
