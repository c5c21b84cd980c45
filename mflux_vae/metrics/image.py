"""MSE, PSNR, SSIM, MS-SSIM and LPIPS per image; the Fréchet distance between sets of images.

Images are (B, C, H, W) in [0, 255], uint8 or floating point, as in `VAE`. Values are computed in float32 (feature
statistics in float64), one per image. All except the Fréchet distance are differentiable.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from mflux_vae.errors import ImageError
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae.utils.arrays import as_array

Images: TypeAlias = mx.array | np.ndarray

LEVELS = 255.0
"""Range from black to white."""

WINDOW, SIGMA = 11, 1.5
"""Side and standard deviation (pixels) of the Gaussian window of SSIM."""

_C1, _C2 = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM from the finest scale to the coarsest (Wang et al. 2003, section 3.2)."""


def mse(image: Images, other: Images) -> mx.array:
    """Mean squared difference in squared levels of [0, 255]: (B,).

    Raises:
        ImageError: shapes differ, or the images are empty; also in the functions below.
    """
    x, y = _pair(image, other)
    return mx.square(x - y).mean(axis=(1, 2, 3))


def psnr(image: Images, other: Images) -> mx.array:
    """Peak signal-to-noise ratio, 10 log10(255^2 / MSE), in dB: (B,). Infinite for equal images."""
    return 10 * mx.log10(LEVELS**2 / mse(image, other))


def ssim(image: Images, other: Images) -> mx.array:
    """Structural similarity (Wang et al. 2004), at most 1, averaged over channels: (B,).

    Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, wherever the window fits, as in the authors' program and
    in scikit-image (`gaussian_weights=True`, `use_sample_covariance=False`).

    Raises:
        ImageError: also if a side is shorter than the window.
    """
    x, y = _pair(image, other, at_least=WINDOW)
    luminance, contrast = _similarity(x, y)
    return (luminance * contrast).mean(axis=(1, 2, 3))


def ms_ssim(image: Images, other: Images) -> mx.array:
    """Multi-scale structural similarity (Wang et al. 2003): contrast at five scales, luminance at the coarsest: (B,).

    Scales differ by averages of 2x2 pixels (an odd last row or column is repeated). Negative means count as 0.
    Averaged over channels.

    Raises:
        ImageError: also if a side is shorter than 161 pixels: the window does not fit at the coarsest scale.
    """
    x, y = _pair(image, other, at_least=(WINDOW - 1) * 2 ** (len(SCALES) - 1) + 1)
    value = mx.ones(x.shape[:2])
    for scale, exponent in enumerate(SCALES):
        if scale:
            x, y = _downsample_2x(x), _downsample_2x(y)
        luminance, contrast = _similarity(x, y)
        coarsest = scale == len(SCALES) - 1
        mean = (luminance * contrast if coarsest else contrast).mean(axis=(2, 3))
        value = value * mx.maximum(mean, 0) ** exponent
    return value.mean(axis=1)


def lpips(image: Images, other: Images, network: LPIPS) -> mx.array:
    """Learned perceptual distance (Zhang et al. 2018): (B,). 0 for equal images.

    Args:
        image, other: 3 channels, or 1, which is repeated; at least 16 pixels per side.
        network: `LPIPS.from_files(...)`.
    """
    x, y = (_pixels(array) for array in _pair(image, other, at_least=16))
    if x.shape[-1] not in (1, 3):
        raise ImageError(f"LPIPS compares images of 1 or 3 channels, not {x.shape[-1]}")
    x, y = (mx.broadcast_to(pixels, (*pixels.shape[:3], 3)) for pixels in (x, y))
    return network(x, y)


class FeatureStatistics:
    """Running mean and covariance of feature vectors (Chan et al. 1983) in float64.

    Attributes:
        count: number of vectors.
        mean: (D,); None before the first vector.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: np.ndarray | None = None
        self._scatter = np.zeros((0, 0))

    def update(self, features: mx.array | np.ndarray) -> None:
        """Add vectors (N, D).

        Raises:
            ImageError: not (N, D) with the D of earlier calls, or values are not finite.
        """
        values = np.array(features, np.float64)
        if values.ndim != 2 or (self.mean is not None and values.shape[1] != len(self.mean)):
            expected = "(N, D)" if self.mean is None else f"(N, {len(self.mean)})"
            raise ImageError(f"features are {values.shape}; expected {expected}")
        if not np.isfinite(values).all():
            raise ImageError("features have infinite or NaN values")
        if not len(values):
            return
        mean = values.mean(axis=0)
        centred = values - mean
        self._merge(len(values), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the vectors of other statistics with the same D."""
        if other.mean is None:
            return
        if self.mean is not None and self.mean.shape != other.mean.shape:
            raise ImageError(f"cannot merge statistics of {len(other.mean)} and {len(self.mean)} features")
        self._merge(other.count, other.mean, other._scatter)

    def covariance(self) -> np.ndarray:
        """Covariance (D, D), divided by count - 1 as in `numpy.cov`.

        Raises:
            ImageError: fewer than two vectors.
        """
        if self.count < 2:
            raise ImageError(f"a covariance needs at least 2 feature vectors, got {self.count}")
        return self._scatter / (self.count - 1)

    def distance(self, other: FeatureStatistics) -> float:
        """`frechet_distance` to other statistics; the rFID for features of images and of their reconstructions."""
        if self.mean is None or other.mean is None:
            raise ImageError("a distance needs feature vectors in both statistics")
        return frechet_distance(self.mean, self.covariance(), other.mean, other.covariance())

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self.mean is None:
            self.count, self.mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        step = mean - self.mean
        self._scatter = self._scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet distance of two normal distributions: |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    With Inception features it is the FID (Heusel et al. 2017). The trace of the root equals that of the symmetric
    (S1^(1/2) S2 S1^(1/2))^(1/2), whose eigenvalues are real, so rank-deficient covariances work.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric, positive semi-definite.

    Raises:
        ImageError: shapes do not fit, or values are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(value, np.float64) for value in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu2.shape != mu1.shape or not sigma1.shape == sigma2.shape == (len(mu1),) * 2:
        shapes = ", ".join(str(value.shape) for value in (mu1, sigma1, mu2, sigma2))
        raise ImageError(f"means and covariances are {shapes}; expected (D,), (D, D), (D,), (D, D)")
    if not all(np.isfinite(value).all() for value in (mu1, sigma1, mu2, sigma2)):
        raise ImageError("means or covariances have infinite or NaN values")
    values, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    spectrum = np.linalg.eigvalsh(root @ sigma2 @ root)
    overlap = np.sqrt(np.maximum(spectrum, 0)).sum()
    return float(max(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap, 0.0))


def _pair(image: Images, other: Images, *, at_least: int = 1) -> tuple[mx.array, mx.array]:
    """Check both images and convert them to float32."""
    advice = "mflux_vae.images.load_images reads files"
    image, other = (as_array(one, "image to compare is", "(B, C, H, W)", advice) for one in (image, other))
    if image.ndim != 4 or image.shape != other.shape:
        shapes = f"{tuple(image.shape)} and {tuple(other.shape)}"
        raise ImageError(f"images to compare are {shapes}; expected (B, C, H, W) twice")
    if not image.size or min(image.shape[2:]) < at_least:
        size = f"{image.shape[2]} x {image.shape[3]}"
        raise ImageError(f"images of {size} pixels are too small; this metric needs {at_least} per side")
    return image.astype(mx.float32), other.astype(mx.float32)


def _pixels(image: mx.array) -> mx.array:
    """NCHW [0, 255] -> NHWC [-1, 1]."""
    return image.transpose(0, 2, 3, 1) / 127.5 - 1


def _similarity(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    """Factors of SSIM at every position of the window: luminance, and contrast with structure."""
    x, y = x - LEVELS / 2, y - LEVELS / 2  # centring reduces cancellation in variances
    mean_x, mean_y, xx_yy, xy = (_window(values) for values in (x, y, x * x + y * y, x * y))
    covariance = xy - mean_x * mean_y
    variances = xx_yy - mean_x * mean_x - mean_y * mean_y
    mean_x, mean_y = mean_x + LEVELS / 2, mean_y + LEVELS / 2
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    return luminance, (2 * covariance + _C2) / (variances + _C2)


def _window(x: mx.array) -> mx.array:
    """Gaussian-weighted mean at every position of the window: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    weights = [math.exp(-0.5 * ((tap - WINDOW // 2) / SIGMA) ** 2) for tap in range(WINDOW)]
    height, width = x.shape[2] - WINDOW + 1, x.shape[3] - WINDOW + 1
    x = _sum([x[:, :, tap : tap + height] * (w / sum(weights)) for tap, w in enumerate(weights)])
    return _sum([x[..., tap : tap + width] * (w / sum(weights)) for tap, w in enumerate(weights)])


def _sum(parts: list[mx.array]) -> mx.array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _downsample_2x(x: mx.array) -> mx.array:
    """Average 2x2 pixels; an odd last row or column is repeated."""
    batch, channels, height, width = x.shape
    x = mx.pad(x, [(0, 0), (0, 0), (0, height % 2), (0, width % 2)], mode="edge")
    return x.reshape(batch, channels, (height + 1) // 2, 2, (width + 1) // 2, 2).mean(axis=(3, 5))
