"""What a diffusion pipeline offers a trainer. The trainer knows nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.footprint import Footprint, Workload

Conditioning = Mapping[str, mx.array]
"""Encoded prompts: named arrays, batch first, of one shape for every prompt, so that rows can be mixed."""


WeightingScheme = Literal["none", "uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt", "flux_shift", "schnell"]
"""How training draws and weights noise levels, see `NoiseSampling`."""


@dataclass(frozen=True, kw_only=True)
class NoiseSampling:
    """How training draws noise levels, and what an error at each of them counts (Esser et al. 2024, section 3.1).

    With u in [0, 1) and a noise level of 1 - u, so that a large u means little noise, as in diffusers' scripts:

    - ``none``, ``uniform``: u is uniform.
    - ``logit_normal``: u = sigmoid(N(logit_mean, logit_std)).
    - ``mode``: u = 1 - r - mode_scale (cos^2(pi r / 2) - 1 + r), r uniform.
    - ``cosmap``: u uniform, error times 2 / (pi (1 - 2 s + 2 s^2)) at noise level s.
    - ``sigma_sqrt``: u uniform, error times s^-2.
    - ``flux_shift``: as logit_normal, then moved towards noise, the more the larger the picture.
    - ``schnell``: one of the four levels 1/4, 2/4, 3/4, 1 that FLUX.1 schnell was distilled to.

    Attributes:
        logit_mean: above 0 means less noise (in kohya's scripts, which draw the noise level itself, more).
        mode_scale: from -1 to 2 / (pi - 2), outside of which levels would leave [0, 1].

    Raises:
        SettingsError: an unknown scheme.
    """

    scheme: WeightingScheme = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        if self.scheme not in get_args(WeightingScheme):
            known = ", ".join(get_args(WeightingScheme))
            raise SettingsError(f"weighting scheme {self.scheme!r} is unknown; known are {known}")


class Prediction(NamedTuple):
    """What a denoiser says of noised latents, and what it should have said. All float32.

    Attributes:
        prediction, target: of the latents' shape (B, ...).
        weight: what a sample's squared error counts (B,).
        sigma: its noise level (B,), from 0 for none to 1 for nothing else.
    """

    prediction: mx.array
    target: mx.array
    weight: mx.array
    sigma: mx.array

    def loss(self, places: mx.array | None = None) -> mx.array:
        """Weighted squared error, averaged over each sample: (B,).

        Args:
            places: what each place counts in the average, (B, h, w, 1) for latents (B, h, w, C), not negative; where
                no place of a sample counts, its loss is 0.
        """
        squared = mx.square(self.prediction - self.target)
        if places is None:
            return self.weight * squared.flatten(1).mean(axis=1)
        total = mx.maximum(places.flatten(1).mean(axis=1), 1e-6)
        return self.weight * (squared * places).flatten(1).mean(axis=1) / total


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """What a pipeline recommends where the user leaves a setting open.

    Attributes:
        resolution: side of a training image in pixels; a multiple of `size_multiple`.
        size_multiple: sides of images are multiples of this many pixels; others are refused.
        learning_rate: peak rate for LoRA.
        learning_rate_full: peak rate for training all weights.
        guidance: classifier-free (or embedded) guidance for class images and previews.
        steps: denoising steps for class images and previews.
        rank: LoRA rank.
        caption_dropout: share of training captions replaced by the empty prompt; 0 where guidance needs none.
        prior_loss_weight: weight of the prior-preservation term.
        weighting_scheme: how training draws and weights noise levels; None where there is no `predict`.
        most_guidance: guidance above this harms pictures, as the model was distilled to do without; None for no such.
    """

    resolution: int
    size_multiple: int
    learning_rate: float
    learning_rate_full: float
    guidance: float
    steps: int
    rank: int
    caption_dropout: float
    prior_loss_weight: float = 1.0
    weighting_scheme: WeightingScheme | None = None
    most_guidance: float | None = None


@runtime_checkable
class DiffusionPipeline(Protocol):
    """A trainable text-to-image pipeline.

    Images are (B, H, W, 3) in [-1, 1], latents what `encode_images` returns, batch first. Every `key` is one
    random key per sample, (B, 2) uint32: sample i depends on `key[i]` alone, whatever it shares a batch with.
    """

    name: str
    recommended: Recommended
    adapter_prefix: str
    """First component of a LoRA key in the PEFT file, e.g. ``transformer`` or ``unet``."""

    @property
    def denoiser(self) -> nn.Module:
        """The network that is trained. Its parameter paths are the ones diffusers uses."""
        ...

    def encode_images(self, pixels: mx.array) -> mx.array:
        """(B, H, W, 3) in [-1, 1] -> latents, scaled for the denoiser; no randomness."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning. The empty prompt is the unconditional one."""
        ...

    def loss(self, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float) -> mx.array:
        """The denoising objective, one value per sample (B,), float32; differentiable in `denoiser`."""
        ...

    def sample(
        self, conditioning: Conditioning, *, size: tuple[int, int], steps: int, guidance: float, key: mx.array
    ) -> mx.array:
        """Conditioning -> images (B, H, W, 3) in [-1, 1], float32; `size` is (height, width) in pixels."""
        ...

    def lora_targets(self) -> Sequence[str]:
        """Patterns (fnmatch over module paths of `denoiser`) of the linear layers that LoRA adapts by default."""
        ...


# What a pipeline may offer beside it. A trainer asks for these with isinstance, and refuses what needs a missing one.


@runtime_checkable
class Predicts(Protocol):
    """A pipeline that shows what its loss is made of. Masks, output preservation and `NoiseSampling` need it."""

    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        """Latents noised as `key` says, and what `denoiser` makes of them; differentiable in `denoiser`.

        Equal keys give equal noise and levels, whatever the denoiser's weights and the conditioning are.

        Args:
            sampling: None for the recommended scheme; then ``predict(...).loss()`` is what `loss` returns.

        Raises:
            SettingsError: the pipeline has no such scheme.
        """
        ...


Use = Literal["prompts", "images"]
"""What a part of a pipeline serves: encoding prompts, or encoding and decoding images."""


@runtime_checkable
class Releases(Protocol):
    """A pipeline whose parts are loaded when they are first needed."""

    def release(self, *uses: Use) -> None:
        """Give back the memory of what serves these uses, until it is needed again."""
        ...


@runtime_checkable
class Quantizes(Protocol):
    """A pipeline whose frozen weights can be held in few bits."""

    def quantize(self, bits: int) -> None:
        """Hold the denoiser and large text encoders in 4 or 8 bits from now on, adapters aside."""
        ...


@runtime_checkable
class Recomputes(Protocol):
    """A pipeline whose denoiser can keep less of a forward pass, and compute it again in the backward pass."""

    def recompute_activations(self, on: bool) -> None:
        """From now on; results stay the same."""
        ...


@runtime_checkable
class Estimates(Protocol):
    """A pipeline that knows what a run takes before anything is downloaded, loaded or computed."""

    def outline(self) -> nn.Module:
        """The denoiser's layers. Their weights need not be there: whoever computes with them gets nonsense."""
        ...

    def footprint(self, work: Workload) -> Footprint:
        """An estimate, from configurations alone."""
        ...


@runtime_checkable
class LimitsPrompts(Protocol):
    """A pipeline whose prompts may be cut to fewer tokens, which takes less time and memory.

    Attributes:
        prompt_limit: tokens at most; None, or more than the model was trained with: as many as that.
    """

    prompt_limit: int | None


@runtime_checkable
class Identifies(Protocol):
    """A pipeline whose encodings of prompts and images can be kept on disk, and used by another run."""

    def encoder_identity(self, use: Use) -> str:
        """A text that differs wherever encodings would; it is found without loading what encodes."""
        ...


@runtime_checkable
class PresetsForLora(Protocol):
    """A pipeline whose layers can be called by what they are for."""

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        """Patterns as in `lora_targets`, by name: "attention", "attention+mlp"."""
        ...


@dataclass(frozen=True, kw_only=True)
class KohyaNaming:
    """How kohya's scripts, ComfyUI and others name an adapter's layers.

    Attributes:
        modules: by name, the layers' paths in `denoiser`: several where one layer of the original network is several
            here, its outputs in this order.
        metadata: of the file, what follows from the model.
    """

    modules: Mapping[str, Sequence[str]]
    metadata: Mapping[str, str]


@runtime_checkable
class NamesForKohya(Protocol):
    """A pipeline whose adapters can be written as kohya's scripts do."""

    def kohya_naming(self) -> KohyaNaming:
        """Of this network."""
        ...


@runtime_checkable
class Published(Protocol):
    """A pipeline that knows which published model it is, and who else reads adapters for it."""

    @property
    def base_model(self) -> str | None:
        """Its repository on the hub, ``owner/name``; None where it is none."""
        ...

    def usage(self, adapter: str, prompt: str, *, dora: bool) -> Mapping[str, str]:
        """Program -> how an adapter is used there, as Markdown.

        Args:
            adapter: name of its file.
            dora: whether it has magnitudes, which not every program reads.
        """
        ...
