"""Stable Diffusion 1, 2 and XL as trainable pipelines: encode images and prompts, predict for the loss, sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.pretrained.hub import cache_folder
from mflux_vae.runtime.threads import thread_safe
from mflux_vae_train.pipelines.capabilities import CropGeometry, KohyaNaming
from mflux_vae_train.pipelines.decoding import decode
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.loading.snapshot import Snapshot
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction, normal
from mflux_vae_train.pipelines.parts import Parts, PartsPipeline
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.stable_diffusion import memory, naming
from mflux_vae_train.pipelines.stable_diffusion.configs import VAE_FACTOR, Configs
from mflux_vae_train.pipelines.stable_diffusion.files import folder as folders
from mflux_vae_train.pipelines.stable_diffusion.files.hub import Opened
from mflux_vae_train.pipelines.stable_diffusion.files.parts import new_text_encoder, open_parts
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import write_single_file
from mflux_vae_train.pipelines.stable_diffusion.predict import Network, check_sampling, predict
from mflux_vae_train.pipelines.stable_diffusion.prompts import EMBEDS, POOLED, SDPrompts
from mflux_vae_train.pipelines.stable_diffusion.sample import sample
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.text.clip_naming import CLIP_ATTENTION

logger = logging.getLogger(__name__)

TIME_IDS = "time_ids"
"""Array of SDXL's conditioning on size and crop: (B, 6), see `StableDiffusionXLPipeline.encode_crops`."""


class StableDiffusionPipeline(PartsPipeline):
    """Stable Diffusion 1 or 2 behind the `DiffusionPipeline` protocol.

    Args:
        parts: see `stable_diffusion.parts.stable_diffusion_parts`.
    """

    adapter_prefix = "unet"
    prompts: SDPrompts

    def __init__(
        self,
        parts: Parts,
        configs: Configs,
        *,
        name: str = "stable-diffusion",
        snapshot: Snapshot | None = None,
        base_model: str | None = None,
    ) -> None:
        self.configs, self.schedule = configs, configs.schedule
        prompts = SDPrompts(parts, configs.text_encoders, zeros_for_empty=configs.zero_empty_prompt)
        options: dict[str, Any] = {"name": name, "snapshot": snapshot, "base_model": base_model}
        super().__init__(parts, prompts, configs.recommended, **options)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: mx.Dtype | None = None, *, variant: str | None = None
    ) -> StableDiffusionPipeline:
        """Open a folder in diffusers' layout. Weights are read when they are first used.

        Args:
            dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
            variant: of the weights files, such as "fp16".

        Returns:
            a `StableDiffusionXLPipeline` for a folder of SDXL.

        Raises:
            WeightsError: a file is missing or broken, or its tensors do not fit the network; all are listed.
            SettingsError: a configuration needs an unsupported option.
        """
        place = Path(folder)
        configs = folders.read_configs(place)
        parts = open_parts(configs, lambda: place, dtype=dtype, variant=variant)
        parts.check()
        return pipeline_class(configs)(parts, configs, name=place.resolve().name)

    def _write(self, folder: Path, dtype: str) -> None:
        folders.write(self.parts, self.configs, folder, dtype)

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype that the UNet computes in."""
        return self.denoiser.conv_norm_out.weight.dtype

    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        """Noise or v at a random timestep, and its target; see `stable_diffusion.predict`.

        Args:
            guidance: unused: training does not depend on it.
            sampling: None for the recommended scheme.
        """
        height, width = latents.shape[1:3]
        return predict(
            self._network(conditioning, (height * VAE_FACTOR, width * VAE_FACTOR)),
            latents,
            key=key,
            schedule=self.schedule,
            sampling=sampling or NoiseSampling(scheme=self.recommended.weighting_scheme or "uniform"),
        )

    @thread_safe
    def sample(
        self,
        conditioning: Conditioning,
        *,
        size: tuple[int, int],
        steps: int,
        guidance: float,
        key: mx.array,
        latents: mx.array | None = None,
    ) -> mx.array:
        """Conditioning -> images (B, H, W, 3) in [-1, 1], float32; guidance above 1 is classifier-free.

        Args:
            size: (height, width) in pixels, multiples of 8.
            key: (B, 2); row i determines the noise of sample i.
            latents: initial noise (B, H/8, W/8, C) to use instead, standard normal.

        Raises:
            SettingsError: a size that is not a multiple of 8, or an impossible number of steps.
        """
        height, width = size
        if height < 1 or width < 1 or height % VAE_FACTOR or width % VAE_FACTOR:
            raise SettingsError(f"sizes of images are multiples of {VAE_FACTOR}, not {height}x{width}")
        if latents is None:
            latents = normal(key, (height // VAE_FACTOR, width // VAE_FACTOR, self.configs.unet.in_channels))
        classifier_free = self.reads_negative_prompt(guidance)
        if classifier_free:
            conditioning = self.prompts.with_unconditional(conditioning)
        drawn = sample(
            self._network(conditioning, size),
            latents,
            self.schedule,
            steps=steps,
            key=key,
            guidance=guidance if classifier_free else None,
        )
        return decode(self.vae, drawn)

    def reads_negative_prompt(self, guidance: float) -> bool:
        """Whether guidance is classifier-free."""
        return guidance > 1

    def _network(self, conditioning: Conditioning, size: tuple[int, int]) -> Network:
        """Latents at timesteps (B,) -> prediction, float32; the UNet computes in `dtype`."""
        conditioning = self.prompts.finish(conditioning)

        def network(latents: mx.array, timesteps: mx.array) -> mx.array:
            text, dtype = conditioning[EMBEDS].astype(self.dtype), self.dtype
            added = self._added(conditioning, size)
            return self.denoiser(latents.astype(dtype), timesteps, text, added).astype(mx.float32)

        return network

    def _added(self, conditioning: Conditioning, size: tuple[int, int]) -> tuple[mx.array, mx.array] | None:
        """Further inputs of the UNet for images of this size."""
        return None

    def lora_targets(self) -> Sequence[str]:
        """The projections of all attention layers, as in diffusers' scripts."""
        return naming.PRESETS["attention"]

    # capabilities.SupportsNoiseCheck

    def check_sampling(self, sampling: NoiseSampling) -> None:
        """See `stable_diffusion.predict.check_sampling`."""
        check_sampling(sampling)

    # capabilities.SupportsMemoryControl

    def skeleton(self) -> nn.Module:
        """The UNet if it is loaded; else its layers with random weights, which are lazy."""
        return self._denoiser.loaded or UNet(self.configs.unet)

    def footprint(self, work: Workload) -> Footprint:
        """Estimate what a run needs, from configurations alone."""
        phases = memory.phases(self.configs, work)
        if self._snapshot is None or self._snapshot.is_cached():
            return Footprint(phases=phases)
        download = memory.published_bytes(self.configs, self._snapshot.parts, self._snapshot.variant)
        return Footprint(phases=phases, download=download, cache=cache_folder())

    # capabilities.SupportsClipSkip

    @property
    def clip_skip(self) -> int | None:
        """See `SDPrompts.clip_skip`."""
        return self.prompts.clip_skip

    @clip_skip.setter
    def clip_skip(self, layers: int | None) -> None:
        self.prompts.clip_skip = layers

    @property
    def max_clip_skip(self) -> int:
        return self.prompts.max_clip_skip

    # capabilities.SupportsTextEncoderTraining

    def encode_text_in_step(self, on: bool) -> None:
        """Let all text encoders run in the step, see `SDPrompts.in_step`."""
        self.prompts.in_step = [*self.prompts.encoders] if on else []

    def text_encoders_to_train(self) -> Mapping[str, nn.Module]:
        """All text encoders, which stay loaded from now on."""
        return {name: encoder.keep() for name, encoder in self.prompts.encoders.items()}

    def text_encoder_skeletons(self) -> Mapping[str, nn.Module]:
        """Each text encoder if it is loaded; else its layers with random weights, which are lazy."""
        encoders = self.prompts.encoders
        return {
            name: encoders[name].loaded or new_text_encoder(config)
            for name, config in self.configs.text_encoders.items()
        }

    def text_encoder_targets(self) -> Mapping[str, Sequence[str]]:
        """The four projections of attention, as in diffusers' scripts."""
        return dict.fromkeys(self.prompts.encoders, CLIP_ATTENTION)

    # capabilities.SupportsAdapterExport

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        return naming.kohya_naming(self.configs, self.clip_skip)

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """See `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, self.configs, dora=dora, clip_skip=self.clip_skip)

    # capabilities.SupportsSingleFile

    def save_single_file(self, file: Path) -> None:
        """See `write_single_file`."""
        write_single_file(file, self.parts, self.configs)


class StableDiffusionXLPipeline(StableDiffusionPipeline):
    """SDXL: conditioned on the pooled prompt, and on size and crop of each image."""

    def encode_crops(self, crops: Sequence[CropGeometry]) -> Conditioning:
        """`time_ids` (B, 6) float32: height and width of the original, top and left, height and width of the crop."""
        return {TIME_IDS: mx.array([[*one.original, *one.corner, *one.target] for one in crops], mx.float32)}

    def _added(self, conditioning: Conditioning, size: tuple[int, int]) -> tuple[mx.array, mx.array]:
        pooled = conditioning[POOLED]
        whole = self.encode_crops([CropGeometry(original=size, corner=(0, 0), target=size)])[TIME_IDS]
        ids = conditioning.get(TIME_IDS, mx.broadcast_to(whole, (pooled.shape[0], whole.shape[1])))
        return pooled.astype(self.dtype), ids


def pipeline_class(configs: Configs) -> type[StableDiffusionPipeline]:
    return StableDiffusionPipeline if configs.text_encoder_2 is None else StableDiffusionXLPipeline


def from_opened(opened: Opened) -> StableDiffusionPipeline:
    """The pipeline of a repository or file; what it does not specify is a warning."""
    for note in opened.notes:
        logger.warning("%s", note)
    return pipeline_class(opened.configs)(
        opened.parts, opened.configs, name=opened.name, snapshot=opened.snapshot, base_model=opened.base_model
    )
