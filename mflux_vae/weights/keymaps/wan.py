"""Key tables of `AutoencoderKLWan`: diffusers' names, and those of Wan's repository, which ComfyUI's files have, too.

Files hold weights for videos in both namings: kernels (O, C, T, H, W), of which a single image needs the last taps in
time, and convolutions in time, which it skips. A network is written with zeros in their place, so that diffusers opens
the file and computes the same images. Between the namings, files are only renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx, matrix_to_mlx, pointwise_from_mlx

UNUSED = r".*\.time_conv\.(weight|bias)"
"""Pattern of our names of the tensors that single images skip."""

_LAYERS = {"residual.2": "conv1", "residual.6": "conv2", "shortcut": "conv_shortcut"}
_NORMS = {"residual.0": "norm1", "residual.3": "norm2"}
_THEIRS = re.compile(r"decoder\.upsamples\.(\d+)\.(resample)?.*")
_OURS = re.compile(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+))?.*")
_TIME_CONV = re.compile(r"(encoder\.down_blocks\.\d+|decoder\.up_blocks\.\d+\.upsamplers\.0)\.resample\.1\.weight")


def _image_taps(tensor: mx.array) -> mx.array:
    """Kernel (O, C, T, H, W) -> (O, H, W, C) of the last frame; other tensors unchanged."""
    return conv_to_mlx(tensor[:, :, -1]) if tensor.ndim == 5 else tensor


def _video_taps(tensor: mx.array) -> mx.array:
    """Inverse of `_image_taps`: zeros for the past frames, two before a 3x3 kernel and none before 1x1."""
    if tensor.ndim != 4:
        return tensor
    kernel = conv_from_mlx(tensor)[:, :, None]
    return mx.pad(kernel, [(0, 0), (0, 0), (kernel.shape[-1] - 1, 0), (0, 0), (0, 0)])


def _video(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.{{kind}}", f"{ours}.{{kind}}", _image_taps, _video_taps)


def _gamma(theirs: str, ours: str, axes: int = 3) -> Rule:
    """Scale (C,) of a norm, with further axes of length 1 in files."""
    return Rule(f"{theirs}.gamma", f"{ours}.gamma", mx.flatten, lambda x: x.reshape(-1, *(1,) * axes))


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        _gamma(f"{theirs}.norm", f"{ours}.norm", axes=2),
        Rule(f"{theirs}.{{rest}}", f"{ours}.{{rest}}", matrix_to_mlx, pointwise_from_mlx),
    )


def _resample(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{theirs}.time_conv.{{kind}}", f"{ours}.time_conv.{{kind}}"),
        Rule(f"{theirs}.resample.1.{{kind}}", f"{ours}.conv.{{kind}}", conv_to_mlx, conv_from_mlx),
    )


def _resnet(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *(_gamma(f"{theirs}.{their}", f"{ours}.{our}") for their, our in _NORMS.items()),
        *(_video(f"{theirs}.{their}", f"{ours}.{our}") for their, our in _LAYERS.items()),
    )


DIFFUSERS = (
    *_attention("{path}.attentions.{i}", "{path}.attentions.{i}"),
    *_resample("{path}", "{path}"),
    _gamma("{path}", "{path}"),
    _video("{path}", "{path}"),
)


def wan(keys: Iterable[str]) -> tuple[Rule, ...]:
    """Table for a network with these keys (of the file or ours), which give the number of blocks per level."""
    halves = [
        rule
        for half in ("encoder", "decoder")
        for rule in (
            *_resnet(f"{half}.middle.0", f"{half}.mid_block.resnets.0"),
            *_attention(f"{half}.middle.1", f"{half}.mid_block.attentions.0"),
            *_resnet(f"{half}.middle.2", f"{half}.mid_block.resnets.1"),
            _video(f"{half}.conv1", f"{half}.conv_in"),
            _gamma(f"{half}.head.0", f"{half}.norm_out"),
            _video(f"{half}.head.2", f"{half}.conv_out"),
        )
    ]
    down = "encoder.downsamples.{i}", "encoder.down_blocks.{i}"
    quant = _video("conv1", "quant_conv"), _video("conv2", "post_quant_conv")
    return (*halves, *_resnet(*down), *_resample(*down), *_up_blocks(list(keys)), *quant)


def _up_blocks(keys: Sequence[str]) -> list[Rule]:
    """Rules for the decoder's levels; in Wan's naming one list of residual blocks and upsampling."""
    theirs = [(int(found[1]), found[2]) for key in keys if (found := _THEIRS.fullmatch(key))]
    ours = [(int(found[1]), int(found[2] or 0)) for key in keys if (found := _OURS.fullmatch(key))]
    last = max((index for index, _ in theirs), default=0)
    resnets = 1 + max((index for _, index in ours), default=-1) or min(
        (index for index, resample in theirs if resample), default=last + 1
    )
    levels = 1 + max((level for level, _ in ours), default=last // (resnets + 1))
    rules: list[Rule] = []
    for level in range(levels):
        first, block = level * (resnets + 1), f"decoder.up_blocks.{level}"
        for index in range(resnets):
            rules += _resnet(f"decoder.upsamples.{first + index}", f"{block}.resnets.{index}")
        rules += _resample(f"decoder.upsamples.{first + resnets}", f"{block}.upsamplers.0")
    return rules


def with_time_convolutions(tensors: Mapping[str, mx.array], halved: Sequence[bool]) -> dict[str, mx.array]:
    """Add convolutions in time that are zero, in diffusers' naming.

    Args:
        tensors: in diffusers' naming.
        halved: per level of the encoder but the last, whether it halves the number of frames.
    """
    added = dict(tensors)
    found = [match[1] for key in sorted(tensors, key=_numbers) if (match := _TIME_CONV.fullmatch(key))]
    parts = [[name for name in found if name.startswith(half)] for half in ("encoder", "decoder")]
    for names, flags in zip(parts, (halved, list(halved)[::-1]), strict=True):
        for name in (name for name, flag in zip(names, flags, strict=True) if flag):
            kernel = tensors[f"{name}.resample.1.weight"]
            channels, dtype = kernel.shape[1], kernel.dtype
            out = channels * (1 + name.startswith("decoder"))  # two frames of one
            added[f"{name}.time_conv.weight"] = mx.zeros((out, channels, 3, 1, 1), dtype)
            added[f"{name}.time_conv.bias"] = mx.zeros((out,), dtype)
    return added


def _numbers(key: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", key)]
