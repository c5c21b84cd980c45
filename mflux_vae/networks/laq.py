"""LAPA's latent action quantizer (Ye et al. 2024, arXiv 2410.11758).

Encodes the change between two frames as a few codes; decodes the second frame from the first frame and the codes.
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
from mflux_vae.networks.config import NetworkConfig
from mflux_vae.networks.laq_transformer import PositionBias, Transformer
from mflux_vae.networks.layers import Conv2d, Linear

_CONVOLUTIONS = {
    1: ((3, 2, 1), (4, 1, 0)),
    4: ((3, 2, 1), (3, 1, 0)),
    16: ((3, 2, 1), (3, 2, 1)),
    64: ((3, 2, 1),),
    256: ((3, 2, 1),),
}
"""By number of codes: kernel, stride and padding of each convolution, with ReLU between."""


@dataclass(frozen=True, kw_only=True)
class LAQConfig(NetworkConfig):
    """Configuration of `LatentActionQuantizer`, with the names and defaults of LAPA.

    Attributes:
        dim: length of a token.
        quant_dim: length of a codebook vector.
        codebook_size: number of codes.
        image_size: side of the frames, pixels.
        patch_size: side of a patch (token), pixels.
        spatial_depth: encoder layers over the patches of a frame, and decoder layers.
        temporal_depth: encoder layers over frames.
        dim_head, heads: attention heads.
        channels: channels of a frame.
        code_seq_len: codes per pair of frames: 1, 4, 16, 64 or 256, if the number of patches allows it.
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
    force_upcast: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise SettingsError(f"LatentActionQuantizer: {name} must be a positive number, not {value!r}")
        if self.image_size % self.patch_size:
            raise SettingsError(
                f"LatentActionQuantizer: patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        possible = code_counts(self.grid)
        if self.code_seq_len not in possible:
            known = " or ".join(map(str, possible)) or "none"
            raise SettingsError(
                f"LatentActionQuantizer: code_seq_len {self.code_seq_len} is impossible with {self.grid} x {self.grid}"
                f" patches; possible: {known}"
            )

    @property
    def grid(self) -> int:
        """Patches in each direction."""
        return self.image_size // self.patch_size

    @property
    def bits(self) -> float:
        """Information in the codes of a pair, at most."""
        return self.code_seq_len * math.log2(self.codebook_size)


def code_counts(grid: int, kernels: Sequence[int] | None = None) -> list[int]:
    """Possible numbers of codes for a grid of patches, and for given kernel sizes of the convolutions."""
    found = []
    for codes, convolutions in _CONVOLUTIONS.items():
        side = grid
        for kernel, stride, padding in convolutions:
            side = max((side + 2 * padding - kernel) // stride + 1, 0)
        if side**2 == codes and kernels in (None, [kernel for kernel, _, _ in convolutions]):
            found.append(codes)
    return found


class Patches(nn.Module):
    """Split frames into tokens."""

    def __init__(self, config: LAQConfig):
        super().__init__()
        numbers = config.channels * config.patch_size**2
        self.norm = nn.LayerNorm(numbers)
        self.linear = Linear(numbers, config.dim)
        self.norm_out = nn.LayerNorm(config.dim)
        self._patch, self._grid = config.patch_size, config.grid

    def __call__(self, frame: mx.array) -> mx.array:
        """(B, S, S, C) -> (B, h, w, dim)."""
        x = frame.reshape(-1, self._grid, self._patch, self._grid, self._patch, frame.shape[-1])
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, self._grid, self._grid, self.norm.weight.shape[0])
        return self.norm_out(self.linear(self.norm(x)))


class Quantizer(nn.Module):
    """Vector quantisation: tokens of two frames to codes, and codes to tokens.

    Published weights were trained with NSVQ (Vali and Bäckström 2022, IEEE Access 10); inference uses the nearest code.
    """

    def __init__(self, config: LAQConfig):
        super().__init__()
        self.project_in = Linear(config.dim, config.quant_dim)
        self.convolutions = [
            Conv2d(config.quant_dim, config.quant_dim, kernel, stride=stride, padding=padding)
            for kernel, stride, padding in _CONVOLUTIONS[config.code_seq_len]
        ]
        self.codebook = mx.random.normal((config.codebook_size, config.quant_dim))
        self.project_out = Linear(config.quant_dim, config.dim)

    def summary(self, tokens: mx.array) -> mx.array:
        """Tokens of a frame (B, h, w, dim) -> (B, n, quant)."""
        x = self.convolutions[0](self.project_in(tokens))
        for convolution in self.convolutions[1:]:
            x = convolution(kernels.relu(x))
        return x.flatten(1, 2)

    def nearest(self, vectors: mx.array) -> mx.array:
        """(B, n, quant) -> indices of the nearest codes (B, n)."""
        return mx.square(vectors[:, :, None] - self.codebook).sum(axis=-1).argmin(axis=-1)

    def tokens(self, codes: mx.array) -> mx.array:
        """Codes (B, n) -> tokens (B, n, dim)."""
        vectors = self.codebook[codes]
        # published weights were trained with this interleaved order of the values
        return self.project_out(vectors.reshape(len(codes), vectors.shape[2], -1).swapaxes(1, 2))


class LatentActionQuantizer(nn.Module):
    """Encode two frames to codes; decode the second from the first and the codes. Frames: (B, S, S, C) in [-1, 1]."""

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
        self.to_pixels = Linear(config.dim, config.channels * config.patch_size**2)

    def encode(self, first: mx.array, last: mx.array) -> mx.array:
        """Encode the change between two frames: codes (B, code_seq_len).

        Raises:
            ImageError: frames of another size, or of different shapes; also in the methods below.
        """
        return self.quantizer.nearest(self.difference(first, last))

    def difference(self, first: mx.array, last: mx.array) -> mx.array:
        """The change before quantisation: (B, code_seq_len, quant_dim), float32."""
        if first.shape != last.shape:
            raise ImageError(f"frames of a pair differ in shape: {tuple(first.shape)} and {tuple(last.shape)}")
        batch, grid, dim = first.shape[0], self.config.grid, self.config.dim
        video = batch, 2, grid, grid
        x = mx.stack([self._tokens(first), self._tokens(last)], axis=1)
        x = x.reshape(2 * batch, grid * grid, dim)
        x = self.enc_spatial(x, video, bias=self.position_bias(grid, grid)).reshape(*video, dim)
        x = x.transpose(0, 2, 3, 1, 4).reshape(-1, 2, dim)
        # The position convolution treats these tokens as ordered like `video`, although they are transposed: published
        # weights were trained this way.
        x = self.enc_temporal(x, video).reshape(batch, grid, grid, 2, dim)
        before, after = (self.quantizer.summary(x[:, :, :, frame]) for frame in range(2))
        return (after - before).astype(mx.float32)

    def decode(self, first: mx.array, codes: mx.array) -> mx.array:
        """First frame and codes (B, code_seq_len) -> second frame, about [-1, 1].

        Raises:
            ImageError: also for invalid codes.
        """
        expected = (first.shape[0], self.config.code_seq_len)
        if codes.shape != expected or mx.issubdtype(codes.dtype, mx.floating):
            raise ImageError(f"codes are {codes.dtype} {tuple(codes.shape)}; expected integers {expected}")
        if not ((codes >= 0) & (codes < self.config.codebook_size)).all():
            raise ImageError(f"codes must be from 0 to {self.config.codebook_size - 1}")
        grid, patch, channels = self.config.grid, self.config.patch_size, self.config.channels
        x = self._tokens(first).reshape(-1, grid * grid, self.config.dim)
        bias, context = self.position_bias(grid, grid), self.quantizer.tokens(codes)
        x = self.to_pixels(self.dec_spatial(x, (len(first), 1, grid, grid), bias=bias, context=context))
        x = x.reshape(-1, grid, grid, channels, patch, patch).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(first.shape) * 2 - 1

    def _tokens(self, frame: mx.array) -> mx.array:
        size, channels = self.config.image_size, self.config.channels
        if frame.shape[1:] != (size, size, channels):
            raise ImageError(f"frames are {tuple(frame.shape)}; expected (B, {size}, {size}, {channels})")
        return self.patches(frame.astype(self.to_pixels.weight.dtype) * 0.5 + 0.5)
