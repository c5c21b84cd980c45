"""What a pipeline may offer beside `protocol.DiffusionPipeline`, each a protocol of its own.

A trainer asks for these with isinstance, and refuses what needs a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction
from mflux_vae_train.pipelines.protocol import Conditioning


@runtime_checkable
class SupportsPrediction(Protocol):
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
class SupportsRelease(Protocol):
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
class TrainsTextEncoder(Protocol):
    """A pipeline with a text encoder that can learn beside the denoiser.

    Attributes:
        text_encoder_prefix: first component of its LoRA keys in the PEFT file, e.g. ``text_encoder``.
    """

    text_encoder_prefix: str

    def encode_text_in_step(self, on: bool) -> None:
        """From now on conditioning holds what the text encoder is given in place of what it makes of that.

        So `loss`, `predict` and `sample` compute with its weights as they are by then, and are differentiable in them.
        """
        ...

    def text_encoder_to_train(self) -> nn.Module:
        """The text encoder, which `SupportsRelease.release` leaves where it is from now on.

        Its parameter paths are those of the published files.
        """
        ...

    def text_encoder_outline(self) -> nn.Module:
        """Its layers; their weights need not be there, see `Estimates.outline`."""
        ...

    def text_encoder_targets(self) -> Sequence[str]:
        """Patterns of the linear layers that LoRA adapts in it."""
        ...


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
        text_modules: as `modules`, of the text encoder that can be trained.
    """

    modules: Mapping[str, Sequence[str]]
    metadata: Mapping[str, str]
    text_modules: Mapping[str, Sequence[str]] = field(default_factory=dict)


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

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """Program -> how an adapter is used there, as Markdown.

        Args:
            adapter: name of its file.
            dora: whether it has magnitudes, which not every program reads.
            text_encoder: whether a part of it is the text encoder's.
        """
        ...
