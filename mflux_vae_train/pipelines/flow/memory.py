"""Estimates of memory and operations that pipelines with a flow transformer share.

Activations are counted in numbers per token, in units of the transformer's width D. The constants of each kind of
block come from reading it and from measuring stacks of blocks at full width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mflux_vae.kernels import MAX_SCORES, native_expected
from mflux_vae_train.pipelines.footprint import (
    FULL,
    Phase,
    Precision,
    Workload,
    autoencoder_bytes,
    dequantized_bytes,
    fusing_bytes,
    held_bytes,
    training_phase,
)

GPU_SCORES, GPU_BLOCKS = 5, 12
"""Temporary float32 numbers on a GPU, per score or per score of a block of rows, of which several exist at a time."""

INPUTS = 1.0
"""Kept by a checkpointed block, per token and D."""

SCORES_KEPT = 1.0
"""Kept per score (head and pair of tokens) if attention is in MLX's operations: on a CPU without the extension."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Activations of a transformer's blocks.

    Attributes:
        width, heads: of the transformer.
        blocks: number of blocks of each kind.
        kept: kept by a block of each kind for its backward pass, by bytes of a number.
        working: temporary while a block's feed-forward layers are differentiated, without and with gradient
            checkpointing, by bytes of a number.
        attending, scores: temporary while attention is differentiated: per token and D; and per score, on a CPU. The
            defaults fit all transformers that were measured.
        forward: temporary while a block is computed without gradients.
    """

    width: int
    heads: int
    blocks: Sequence[int]
    kept: Mapping[int, Sequence[float]]
    working: Mapping[int, tuple[float, float]]
    attending: float = 20.0
    scores: float = 4.0
    forward: float = 26.0

    def training_bytes(self, tokens: int, batch: int, precision: Precision, *, checkpointing: bool) -> int:
        """At the peak of a forward and backward pass."""
        number = precision.width * self.width * batch * tokens
        pairs = batch * self.heads * tokens**2
        scores_kept = 0.0 if precision.fused or native_expected() else SCORES_KEPT * precision.width * pairs
        blocks, of_kind = sum(self.blocks), self.kept[precision.width]
        kept = sum(count * each for count, each in zip(self.blocks, of_kind, strict=True)) * number
        kept += blocks * scores_kept
        if checkpointing and blocks:
            kept = blocks * INPUTS * number + max(of_kind) * number + scores_kept
        scores = 0.0 if native_expected() else self.scores * precision.width * pairs
        if precision.fused:
            scores = FULL * min(GPU_SCORES * pairs, GPU_BLOCKS * MAX_SCORES)
        working = self.working[precision.width][checkpointing] * number
        return int(kept + max(working, self.attending * number + scores))

    def forward_bytes(self, tokens: int, rows: int, precision: Precision) -> int:
        """At the peak of a forward pass without gradients, in which attention computes scores in blocks."""
        return int(self.forward * precision.width * self.width * rows * tokens)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a run of one model needs.

    Attributes:
        transformer: bytes of its weights, and those of text encoders that are trained.
        activations: of the transformer.
        operations: tokens of an image and a prompt -> operations of a forward pass with one sample.
        text_tokens: tokens per prompt in the transformer.
        image_token: pixels per token of an image, in height and in width.
        largest_layer: weights of the largest layer that is quantized, or has an adapter.
        largest_embedding: weights of the largest embedding of a text encoder.
        guided: whether images are drawn with a second, unconditional row.
        text_training: bytes of activations of text encoders that are trained.
    """

    transformer: int
    activations: Activations
    operations: Callable[[tuple[int, int]], float]
    text_tokens: int
    image_token: int
    largest_layer: int
    largest_embedding: int
    guided: bool
    text_training: int = 0

    def tokens(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Tokens of an image (height, width) and of a prompt."""
        height, width = shape
        return (height // self.image_token) * (width // self.image_token), self.text_tokens


def phases(
    costs: Costs, work: Workload, vae: Mapping[str, Any], text_encoding: Phase, precision: Precision
) -> list[Phase]:
    """The phases of a run in order.

    Args:
        vae: configuration of the autoencoder.
        text_encoding: the first phase.
    """
    square, activations = (work.resolution, work.resolution), costs.activations
    tokens, trained_tokens = costs.tokens(square), costs.tokens(work.trained_shape)
    dequantized = dequantized_bytes(costs.largest_layer, precision) if work.quantize else 0
    fusing = fusing_bytes(costs.largest_layer, costs.largest_embedding, precision)
    autoencoder, encoding = autoencoder_bytes(vae, "encode", 16, work.trained_shape)
    decoding = sum(autoencoder_bytes(vae, "decode", work.images, square))

    rows = work.images * (2 if costs.guided else 1)
    drawing = max(activations.forward_bytes(sum(tokens), rows, precision) + dequantized, decoding)
    one, one_trained = costs.operations(tokens), costs.operations(trained_tokens)
    classes: list[Phase] = []
    held = 0
    if work.class_images:
        operations = one * work.steps * work.class_images * rows / work.images
        classes, held = [Phase("class images", costs.transformer, drawing, operations)], costs.transformer
    together = work.batch * work.joined_micro_batches
    training = activations.training_bytes(
        sum(trained_tokens), together, precision, checkpointing=work.gradient_checkpointing
    )
    # forward pass, gradients of inputs; and recomputation, gradients of all weights
    passes = 2 + work.gradient_checkpointing + (not work.adapter)
    adapted = costs.transformer + FULL * work.trained
    return [
        text_encoding,
        *classes,
        Phase("latents", held + autoencoder, encoding, 0.0),
        training_phase(
            work,
            precision,
            weights=costs.transformer,
            activations=training + costs.text_training + dequantized,
            operations=one_trained * passes * work.batch * work.micro_batches,
        ),
        *([Phase("previews", costs.transformer + held_bytes(work, precision), drawing, 0.0)] if work.previews else []),
        *([Phase("fusing", adapted, max(fusing, autoencoder), 0.0)] if work.fuse else []),
    ]
