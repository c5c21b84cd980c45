"""Metrics against scikit-image, pytorch_msssim, scipy and the `lpips` package with the same random backbone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402

from mflux_vae.metrics import image as metrics  # noqa: E402
from mflux_vae.metrics.lpips import LPIPS  # noqa: E402
from tests.mflux_vae.metrics.test_metrics import waves  # noqa: E402

SIZES = [(11, 11), (40, 33), (64, 129)]


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_of_scikit_image(size: tuple[int, int], channels: int) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    image, other = waves(*size, channels)
    for index, (mine_psnr, mine_ssim) in enumerate(
        zip(metrics.psnr(image, other), metrics.ssim(image, other), strict=True)
    ):
        x, y = (np.array(values[index], np.float64) for values in (image, other))
        assert mine_psnr.item() == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=255), rel=1e-5)
        options = {"gaussian_weights": True, "use_sample_covariance": False, "sigma": 1.5}
        expected = skimage.structural_similarity(x, y, data_range=255, channel_axis=0, **options)
        assert mine_ssim.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("size", [(176, 176), (208, 256)], ids="{0[0]}x{0[1]}".format)
def test_ms_ssim_of_pytorch_msssim(size: tuple[int, int]) -> None:
    theirs = pytest.importorskip("pytorch_msssim")
    image, other = waves(*size)
    given = (torch.from_numpy(np.array(values, np.float32)) for values in (image, other))
    expected = theirs.ms_ssim(*given, data_range=255, size_average=False)
    np.testing.assert_allclose(metrics.ms_ssim(image, other), expected, atol=2e-5)


def test_frechet_distance_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 24)) @ rng.normal(size=(24, 24)), rng.normal(0.3, 1, (150, 24))
    first, second = metrics.FeatureStatistics(), metrics.FeatureStatistics()
    first.update(x)
    second.update(y)
    sigma1, sigma2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = linalg.sqrtm(sigma1 @ sigma2).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert first.distance(second) == pytest.approx(expected, rel=1e-8)


def vgg16(**_: Any) -> Any:
    """torchvision's layers, which the package asks torchvision for; with random weights."""
    layers: list[Any] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
            channels = width
        else:
            layers.append(torch.nn.MaxPool2d(2, 2))
    features = torch.nn.Sequential(*layers)
    for layer in features:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    return SimpleNamespace(features=features)


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's network: its own weights of the channels, a random backbone."""
    torchvision = ModuleType("torchvision")
    torchvision.models = SimpleNamespace(vgg16=vgg16)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    package = pytest.importorskip("lpips")
    torch.manual_seed(0)
    return package.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@pytest.mark.parametrize("size", [(16, 16), (40, 67)], ids="{0[0]}x{0[1]}".format)
def test_perceptual_distance_of_the_lpips_package(theirs: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """Weights travel in the files that people have: torchvision's and the package's own, in torch's format."""
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    backbone = {f"features.{key}": value for part in slices for key, value in part.state_dict().items()}
    torch.save({**backbone, "classifier.0.weight": torch.zeros(8, 8)}, tmp_path / "vgg16.pth")
    linear = Path(sys.modules["lpips"].__file__ or "").parent / "weights/v0.1/vgg.pth"
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")

    image, other = waves(*size)
    given = [torch.from_numpy(np.array(values, np.float32)) / 127.5 - 1 for values in (image, other)]
    given[0].requires_grad_()
    expected = theirs(*given).flatten()
    (slope,) = torch.autograd.grad(expected.sum(), given[0])
    for network in (LPIPS.from_files(tmp_path / "vgg16.pth", linear), LPIPS.from_files(tmp_path / "whole.pth")):
        np.testing.assert_allclose(metrics.lpips(image, other, network), expected.detach(), rtol=1e-4)
        pixels = [mx.array(values.detach().numpy()).transpose(0, 2, 3, 1) for values in given]
        mine = mx.grad(lambda x, n=network, y=pixels[1]: n(x, y).sum())(pixels[0]).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(mine, slope, rtol=0, atol=1e-2 * float(slope.abs().max()))  # kinks
