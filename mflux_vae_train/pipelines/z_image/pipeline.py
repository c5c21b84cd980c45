"""Z-Image as a trainable pipeline: encodes images and prompts, predicts for the loss, samples images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.capabilities import KohyaNaming, Use
from mflux_vae_train.pipelines.flow import files
from mflux_vae_train.pipelines.flow.pipeline import FlowPipeline
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.loading.snapshot import Snapshot
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.text.qwen3_prompts import EMBEDS, LENGTH, ZImagePrompts
from mflux_vae_train.pipelines.z_image import memory, naming
from mflux_vae_train.pipelines.z_image.configs import Configs
from mflux_vae_train.pipelines.z_image.family import FAMILY
from mflux_vae_train.pipelines.z_image.packing import VAE_FACTOR
from mflux_vae_train.pipelines.z_image.transformer import KIND, ZImageTransformer


class ZImagePipeline(FlowPipeline):
    """Z-Image behind the `DiffusionPipeline` protocol.

    Guidance g draws with v + g (v - v of the empty prompt), as in diffusers: 0 is no guidance.

    Args:
        parts: see `flow.files.parts_of`.
    """

    adapter_prefix = "transformer"
    latent_scale = VAE_FACTOR
    prompts: ZImagePrompts

    def __init__(
        self,
        parts: Parts,
        configs: Configs,
        *,
        name: str = "z-image",
        snapshot: Snapshot | None = None,
        base_model: str | None = None,
    ) -> None:
        self.configs, self.schedule = configs, configs.schedule
        options: dict[str, Any] = {"name": name, "snapshot": snapshot, "base_model": base_model}
        super().__init__(parts, ZImagePrompts(parts), configs.recommended, **options)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: mx.Dtype | None = None, *, variant: str | None = None
    ) -> ZImagePipeline:
        """Open a folder. Weights are read when they are first used.

        Args:
            dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
            variant: of the weights files, such as "fp16".

        Raises:
            WeightsError: a file is missing or broken, or its tensors do not fit the network; all are listed.
            SettingsError: a configuration needs an unsupported option.
        """
        return files.open_local(FAMILY, cls, Path(folder), dtype=dtype, variant=variant)

    def _write(self, folder: Path, dtype: str) -> None:
        files.write(FAMILY, self.parts, self.configs, folder, dtype)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the transformer computes in."""
        embedder: Any = self.denoiser.all_x_embedder[KIND]
        return getattr(embedder, "linear", embedder).bias.dtype  # an adapter holds the layer as `linear`

    @property
    def latent_channels(self) -> int:
        return self.configs.transformer.in_channels

    def _guidance_scale(self, guidance: float) -> float | None:
        """See `FlowPipeline`."""
        return 1 + guidance if guidance > 0 else None

    def _velocity(self, latents: mx.array, sigma: mx.array, conditioning: Conditioning, guidance: float) -> mx.array:
        """Latents at noise levels sigma (B,) -> velocity, float32; the transformer computes in `dtype`."""
        prompt = conditioning[EMBEDS].astype(self.dtype)
        return -self.denoiser(latents.astype(self.dtype), 1 - sigma, prompt, conditioning[LENGTH]).astype(mx.float32)

    def lora_targets(self) -> Sequence[str]:
        """Attention of all blocks, refiners included, as in diffusers' script."""
        return naming.PRESETS["attention"]

    # capabilities.SupportsMemoryControl

    def release(self, *uses: Use) -> None:
        """See `Parts.release`. The encoding of the empty prompt is kept, for guidance."""
        if "prompts" in uses and self.prompts.encoder.loaded is not None:
            self.prompts.unconditional()  # encoded now
        super().release(*uses)

    def skeleton(self) -> nn.Module:
        """The transformer if it is loaded; else its layers with random weights, which are lazy."""
        return self._denoiser.loaded or ZImageTransformer(self.configs.transformer)

    def footprint(self, work: Workload) -> Footprint:
        """Estimate what a run needs, from configurations alone."""
        length = self.prompts.tokens_if_known
        phases = memory.phases(self.configs, work, text_tokens=min(length, work.prompt_tokens or length))
        return files.footprint(FAMILY, self.configs, phases, self._snapshot)

    # capabilities.SupportsPromptLimit

    @property
    def prompt_limit(self) -> int | None:
        """See `LimitedPromptEncoder.limit`."""
        return self.prompts.limit

    @prompt_limit.setter
    def prompt_limit(self, tokens: int | None) -> None:
        self.prompts.limit = tokens

    # capabilities.SupportsAdapterExport

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        return naming.kohya_naming(self.configs.transformer)

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """See `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, self.recommended, dora=dora)
