"""Estimates of memory and time: what a run does with a pipeline, and what that needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn

from mflux_vae.pretrained.loading import new_network
from mflux_vae.runtime import device
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.tiling.tiles import Tiling
from mflux_vae_train.pipelines.decoding import DECODED_AT_ONCE
from mflux_vae_train.pipelines.quantization import stored_bytes
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig

FULL = 4
"""Bytes of a float32 number: T5's residuals, adapters, gradients and moments."""

CLIP_KEPT = 12.0
"""Kept by a layer of CLIP with adapters, per token and CLIP's width."""

DEQUANTIZED = 3.2
"""Temporary while MLX dequantizes a matrix on a CPU, in units of its unquantized size."""

UPDATING = {4: 12, 2: 7}
"""Bytes per weight that exist besides state and gradients while a compiled update of all weights is computed, by bytes
of a number. On a CPU the update overwrites the gradients and takes a few arrays at a time."""

LARGE_TILES = Tiling("exact", 1024)
"""Of calls that the memory of a GPU does not suffice for."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Properties of a run that determine its memory and time.

    Attributes:
        resolution: side of generated images in pixels.
        trained: number of trained weights.
        shape: height and width of the largest training image; None for a square of `resolution`.
        adapter: whether the trained weights are an adapter.
        state_bytes: optimizer state per trained weight.
        batch: samples in a forward and backward pass, prior samples included.
        micro_batches: micro-batches in an update; `joined_micro_batches` of them are one pass.
        exact_micro_batches: whether they are always computed one by one.
        prompts: number of prompts to encode, `prompts_per_batch` at a time.
        prompt_tokens: tokens per prompt at most; None for as many as the model reads.
        class_images: number of class images to generate before training.
        images: generated at once, in previews and class images, with this `guidance` and number of `steps`.
        previews: whether previews are drawn.
        quantize: bits of the frozen weights; None for the pipeline's precision.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        text_encoder: whether a text encoder is trained, and stays loaded.
        assistant: number of weights of an adapter that is active in training only.
        fuse: whether the adapter is fused into the weights after the training, and the whole pipeline saved.
    """

    resolution: int
    trained: int
    shape: tuple[int, int] | None = None
    adapter: bool = True
    state_bytes: float = 8
    batch: int = 1
    micro_batches: int = 1
    joined_micro_batches: int = 1
    exact_micro_batches: bool = False
    prompts: int = 4
    prompts_per_batch: int = 16
    prompt_tokens: int | None = None
    class_images: int = 0
    images: int = 1
    guidance: float = 1.0
    steps: int = 4
    previews: bool = True
    quantize: int | None = None
    gradient_checkpointing: bool = False
    text_encoder: bool = False
    assistant: int = 0
    fuse: bool = False

    @property
    def trained_shape(self) -> tuple[int, int]:
        """Height and width of the largest training image."""
        return self.shape or (self.resolution, self.resolution)


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: such as "training".
        weights: bytes held throughout.
        work: further bytes at the peak.
        operations: multiplications and additions, in training those of one update; 0 if unknown.
    """

    name: str
    weights: int
    work: int
    operations: float

    @property
    def peak(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Estimate for a run.

    Attributes:
        phases: in the order of the run.
        download: bytes to download.
        cache: folder of downloads.
        access: what the user has to do before the download, such as accepting a licence; None for nothing.
    """

    phases: Sequence[Phase]
    download: int = 0
    cache: Path | None = None
    access: str | None = None

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def work(self) -> int:
        """Bytes besides weights that a phase needs at most."""
        return max(phase.work for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a device computes.

    Attributes:
        width: bytes of a number in the networks.
        fused: whether attention keeps no scores for the backward pass (Metal, CUDA).
    """

    width: int
    fused: bool

    @classmethod
    def here(cls) -> Precision:
        return cls(width=device.compute_dtype().size, fused=not device.is_cpu())


def held_bytes(work: Workload, precision: Precision) -> int:
    """Weights of adapters, and optimizer state: what a training holds between updates, beside the networks."""
    adapters = FULL * work.trained * work.adapter + work.assistant * precision.width
    return adapters + int(work.trained * work.state_bytes)


def learning_bytes(work: Workload, precision: Precision) -> int:
    """The same with gradients, those of an adapter twice."""
    return held_bytes(work, precision) + (1 + work.adapter) * _gradient_bytes(work, precision)


def training_phase(work: Workload, precision: Precision, *, weights: int, activations: int, operations: float) -> Phase:
    """The phase of the updates.

    Args:
        weights: bytes of the networks.
        activations: bytes at the peak of a forward and backward pass.
        operations: of an update.
    """
    further = updating = 0
    if not work.adapter:
        further = _gradient_bytes(work, precision) if work.micro_batches > 1 else 0  # those of the next micro-batch
        updating = work.trained * UPDATING[precision.width] if precision.fused else 0
    peak = max(activations + further, updating)
    return Phase("training", weights + learning_bytes(work, precision), peak, operations)


def _gradient_bytes(work: Workload, precision: Precision) -> int:
    """One copy of the gradients. Sums of half-precision gradients are float32."""
    return work.trained * (FULL if work.adapter or work.micro_batches > 1 else precision.width)


def clip_bytes(config: CLIPTextConfig, batch: int) -> int:
    """Activations that CLIP keeps until the denoiser's backward pass is done."""
    numbers = CLIP_KEPT * config.num_hidden_layers * config.hidden_size
    return int(FULL * numbers * batch * config.max_position_embeddings)


def dequantized_bytes(weights: float, precision: Precision) -> int:
    """Temporary while the largest quantized layer is dequantized for a product, on a CPU.

    Args:
        weights: number of the layer's weights.
    """
    return 0 if precision.fused else int(DEQUANTIZED * weights * precision.width)


def fusing_bytes(layer: int, embedding: int, precision: Precision) -> int:
    """Temporary while one layer is fused, with its product of the adapter's matrices, or one tensor is converted from
    the dtype of a file to the network's and then to that of another file.

    Args:
        layer, embedding: weights of the largest layer with an adapter, and of the largest embedding.
    """
    return max(layer * (FULL + precision.width), embedding * (2 + precision.width + 2))


@cache
def weight_bytes(
    build: Callable[[Any], nn.Module], config: Any, width: int, bits: int | None = None, selects: Any = None
) -> int:
    """Bytes of a network's weights, which are lazy and never computed; arguments as in `quantization.stored_bytes`."""
    return stored_bytes(build(config), width, bits if selects else None, selects or bool)


def autoencoder_bytes(
    config: Mapping[str, Any], what: Literal["encode", "decode"], images: int, shape: tuple[int, int]
) -> tuple[int, int]:
    """Bytes of the weights, which are float32 on every device, and of a call with one batch of images."""
    height, width = shape
    batch = max(1, min(images, DECODED_AT_ONCE // (height * width)))
    return autoencoder_weights(config, FULL), _call_bytes(json.dumps(config), what, batch, shape, device.is_cpu())


def autoencoder_weights(config: Mapping[str, Any], width: int) -> int:
    """Bytes of an autoencoder's weights with `width` bytes each."""
    return _autoencoder_weights(json.dumps(config), width)


@cache
def _autoencoder_weights(config: str, width: int) -> int:
    return stored_bytes(_autoencoder(config), width)


@cache
def _autoencoder(config: str) -> nn.Module:
    """An autoencoder whose weights are lazy and never computed."""
    return new_network(json.loads(config))


@cache
def _call_bytes(
    config: str, what: Literal["encode", "decode"], batch: int, shape: tuple[int, int], is_cpu: bool
) -> int:
    """Bytes of a call. On a GPU, whose convolutions take several times the image, a call that does not fit is tiled."""
    tilings = [None] if is_cpu else [None, LARGE_TILES]
    return min(tiling_plan.peak_bytes(_autoencoder(config), what, batch, *shape, tiling) for tiling in tilings)
