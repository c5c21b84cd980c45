"""LPIPS (Zhang et al. 2018): squared differences of VGG16 features, weighted by channel."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import ImageError, WeightsError
from mflux_vae.networks.layers import Conv2d
from mflux_vae.runtime.device import eval_each
from mflux_vae.weights.formats.files import open_weights
from mflux_vae.weights.formats.lazy_tensor import check_numbers
from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx, load_strict, to_mlx

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""VGG16 (Simonyan and Zisserman 2015): channels and convolutions of each block, 2x2 max pooling between."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet mean and standard deviation for pixels in [-1, 1], as in the `lpips` package."""

_EPS = 1e-10

TABLE = (
    Rule("features.{n}.{kind}", "features.{n}.{kind}", conv_to_mlx, conv_from_mlx),
    # a whole network saved by the `lpips` package
    Rule("net.slice{i}.{n}.{kind}", "features.{n}.{kind}", conv_to_mlx, conv_from_mlx, reads_only=True),
    Rule("lin{i}.model.1.weight", "linear.{i}", mx.flatten, lambda weight: weight.reshape(1, -1, 1, 1)),
    Rule("lin{i}.model.0.weight", "linear.{i}", mx.flatten, reads_only=True),  # without dropout
    Rule("lins.{path}", None),  # duplicates
    Rule("scaling_layer.{path}", None),
)
"""Key naming of torchvision's VGG16 and of the `lpips` package."""


class LPIPS(nn.Module):
    """Perceptual distance between images, in float32.

    `features`: torchvision's layers up to the last ReLU. `linear`: non-negative channel weights of the five taps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features: list[nn.Module] = []
        channels = 3
        for width, count in _BLOCKS:
            if self.features:
                self.features.append(nn.MaxPool2d(2, 2))
            for _ in range(count):
                self.features += [Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.linear = [mx.full((width,), 1 / width) for width, _ in _BLOCKS]

    @classmethod
    def from_files(cls, backbone: str | Path, linear: str | Path | None = None) -> LPIPS:
        """Read weights from torch files or safetensors.

        Args:
            backbone: torchvision's VGG16 (`vgg16-397923af.pth`), with or without its classifier.
            linear: channel weights, `weights/v0.1/vgg.pth` of the `lpips` package; None if `backbone` has them.

        Raises:
            WeightsError: a file is missing or broken, or keys are missing, unknown or misshapen.
        """
        tensors: dict[str, mx.array] = {}
        files = [path for path in (backbone, linear) if path is not None]
        for path in files:
            stored = open_weights(path)[0]
            # skip the classifier, 90 % of the file
            found = {key: entry.load() for key, entry in stored.items() if not key.startswith("classifier.")}
            tensors.update(to_mlx(found, TABLE))
        network = cls()
        load_strict(network, tensors, where=" and ".join(map(str, files)), dtype=mx.float32)
        check_numbers(dict(tree_flatten(network.parameters())), " and ".join(map(str, files)), "weights")
        if any((weight < 0).any() for weight in network.linear):
            raise WeightsError(f"{files[-1]} has negative channel weights; give the VGG16 file of the `lpips` package")
        eval_each(network.parameters())
        return network

    def taps(self, pixels: mx.array) -> list[mx.array]:
        """Features after the last ReLU of each block: (B, H, W, 3) in [-1, 1] -> (B, H / 2^i, W / 2^i, C)."""
        x = (pixels.astype(mx.float32) - mx.array(_SHIFT)) / mx.array(_SCALE)
        found = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]

    def __call__(self, pixels: mx.array, other: mx.array) -> mx.array:
        """Distance per image: (B, H, W, 3) in [-1, 1] twice -> (B,).

        Raises:
            ImageError: shapes differ, or a side is shorter than 16 pixels.
        """
        if pixels.shape != other.shape or pixels.ndim != 4 or pixels.shape[-1] != 3 or min(pixels.shape[1:3]) < 16:
            shapes = f"{tuple(pixels.shape)} and {tuple(other.shape)}"
            raise ImageError(f"LPIPS compares (B, H, W, 3) with at least 16 pixels per side, not {shapes}")
        distance = mx.zeros(pixels.shape[0])
        for weight, x, y in zip(self.linear, self.taps(pixels), self.taps(other), strict=True):
            distance = distance + (mx.square(_unit(x) - _unit(y)) @ weight).mean(axis=(1, 2))
        return distance


def _unit(features: mx.array) -> mx.array:
    """Normalise the features of each pixel to length 1; zeros stay zeros, with finite gradients."""
    return features * mx.rsqrt(mx.square(features).sum(axis=-1, keepdims=True) + _EPS**2)
