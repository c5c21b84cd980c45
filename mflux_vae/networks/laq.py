"""LAPA's latent action quantizer: what changes from one frame to the next, in a few codes (Ye et al. 2024, 2410.11758).

Encoding sees both frames and says in codes how they differ. Decoding sees the first frame, whole, and the codes, and
paints the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.networks.config import OwnConfig
from mflux_vae.networks.laq_transformer import PositionBias, Transformer
from mflux_vae.networks.layers import Conv2d

_CONVOLUTIONS = {
    1: ((3, 2, 1), (4, 1, 0)),
    4: ((3, 2, 1), (3, 1, 0)),
    16: ((3, 2, 1), (3, 2, 1)),
    64: ((3, 2, 1),),
    256: ((3, 2, 1),),
}
"""By the number of codes: kernel, stride and padding of each convolution on the way to it, with ReLU in between."""


@dataclass(frozen=True, kw_only=True)
class LAQConfig(OwnConfig):
    """What a `LatentActionQuantizer` is made of; names are LAPA's, defaults what it published.

    Attributes:
        dim: length of a token.
        quant_dim: length of a code's vector.
        codebook_size: codes to choose from.
        image_size: height and width of the frames, in pixels.
        patch_size: pixels that a token stands for, in each direction.
        spatial_depth: layers of the encoder over each frame's patches, and of the decoder.
        temporal_depth: layers of the encoder over the frames.
        dim_head, heads: of attention.
        channels: of a frame.
        code_seq_len: codes for a pair of frames: 1, 4, 16, 64 or 256, as the number of patches allows.
    """

    dim: int = 1024
    quant_dim: int = 32
    codebook_size: int = 8
    image_size: int = 256
    patch_size: int = 32
    spatial_depth: int = 8
    temporal_depth: int = 8
    dim_head: int = 64
    heads: int = 16
    channels: int = 3
    code_seq_len: int = 4

    NAME: ClassVar[str] = "LatentActionQuantizer"
    pairs: ClassVar[bool] = True
    """It takes two frames, not one image."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise SettingsError(f"LatentActionQuantizer: {name} must be a positive number, not {value!r}")
        if self.image_size % self.patch_size:
            raise SettingsError(
                f"LatentActionQuantizer: patches of {self.patch_size} do not fill images of {self.image_size} pixels"
            )
        possible = code_counts(self.grid)
        if self.code_seq_len not in possible:
            told = " or ".join(map(str, possible)) or "no number"
            raise SettingsError(
                f"LatentActionQuantizer: {self.grid} x {self.grid} patches make {told} of codes,"
                f" not code_seq_len {self.code_seq_len}"
            )

    @property
    def grid(self) -> int:
        """Patches in each direction."""
        return self.image_size // self.patch_size

    @property
    def bits(self) -> float:
        """What the codes of a pair of frames can tell at most."""
        return self.code_seq_len * math.log2(self.codebook_size)


def code_counts(grid: int, kernels: Sequence[int] | None = None) -> list[int]:
    """How many codes a grid of patches can make; with the sides of the convolutions' kernels, those that they can."""
    found = []
    for codes, convolutions in _CONVOLUTIONS.items():
        side = grid
        for kernel, stride, padding in convolutions:
            side = max((side + 2 * padding - kernel) // stride + 1, 0)
        if side**2 == codes and kernels in (None, [kernel for kernel, _, _ in convolutions]):
            found.append(codes)
    return found


class Patches(nn.Module):
    """Frames to tokens."""

    def __init__(self, config: LAQConfig):
        super().__init__()
        numbers = config.channels * config.patch_size**2
        self.norm = nn.LayerNorm(numbers)
        self.linear = nn.Linear(numbers, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)
        self._patch, self._grid = config.patch_size, config.grid

    def __call__(self, frame: mx.array) -> mx.array:
        """(B, S, S, C) -> (B, h, w, dim)."""
        x = frame.reshape(-1, self._grid, self._patch, self._grid, self._patch, frame.shape[-1])
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, self._grid, self._grid, self.norm.weight.shape[0])
        return self.norm_out(self.linear(self.norm(x)))


class Quantizer(nn.Module):
    """Tokens of two frames to codes, and codes to tokens.

    Trained with noise in place of the rounding error (NSVQ: Vali and Bäckström 2022, IEEE Access 10); in use, as here,
    each vector is the nearest of the codebook.
    """

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.project_in = nn.Linear(config.dim, config.quant_dim)
        self.convolutions = [
            Conv2d(config.quant_dim, config.quant_dim, kernel, stride=stride, padding=padding)
            for kernel, stride, padding in _CONVOLUTIONS[config.code_seq_len]
        ]
        self.codebook = mx.random.normal((config.codebook_size, config.quant_dim))
        self.project_out = nn.Linear(config.quant_dim, config.dim)

    def summary(self, tokens: mx.array) -> mx.array:
        """One frame's tokens (B, h, w, dim) -> (B, n, quant)."""
        x = self.convolutions[0](self.project_in(tokens))
        for convolution in self.convolutions[1:]:
            x = convolution(kernels.relu(x))
        return x.flatten(1, 2)

    def nearest(self, vectors: mx.array) -> mx.array:
        """(B, n, quant) -> numbers of the nearest codes, (B, n)."""
        return mx.square(vectors[:, :, None] - self.codebook).sum(axis=-1).argmin(axis=-1)

    def tokens(self, codes: mx.array) -> mx.array:
        """Numbers of codes (B, n) -> (B, n, dim)."""
        vectors = self.codebook[codes]
        # published weights were trained with the numbers of all vectors dealt out anew, in turns
        return self.project_out(vectors.reshape(len(codes), vectors.shape[2], -1).swapaxes(1, 2))


class LatentActionQuantizer(nn.Module):
    """Two frames to codes; the first frame and codes to the second. Frames are (B, S, S, C) in [-1, 1]."""

    def __init__(self, config: LAQConfig | None = None):
        super().__init__()
        self.config = config = config or LAQConfig()
        sizes = config.dim, config.heads, config.dim_head
        self.patches = Patches(config)
        self.position_bias = PositionBias(config.dim, config.heads)
        self.enc_spatial = Transformer(config.spatial_depth, *sizes)
        self.enc_temporal = Transformer(config.temporal_depth, *sizes)
        self.quantizer = Quantizer(config)
        self.dec_spatial = Transformer(config.spatial_depth, *sizes, cross=True)
        self.to_pixels = nn.Linear(config.dim, config.channels * config.patch_size**2)

    def encode(self, first: mx.array, last: mx.array) -> mx.array:
        """What changes from one frame to the other, as numbers of codes: (B, code_seq_len).

        Raises:
            ImageError: frames of another size or number than the network's, or than each other; as in all that follow.
        """
        return self.quantizer.nearest(self.difference(first, last))

    def difference(self, first: mx.array, last: mx.array) -> mx.array:
        """The same before it is rounded to codes: (B, code_seq_len, quant_dim), float32."""
        if first.shape != last.shape:
            raise ImageError(f"frames of a pair are {tuple(first.shape)} and {tuple(last.shape)}, expected one shape")
        batch, grid, dim = first.shape[0], self.config.grid, self.config.dim
        video = batch, 2, grid, grid
        x = mx.stack([self._tokens(first), self._tokens(last)], axis=1)
        x = x.reshape(2 * batch, grid * grid, dim)
        x = self.enc_spatial(x, video, bias=self.position_bias(grid, grid)).reshape(*video, dim)
        x = x.transpose(0, 2, 3, 1, 4).reshape(-1, 2, dim)
        # the convolution over positions takes these for the tokens of `video`, too, though they now stand in
        # another order: published weights were trained so
        x = self.enc_temporal(x, video).reshape(batch, grid, grid, 2, dim)
        before, after = (self.quantizer.summary(x[:, :, :, frame]) for frame in range(2))
        return (after - before).astype(mx.float32)

    def decode(self, first: mx.array, codes: mx.array) -> mx.array:
        """The first frame and what changes, (B, code_seq_len) -> the second, about [-1, 1].

        Raises:
            ImageError: also for codes that are not `encode`'s.
        """
        expected = (first.shape[0], self.config.code_seq_len)
        if codes.shape != expected or mx.issubdtype(codes.dtype, mx.floating):
            raise ImageError(f"codes are {codes.dtype} {tuple(codes.shape)}, expected whole numbers {expected}")
        if not ((codes >= 0) & (codes < self.config.codebook_size)).all():
            raise ImageError(f"codes are numbers from 0 to {self.config.codebook_size - 1}")
        grid, patch, channels = self.config.grid, self.config.patch_size, self.config.channels
        x = self._tokens(first).reshape(-1, grid * grid, self.config.dim)
        bias, context = self.position_bias(grid, grid), self.quantizer.tokens(codes)
        x = self.to_pixels(self.dec_spatial(x, (len(first), 1, grid, grid), bias=bias, context=context))
        x = x.reshape(-1, grid, grid, channels, patch, patch).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(first.shape) * 2 - 1

    def _tokens(self, frame: mx.array) -> mx.array:
        size, channels = self.config.image_size, self.config.channels
        if frame.shape[1:] != (size, size, channels):
            raise ImageError(f"frames are {tuple(frame.shape)}, expected (B, {size}, {size}, {channels})")
        return self.patches(frame.astype(self.to_pixels.weight.dtype) * 0.5 + 0.5)
