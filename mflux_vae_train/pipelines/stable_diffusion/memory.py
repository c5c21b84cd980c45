"""Estimates of Stable Diffusion's memory and operations, from its configurations alone.

Bytes of weights are exact. Activations are counted layer by layer, in numbers per pixel and channel of a layer: those
that it keeps for its backward pass, and those that exist while it is differentiated. The peak is the largest sum of
what all layers up to one keep and what that one works with: on the way up, where most are kept, or at the widest layer.
The constants come from reading the blocks and from measuring stacks of them; a test repeats the measurement.

Measured at full size (random weights, MLX 0.32.4 on a CPU, float32): the peak of an update of Stable Diffusion 1.5 with
one image of 256 pixels, in GB, and the estimate:

| trained | measured | estimated |
|---|---|---|
| LoRA on attention | 4.36 | 4.28 |
| LoRA on attention and MLPs | 4.5 | 4.3 |
| LoRA on attention, weights in 8 bits | 3.7 | 3.8 |
| all weights, Adafactor | 7.6 | 7.8 |
| all weights, Adafactor, gradient checkpointing | 7.5 | 7.1 |

For Metal and CUDA the code for them was measured on the CPU, in bfloat16, with a compiled update and the order of
evaluation that MLX has on Metal (MLX_BFS_MAX_WIDTH=20). It was not measured on a Mac. Convolutions are counted with
the windows of MLX's CPU operations; Winograd's algorithm on Metal takes less.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from mflux_vae.kernels import MAX_SCORES
from mflux_vae_train.pipelines import footprint
from mflux_vae_train.pipelines.footprint import (
    FULL,
    Phase,
    Precision,
    Workload,
    autoencoder_bytes,
    autoencoder_weights,
    clip_bytes,
    held_bytes,
    training_phase,
    weight_bytes,
)
from mflux_vae_train.pipelines.stable_diffusion.blocks import FF_RATIO
from mflux_vae_train.pipelines.stable_diffusion.configs import VAE_FACTOR, Configs
from mflux_vae_train.pipelines.stable_diffusion.files.parts import (
    is_quantized_layer,
    is_quantized_text_layer,
    new_text_encoder,
)
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.stable_diffusion.unet_config import Level, UNetConfig
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig, CLIPTextConfigWithProjection

TEXT_TOKENS = 77

RESNET_KEPT = {4: 3.0, 2: 1.0}
"""Kept by a resnet per pixel and channel of its inputs, and of its outputs: what its norms and SiLU need.
By bytes of a number: float32 was measured on a CPU, half precision with the code for GPUs."""

BLOCK_KEPT, TRANSFORMER_KEPT = {4: 31.0, 2: 24.6}, 2.0
"""Kept by a transformer block, and by the norm and projections around some blocks, per pixel and channel."""

TEXT_KEPT = 2.5
"""Kept by a transformer block per text token and channel: keys and values of the prompt."""

FULL_RESNET_KEPT, FULL_BLOCK_KEPT = 1.0, 10.0
"""Kept in addition if all weights are trained: inputs of convolutions and linear layers."""

WORKING = {4: 47.0, 2: 92.0}
"""Temporary while the feed-forward layers of a transformer block are differentiated. Gradients in float32 count twice
in half precision."""

RESNET_WORKING = {4: 10.0, 2: 20.0}
"""Temporary while the norms of a resnet are differentiated, beside the workspace of a convolution."""

ATTENDING = 20.0
"""Temporary while attention is differentiated, beside the scores, on a GPU."""

SCORES, SCORES_KEPT = 2.2, 1.1
"""Temporary and kept per score (head and pair of pixels, or pixel and text token) on a CPU."""

GPU_SCORES, GPU_BLOCKS = (4, 5), 12
"""Temporary float32 numbers on a GPU, per score (without and with gradient checkpointing), or per score of a block of
rows, of which several exist at a time."""

WINOGRAD, WINOGRAD_WEIGHTS, WINOGRAD_PIXELS = 9.0, 5.0, 512
"""Float32 numbers of a convolution on a CPU per pixel and channel that it reads, half as many per channel that it
writes, and per weight; above so many pixels."""

WINDOWS, WINDOW_WEIGHTS = 11.0, {4: 1.0, 2: 3.0}
"""The same of other convolutions, and on a GPU."""

FORWARD, FORWARD_SCORES = 26.0, 2.0
"""Temporary while a layer is computed without gradients, per pixel and channel; and per score on a GPU, in float32."""

CLIP_WORKING = 6.0
"""Temporary in a text encoder, per token, in units of its width plus that of its feed-forward layers."""

TAPS = 9


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A resnet, a transformer block, or a convolution alone.

    Attributes:
        pixels: of its output.
        inputs, outputs: channels; the inputs of a transformer block are those of the text.
        heads: of a transformer block; 0 for other layers.
        wraps: whether a transformer starts with this block.
        recomputed: whether gradient checkpointing keeps its inputs alone.
    """

    pixels: int
    inputs: int
    outputs: int
    heads: int = 0
    wraps: bool = False
    recomputed: bool = True

    def kept(self, here: Precision, *, full: bool) -> float:
        """Numbers kept for the backward pass."""
        if self.heads:
            kept = BLOCK_KEPT[here.width] + TRANSFORMER_KEPT * self.wraps + FULL_BLOCK_KEPT * full
            scores = 0.0 if here.fused else SCORES_KEPT * self.scores
            return self.outputs * (kept * self.pixels + TEXT_KEPT * TEXT_TOKENS) + scores
        if not self.recomputed:
            return self.pixels * self.inputs * float(full)
        kept = RESNET_KEPT[here.width] + FULL_RESNET_KEPT * full
        return kept * self.pixels * (self.inputs + self.outputs)

    def working(self, here: Precision, *, batch: int, checkpointing: bool, full: bool) -> float:
        """Bytes that exist in addition while a batch is differentiated."""
        numbers = batch * self.pixels * self.outputs
        if not self.heads:
            norms = RESNET_WORKING[here.width] * here.width * batch * self.pixels * max(self.inputs, self.outputs)
            convolving = self._convolving(here, batch, self.outputs, self.inputs)
            if full and not here.fused:
                windows = WINDOWS * batch * self.pixels + TAPS * self.outputs
                convolving = max(convolving, FULL * windows * self.inputs)
            return norms + convolving
        working = WORKING[here.width] * here.width * numbers
        if not here.fused:
            return max(working, SCORES * here.width * batch * self.scores)
        scores = FULL * min(GPU_SCORES[checkpointing] * batch * self.scores, GPU_BLOCKS * MAX_SCORES)
        return max(working, ATTENDING * here.width * numbers + scores)

    def forward(self, here: Precision, *, batch: int) -> float:
        """Bytes that exist while a batch is computed without gradients."""
        numbers = FORWARD * here.width * batch * self.pixels * self.outputs
        if not here.fused:
            return numbers
        if self.heads:
            return max(numbers, FORWARD_SCORES * FULL * min(batch * self.scores, MAX_SCORES))
        return max(numbers, self._convolving(here, batch, self.inputs, self.outputs))

    def _convolving(self, here: Precision, batch: int, read: int, written: int) -> float:
        """Bytes of the workspace of a convolution between these numbers of channels."""
        pixels, weights = batch * self.pixels, TAPS * read * written
        if not here.fused and pixels > WINOGRAD_PIXELS:
            return FULL * (WINOGRAD * pixels * (read + written / 2) + WINOGRAD_WEIGHTS * weights)
        return FULL * (pixels * (WINDOWS * read + written) + WINDOW_WEIGHTS[here.width] * weights)

    @property
    def scores(self) -> int:
        return self.heads * self.pixels * (self.pixels + TEXT_TOKENS)

    @property
    def products(self) -> float:
        """Multiplications of matrices for one sample."""
        if not self.heads:
            second = self.outputs**2 * self.recomputed
            shortcut = self.inputs * self.outputs * (self.recomputed and self.inputs != self.outputs)
            return float(self.pixels * (TAPS * (self.inputs * self.outputs + second) + shortcut))
        around = 2 * self.wraps
        linear = (6 + around + 3 * FF_RATIO) * self.outputs**2 * self.pixels
        text = 2 * self.inputs * self.outputs * TEXT_TOKENS
        return float(linear + text + 2 * self.pixels * (self.pixels + TEXT_TOKENS) * self.outputs)


def layers(config: UNetConfig, shape: tuple[int, int]) -> Iterator[Layer]:
    """The layers in order.

    Args:
        shape: height and width of the latents.
    """
    shapes = [shape]
    for _ in config.block_out_channels[1:]:
        height, width = shapes[-1]
        shapes.append((-(-height // 2), -(-width // 2)))
    sizes = [height * width for height, width in shapes]
    first = config.block_out_channels[0]
    channels = first
    yield _convolution(sizes[0], config.in_channels, first)
    for index, level in enumerate(config.down):
        yield from _level(config, level, sizes[index], channels)
        channels = level.channels
        if level.resamples:
            yield _convolution(sizes[index + 1], channels, channels)
    if config.mid is not None:
        yield from _level(config, config.mid, sizes[-1], channels)
    for index, level in zip(reversed(range(len(sizes))), config.up, strict=True):
        yield from _level(config, level, sizes[index], channels)
        channels = level.channels
        if level.resamples:
            yield _convolution(sizes[index - 1], channels, channels)
    yield _convolution(sizes[0], first, config.out_channels)


def _convolution(pixels: int, inputs: int, outputs: int) -> Layer:
    return Layer(pixels=pixels, inputs=inputs, outputs=outputs, recomputed=False)


def _level(config: UNetConfig, level: Level, pixels: int, inputs: int) -> Iterator[Layer]:
    channels = level.channels
    for index, (skip, depth) in enumerate(zip_longest(level.skips or (0,) * level.layers, level.depths, fillvalue=0)):
        yield Layer(pixels=pixels, inputs=(channels if index else inputs) + skip, outputs=channels)
        for block in range(depth):
            context = config.cross_attention_dim
            yield Layer(pixels=pixels, inputs=context, outputs=channels, heads=level.heads, wraps=not block)


def phases(configs: Configs, work: Workload, *, precision: Precision | None = None) -> list[Phase]:
    """The phases of a run in order.

    Args:
        precision: None for this machine's.
    """
    here = precision or Precision.here()
    config, square = configs.unet, (work.resolution, work.resolution)
    latents, trained_latents = (_latents(*shape) for shape in (square, work.trained_shape))

    encoders = sum(_encoder(one, here.width, work.quantize) for one in configs.text_encoders.values())
    unet = weight_bytes(UNet, config, here.width, work.quantize, is_quantized_layer) + encoders * work.text_encoder

    autoencoder, encoding = autoencoder_bytes(configs.vae, "encode", 16, work.trained_shape)
    decoding = sum(autoencoder_bytes(configs.vae, "decode", work.images, square))

    rows = work.images * (2 if work.guidance > 1 else 1)
    wide = footprint.dequantized_bytes(2 * FF_RATIO * max(config.block_out_channels) ** 2, here) if work.quantize else 0
    drawing = max(forward_bytes(config, latents, rows, here) + wide, decoding)
    one, one_trained = forward_operations(config, latents), forward_operations(config, trained_latents)
    found, held = [_prompts(configs, work, encoders, here)], 0
    if work.class_images:
        found.append(Phase("class images", unet, drawing, one * work.steps * work.class_images * rows / work.images))
        held = unet
    together = work.batch * work.joined_micro_batches
    activations = training_bytes(
        config, trained_latents, together, here, checkpointing=work.gradient_checkpointing, full=not work.adapter
    )
    if work.text_encoder:
        activations += sum(clip_bytes(one, together) for one in configs.text_encoders.values())
    # forward pass, gradients of inputs; and recomputation, gradients of all weights
    passes = 2 + work.gradient_checkpointing + (not work.adapter)
    operations = one_trained * passes * work.batch * work.micro_batches
    found += [
        Phase("latents", held + autoencoder, encoding, 0.0),
        training_phase(work, here, weights=unet, activations=activations + wide, operations=operations),
    ]
    if work.previews:
        found.append(Phase("previews", unet + held_bytes(work, here), drawing, 0.0))
    if work.fuse:
        found.append(Phase("fusing", unet + FULL * work.trained, max(fusing_bytes(configs, here), autoencoder), 0.0))
    return found


def training_bytes(
    config: UNetConfig, shape: tuple[int, int], batch: int, precision: Precision, *, checkpointing: bool, full: bool
) -> int:
    """Activations at the peak of a forward and backward pass.

    Args:
        shape: of the latents.
        full: whether all weights are trained, not an adapter.
    """
    held = peak = 0.0
    for layer in layers(config, shape):
        kept = batch * precision.width * layer.kept(precision, full=full)
        now = held + kept + layer.working(precision, batch=batch, checkpointing=checkpointing, full=full)
        peak = max(peak, now)
        if checkpointing and layer.recomputed:
            kept = batch * precision.width * layer.pixels * layer.outputs
        held += kept
    return int(peak)


def forward_bytes(config: UNetConfig, shape: tuple[int, int], batch: int, precision: Precision) -> int:
    """Activations at the peak of a forward pass without gradients, in which attention computes scores in blocks."""
    every = list(layers(config, shape))
    skips = sum(layer.pixels * layer.outputs for layer in every[: len(every) // 2] if not layer.heads)
    most = max(layer.forward(precision, batch=batch) for layer in every)
    return int(batch * precision.width * skips + most)


def forward_operations(config: UNetConfig, shape: tuple[int, int]) -> float:
    """Multiplications and additions of the matrix products in a forward pass with one sample."""
    return 2.0 * sum(layer.products for layer in layers(config, shape))


def fusing_bytes(configs: Configs, precision: Precision) -> int:
    """See `footprint.fusing_bytes`."""
    layer = TAPS * 2 * max(configs.unet.block_out_channels) ** 2
    embedding = max(one.vocab_size * one.hidden_size for one in configs.text_encoders.values())
    return footprint.fusing_bytes(layer, embedding, precision)


def published_bytes(configs: Configs, parts: Collection[str], variant: str | None) -> int:
    """Bytes of some parts as they are published: in float32, and as the variant "fp16"."""
    width = 2 if variant == "fp16" else FULL
    networks: dict[str, Callable[[], int]] = {
        "unet": lambda: weight_bytes(UNet, configs.unet, width),
        "vae": lambda: autoencoder_weights(configs.vae, width),
    }
    encoders = configs.text_encoders
    return sum(_encoder(encoders[part], width, None) if part in encoders else networks[part]() for part in parts)


def _encoder(config: CLIPTextConfig, width: int, bits: int | None) -> int:
    """Bytes of a text encoder's weights; the second of SDXL, which has a projection, can be quantized."""
    selects = is_quantized_text_layer if isinstance(config, CLIPTextConfigWithProjection) else None
    return weight_bytes(new_text_encoder, config, width, bits, selects)


def _latents(height: int, width: int) -> tuple[int, int]:
    return height // VAE_FACTOR, width // VAE_FACTOR


def _prompts(configs: Configs, work: Workload, encoders: int, here: Precision) -> Phase:
    rows = min(work.prompts, work.prompts_per_batch)
    working, operations = 0.0, 0.0
    for one in configs.text_encoders.values():
        width, hidden, tokens = one.hidden_size, one.intermediate_size, one.max_position_embeddings
        working = max(working, CLIP_WORKING * here.width * (width + hidden) * rows * tokens)
        layer = 4 * width**2 + 2 * width * hidden
        operations += 2.0 * work.prompts * tokens * one.num_hidden_layers * layer
    return Phase("text encoding", encoders, int(working), operations)
