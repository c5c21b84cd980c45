"""FLUX.1 as a trainable pipeline: prompts and images in, losses and images out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.capabilities import KohyaNaming
from mflux_vae_train.pipelines.flux1 import folder as layout
from mflux_vae_train.pipelines.flux1 import memory, naming
from mflux_vae_train.pipelines.flux1.configs import Configs
from mflux_vae_train.pipelines.flux1.packing import PATCH, VAE_FACTOR, image_ids, pack, text_ids, unpack
from mflux_vae_train.pipelines.flux1.prompts import EMBEDS, POOLED, FluxPrompts
from mflux_vae_train.pipelines.flux1.schedule import FlowMatchSchedule, euler_step, noised
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.noise import SCHNELL_STEPS, NoiseSampling, Prediction, error_weight
from mflux_vae_train.pipelines.protocol import Conditioning, Recommended

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.hub import Snapshot

SIZE_MULTIPLE = VAE_FACTOR * PATCH

_DEV = Recommended(
    resolution=512,
    size_multiple=SIZE_MULTIPLE,
    learning_rate=1e-4,
    learning_rate_full=5e-6,
    guidance=3.5,
    steps=28,
    rank=16,
    caption_dropout=0.0,
    weighting_scheme="flux_shift",
    usual_guidance=(1.5, 5.0),
)
_SCHNELL = replace(
    _DEV,
    guidance=1.0,
    steps=SCHNELL_STEPS,
    weighting_scheme="schnell",
    most_guidance=1.0,
    usual_guidance=(0.0, 1.0),
)


class FluxPipeline(FluxPrompts):
    """FLUX.1 behind the `DiffusionPipeline` protocol. Latents are (B, H/8, W/8, C), scaled.

    Args:
        transformer, vae, text_encoder (CLIP), text_encoder_2 (T5), tokenizer_folder, tokenizer_2_folder: see
            `FluxParts`; `save_pretrained` copies the folders.
        recommended: None for dev's numbers where guidance is embedded, else schnell's.
        snapshot: where the parts come from, if that is the hub.
    """

    adapter_prefix = "transformer"

    def __init__(
        self,
        *,
        schedule: FlowMatchSchedule,
        recommended: Recommended | None = None,
        name: str = "flux1",
        snapshot: Snapshot | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.snapshot = snapshot
        self.schedule = schedule
        self.recommended = recommended or (_DEV if self.guidance_embeds else _SCHNELL)
        self.name = name

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: mx.Dtype | None = None, *, variant: str | None = None
    ) -> FluxPipeline:
        """Open a folder in diffusers' layout, or one that mflux saved. Each part is read when it is first used.

        Args:
            dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
            variant: of the weights files, such as "fp16".

        Raises:
            WeightsError: a file is missing or broken, or its tensors are not the network's; all are listed.
            SettingsError: a configuration asks for what this pipeline has not.
        """
        place = Path(folder)
        parts = layout.parts(layout.read_configs(place), lambda: place, dtype=dtype, variant=variant)
        pipeline = cls(**parts, name=place.resolve().name)
        pipeline.check()
        return pipeline

    @property
    def dtype(self) -> mx.Dtype:
        """What the transformer computes in."""
        embedder: Any = self.denoiser.x_embedder
        return getattr(embedder, "linear", embedder).bias.dtype  # an adapter holds the layer as `linear`

    def save_pretrained(self, folder: str | Path, dtype: str = "float16") -> None:
        """Write the folder that `from_pretrained` and diffusers' FluxPipeline open.

        Args:
            dtype: of the stored weights: float16, bfloat16 or float32.
        """
        layout.write(self, Path(folder), dtype)

    def encode_images(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) in [-1, 1] -> latents (B, H/8, W/8, C), the posterior's mode."""
        return self.vae.encode_nhwc(pixels)

    def footprint(self, work: Workload) -> Footprint:
        """An estimate of what a run takes, from configurations; nothing is loaded."""
        vae = self._vae.config
        configs = Configs(
            transformer=self._transformer.config,
            text_encoder=self._text_encoder.config,
            text_encoder_2=self._text_encoder_2.config,
            vae=vae if isinstance(vae, Mapping) else vae.to_dict(),
            schedule=self.schedule,
        )
        tokenizer = self._tokenizer_2.loaded
        length = self.longest_prompt if tokenizer is None else self.max_text_tokens
        length = min(length, work.prompt_tokens or length)
        phases = memory.phases(configs, work, text_tokens=length)
        if self.snapshot is None or self.snapshot.is_here():
            return Footprint(phases=phases)
        download = memory.published_bytes(configs, self.snapshot.parts)
        return Footprint(phases=phases, download=download, cache=self.snapshot.cache())

    def loss(self, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float) -> mx.array:
        """Weighted squared error of the velocity at a random noise level, averaged over each sample: (B,) float32.

        Args:
            guidance: told to a model with embedded guidance; no matter to others.
        """
        return self.predict(latents, conditioning, key=key, guidance=guidance).loss()

    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        """The velocity at a random noise level, and the true one.

        x_s = (1 - s) x0 + s e, target e - x0 (Lipman et al. 2023); noise and error are float32 always.

        Args:
            guidance: as in `loss`.
            sampling: None for the recommended scheme.
        """
        sampling = sampling or NoiseSampling(scheme=self.recommended.weighting_scheme or "uniform")
        keys = mx.vmap(lambda one: mx.random.split(one, 2))(key)
        height, width = latents.shape[1:3]
        clean = latents.astype(mx.float32)
        noise = _noise(keys[:, 0], latents.shape[1:])
        tokens = height * width // PATCH**2
        sigma = self.schedule.training_sigmas(keys[:, 1], sampling, image_tokens=tokens)
        said = self._read(conditioning)
        velocity = self._velocity(pack(noised(clean, noise, sigma)), sigma, said, guidance, (height, width))
        return Prediction(unpack(velocity, height, width), noise - clean, error_weight(sigma, sampling), sigma)

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
        """Conditioning -> images (B, H, W, 3) in [-1, 1], float32.

        Guidance is embedded where the model was trained so; else, above 1, classifier-free against the empty
        prompt (Ho and Salimans 2022).

        Args:
            size: (height, width) in pixels, multiples of 16.
            key: (B, 2); row i alone decides the noise that sample i starts from.
            latents: start from this noise instead, (B, H/8, W/8, C).

        Raises:
            SettingsError: a size that is no multiple of 16, or no step.
        """
        height, width = size
        if height < 1 or width < 1 or height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
            raise SettingsError(f"FLUX draws sizes that are multiples of {SIZE_MULTIPLE}, not {height}x{width}")
        grid = height // VAE_FACTOR, width // VAE_FACTOR
        if latents is None:
            latents = _noise(key, (*grid, self._transformer.config.in_channels // PATCH**2))
        tokens = pack(latents)
        guided = guidance > 1 and not self.guidance_embeds
        if guided:
            conditioning = self._with_unconditional(conditioning)
        conditioning = self._read(conditioning)
        mx.eval(conditioning)
        for sigma, next_sigma in pairwise(self.schedule.sigmas(steps, tokens.shape[1]).tolist()):
            rows = mx.concatenate([tokens, tokens]) if guided else tokens
            velocity = self._velocity(rows, mx.full(rows.shape[:1], sigma), conditioning, guidance, grid)
            if guided:
                without, toward = mx.split(velocity, 2)
                velocity = without + guidance * (toward - without)
            tokens = euler_step(tokens, velocity, sigma, next_sigma)
            mx.eval(tokens)
        return mx.clip(self._decode(unpack(tokens, *grid)), -1, 1)

    def lora_targets(self) -> Sequence[str]:
        """Attention and feed-forward layers of all blocks."""
        return naming.PRESETS["attention+mlp"]

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        """Attention, or that and feed-forward layers."""
        return naming.PRESETS

    def kohya_naming(self) -> KohyaNaming:
        """As `naming.kohya_naming`."""
        return naming.kohya_naming(self._transformer.config, self._text_encoder.config)

    @property
    def base_model(self) -> str | None:
        """The repository that all of it was opened from."""
        return self.snapshot.repository if self.snapshot is not None and self.snapshot.whole else None

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """As `naming.usage`."""
        return naming.usage(self.base_model, adapter, prompt, dora=dora, text_encoder=text_encoder)

    def _velocity(
        self,
        tokens: mx.array,
        sigma: mx.array,
        conditioning: Conditioning,
        guidance: float,
        grid: tuple[int, int],
    ) -> mx.array:
        """Packed latents at noise level sigma (B,) -> velocity, float32; between, the transformer's dtype."""
        prompt, pooled = (conditioning[name].astype(self.dtype) for name in (EMBEDS, POOLED))
        told = mx.full(sigma.shape, guidance) if self.guidance_embeds else None
        velocity = self.denoiser(
            tokens.astype(self.dtype),
            prompt,
            pooled,
            sigma,
            image_ids(*grid),
            text_ids(prompt.shape[1]),
            told,
        )
        return velocity.astype(mx.float32)

    def _decode(self, latents: mx.array) -> mx.array:
        """Latents -> images, as many at once as fit the memory of one large one."""
        pixels = latents.shape[1] * latents.shape[2] * VAE_FACTOR**2
        images = []
        for start in range(0, latents.shape[0], rows := max(1, memory.DECODED_AT_ONCE // pixels)):
            # float32 whatever the network computes in: numpy knows no bfloat16
            images.append(self.vae.decode_nhwc(latents[start : start + rows]).astype(mx.float32))
            mx.eval(images[-1])
        return mx.concatenate(images)


def _noise(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Standard normal float32 (B, *shape), row i of key[i] alone."""
    return mx.vmap(lambda one: mx.random.normal(shape, key=one))(key)
