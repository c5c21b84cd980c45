"""Optional features of a pipeline, beyond `protocol.DiffusionPipeline`.

A trainer tests for them with isinstance, and refuses settings that need a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction
from mflux_vae_train.pipelines.protocol import Conditioning

Use = Literal["prompts", "images"]
"""What encoders are used for: encoding prompts, or encoding and decoding images."""


@runtime_checkable
class SupportsPrediction(Protocol):
    """A pipeline that returns the parts of its loss. Masks, output preservation and `NoiseSampling` need it."""

    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        """Add noise to latents and let `denoiser` predict; differentiable in `denoiser`.

        Noise and noise levels are functions of `key` and `sampling` alone.

        Args:
            latents: (B, ...), clean.
            key: (B, 2).
            sampling: None for the recommended scheme; then ``predict(...).loss()`` equals `loss`.

        Raises:
            SettingsError: an unsupported scheme.
        """
        ...


@runtime_checkable
class SupportsNoiseCheck(Protocol):
    """A pipeline that refuses what its `predict` does not support. ``--snr_gamma`` and ``--noise_offset`` need it."""

    def check_sampling(self, sampling: NoiseSampling) -> None:
        """
        Raises:
            SettingsError: an option that `predict` does not support.
        """
        ...


@runtime_checkable
class SupportsMemoryControl(Protocol):
    """A pipeline that loads its parts on demand, can save memory, and estimates the memory of a run."""

    def release(self, *uses: Use) -> None:
        """Free the encoders for these uses; they are loaded again on demand."""
        ...

    def quantize(self, bits: int) -> None:
        """Hold the weights of the denoiser and of large text encoders in 4 or 8 bits from now on; not adapters."""
        ...

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep fewer activations of the denoiser and compute them again in the backward pass. Results do not change."""
        ...

    def skeleton(self) -> nn.Module:
        """The denoiser's layers, for their names and shapes; the values of their weights are undefined."""
        ...

    def footprint(self, work: Workload) -> Footprint:
        """Memory and operations of a run, from configurations alone: nothing is downloaded or loaded."""
        ...


@runtime_checkable
class SharesHostWeights(Protocol):
    """A pipeline whose networks hold the arrays of another program's object, which does not change in training."""

    def update_host(self) -> None:
        """Put the result of a training into the object: adapters, or trained weights."""
        ...


@runtime_checkable
class SupportsPreviewModel(Protocol):
    """A pipeline that holds little memory while it draws previews for another one of its class."""

    def encodes_as(self, other: Any, use: Use) -> bool:
        """Whether the encodings of another pipeline of this class are equal."""
        ...

    def share_encoders(self, other: Any, use: Use) -> None:
        """Use these encoders of another pipeline from now on. The encodings of both are equal."""
        ...

    def release_denoiser(self) -> None:
        """Free the denoiser; it is loaded again on demand."""
        ...


@runtime_checkable
class SupportsPromptLimit(Protocol):
    """A pipeline that can encode prompts with fewer tokens, which saves time and memory.

    Attributes:
        prompt_limit: tokens per prompt; None or a larger number than in the model's training: as in its training.
    """

    prompt_limit: int | None


@runtime_checkable
class SupportsTrimming(Protocol):
    """A pipeline whose results do not depend on how far prompts are padded; less padding saves time and memory."""

    def trim(self, conditioning: Conditioning) -> Conditioning:
        """Conditioning without padding that no row needs. Not for functions that are compiled: it reads lengths."""
        ...


@runtime_checkable
class SupportsClipSkip(Protocol):
    """A pipeline whose text encoders can leave out their last layers, as for models that were trained so.

    Attributes:
        clip_skip: layers beyond those that the model always leaves out, as diffusers counts; None for none. Prompts,
            the empty one included, are encoded so from now on.
        max_clip_skip: most layers that can be left out.
    """

    clip_skip: int | None

    @property
    def max_clip_skip(self) -> int: ...


@runtime_checkable
class SupportsNegativePrompt(Protocol):
    """A pipeline with classifier-free guidance, which can lead away from any prompt in place of the empty one.

    Attributes:
        negative_prompt: used by `sample` from now on; empty by default.
    """

    negative_prompt: str

    def reads_negative_prompt(self, guidance: float) -> bool:
        """Whether `sample` uses it: not if this guidance is none, or is an input of the model."""
        ...


class CropGeometry(NamedTuple):
    """Where a training image comes from; each is (height, width) or (top, left) in pixels.

    Attributes:
        original: size of the image file, after its orientation was applied.
        corner: of the crop in the resized image, mirrored if the crop is.
        target: size of the crop.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


@runtime_checkable
class SupportsSizeConditioning(Protocol):
    """A pipeline that is conditioned on the size and crop of each training image (Podell et al. 2023, section 2.2).

    Training adds the arrays to the conditioning of the image's prompt. `sample` uses an image that is not cropped.
    """

    def encode_crops(self, crops: Sequence[CropGeometry]) -> Conditioning:
        """Arrays with one row per crop, under names that `encode_prompts` does not use."""
        ...


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """How a tokenizer reads a prompt.

    Attributes:
        ids: tokens that the text encoder receives, special tokens included.
        count: number of tokens of the whole prompt, special tokens included.
        limit: number of tokens that are read.
        end: number of characters that are read.
        unknown: (start, end) of each part of the prompt that the vocabulary lacks.
    """

    ids: tuple[int, ...]
    count: int
    limit: int
    end: int
    unknown: tuple[tuple[int, int], ...] = ()

    @property
    def is_cut(self) -> bool:
        return self.count > self.limit


@runtime_checkable
class SupportsPromptInspection(Protocol):
    """A pipeline that shows how its tokenizers read prompts."""

    def inspect_prompts(
        self, prompts: Sequence[str], *, limit: int | None = None
    ) -> Mapping[str, Sequence[PromptTokens]] | None:
        """The tokens of each prompt, by the text encoder's name for messages.

        Args:
            limit: as `SupportsPromptLimit.prompt_limit`.

        Returns:
            None if the tokenizers would have to be downloaded for it.
        """
        ...


@runtime_checkable
class SupportsTextEncoderTraining(Protocol):
    """A pipeline with text encoders that can be trained beside the denoiser.

    Mappings are by the first component of a text encoder's LoRA keys in the PEFT file, e.g. ``text_encoder``.
    """

    def encode_text_in_step(self, on: bool) -> None:
        """Let conditioning hold the inputs of these text encoders instead of their outputs from now on.

        `loss`, `predict` and `sample` then run them, and are differentiable in their weights.
        """
        ...

    def text_encoders_to_train(self) -> Mapping[str, nn.Module]:
        """The text encoders, which stay loaded from now on. Parameter paths are those of the published files."""
        ...

    def text_encoder_skeletons(self) -> Mapping[str, nn.Module]:
        """Their layers, see `SupportsMemoryControl.skeleton`."""
        ...

    def text_encoder_targets(self) -> Mapping[str, Sequence[str]]:
        """Patterns of the linear layers in them that LoRA adapts."""
        ...


@runtime_checkable
class SupportsEncodingCache(Protocol):
    """A pipeline whose encoded prompts and images can be stored on disk and used by other runs."""

    def encoder_fingerprint(self, use: Use) -> str:
        """A text that differs whenever encodings do. Weights are hashed but need not be loaded for encoding."""
        ...


@dataclass(frozen=True, kw_only=True)
class KohyaNaming:
    """Names of an adapter's layers in kohya's scripts and ComfyUI.

    Attributes:
        modules: by prefix as in PEFT files, then by kohya's name: paths of layers in that network. There are several
            paths if a layer of the original network is split into several here; their outputs are in this order.
        metadata: of the file, as far as the model determines it.
        read_only: further names in files of other programs, as in `modules`, with dots replaced by underscores. The
            original names of `modules`, without kohya's beginning, are read without being listed here.
    """

    modules: Mapping[str, Mapping[str, Sequence[str]]]
    metadata: Mapping[str, str]
    read_only: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)


@runtime_checkable
class SupportsSingleFile(Protocol):
    """A pipeline whose models are also published as one file, with other names than in folders."""

    def save_single_file(self, file: Path) -> None:
        """Write all networks to one safetensors file, as other programs open it."""
        ...


@runtime_checkable
class SupportsAdapterExport(Protocol):
    """A pipeline that knows names for groups of layers, and how other programs name layers and use an adapter."""

    @property
    def base_model(self) -> str | None:
        """Repository of the published model on the hub, ``owner/name``; None for other models."""
        ...

    def lora_presets(self) -> Mapping[str, Sequence[str]]:
        """Patterns as in `lora_targets` by name, such as "attention" and "attention+mlp"."""
        ...

    def kohya_naming(self) -> KohyaNaming:
        """Names of this pipeline's layers."""
        ...

    def usage(self, adapter: str, prompt: str, *, dora: bool, text_encoder: bool) -> Mapping[str, str]:
        """Program -> instructions for using an adapter there with this pipeline's model, as Markdown.

        Args:
            adapter: name of its file.
            dora: whether it has magnitudes; not every program reads them.
            text_encoder: whether it also adapts a text encoder.
        """
        ...
