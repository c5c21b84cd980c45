from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae import ImageError, WeightsError
from mflux_vae.metrics import image as metrics
from mflux_vae.metrics.image import FeatureStatistics, frechet_distance
from mflux_vae.metrics.lpips import LPIPS, TABLE
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae.weights.keymaps.rules import from_mlx


def waves(height: int = 40, width: int = 33, channels: int = 3, batch: int = 2) -> tuple[mx.array, mx.array]:
    """Pictures and their distortions, without a random number: shifted, flattened, with a pattern over them."""
    b, c, y, x = np.meshgrid(*map(np.arange, (batch, channels, height, width)), indexing="ij")
    image = 127.5 + 100 * np.sin(0.37 * x * (1 + c) + 0.2 * b) * np.cos(0.21 * y + c) + 20 * np.sin(0.013 * x * y)
    other = 0.8 * image + 30 + (10 + 20 * b) * np.sin(2.1 * x + 1.3 * y)
    return tuple(mx.array(np.rint(np.clip(values, 0, 255)).astype(np.uint8)) for values in (image, other))  # type: ignore


SMALL, LARGE = waves(), waves(176, 192)


def small_lpips(seed: int = 0) -> LPIPS:
    mx.random.seed(seed)
    network = LPIPS()
    network.linear = [mx.random.uniform(0, 1, weight.shape) for weight in network.linear]
    return network


@pytest.mark.parametrize("measure", [metrics.mse, metrics.psnr, metrics.ssim, metrics.ms_ssim])
def test_each_picture_has_its_own_value_whatever_stands_beside_it(measure):
    image, other = LARGE
    together = measure(image, other)
    assert together.shape == (2,) and together.dtype == mx.float32
    alone = [measure(image[i : i + 1], other[i : i + 1]).item() for i in range(2)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert abs(alone[0] - alone[1]) > 1e-3
    np.testing.assert_allclose(measure(np.array(image), np.array(other)), together)


def test_values_are_those_of_other_implementations():
    """Variable from scikit-image 0.26 (PSNR, SSIM; float64) and pytorch_msssim 1.0 (MS-SSIM)."""
    assert metrics.psnr(*SMALL).tolist() == pytest.approx([25.700818, 20.526118], rel=1e-5)
    assert metrics.ssim(*SMALL).tolist() == pytest.approx([0.947215, 0.796802], rel=1e-5)
    assert metrics.ms_ssim(*LARGE).tolist() == pytest.approx([0.979386, 0.965778], rel=1e-5)


def test_equal_pictures_cannot_be_nearer():
    image, _ = LARGE
    assert metrics.mse(image, image).tolist() == [0, 0]
    assert metrics.psnr(image, image).tolist() == [math.inf] * 2
    np.testing.assert_allclose(metrics.ssim(image, image), 1, atol=1e-6)
    np.testing.assert_allclose(metrics.ms_ssim(image, image), 1, atol=1e-6)


def test_psnr_of_a_known_error():
    image = mx.full((1, 1, 4, 4), 100, mx.uint8)
    assert metrics.mse(image, image + 25).item() == 625  # and no wrap-around of uint8:
    assert metrics.mse(image, image - 100).item() == 100**2
    assert metrics.psnr(image, image + 25).item() == pytest.approx(20 * math.log10(255 / 25), rel=1e-6)


def test_similarity_of_flat_pictures_keeps_its_digits():
    """Their variance is zero: what is left of it by rounding must not count."""
    white = mx.full((1, 3, 16, 16), 255.0)
    assert metrics.ssim(white, white - 10).item() == pytest.approx(
        (2 * 255 * 245 + 2.55**2) / (255**2 + 245**2 + 2.55**2), abs=1e-6
    )


def test_the_opposite_has_no_multi_scale_similarity_but_a_value():
    image, _ = LARGE
    assert metrics.ms_ssim(image, 255 - image).tolist() == [0, 0]


def test_odd_sizes_are_downsample_2x_by_repeating_the_edge():
    image, other = waves(161, 177)
    assert (metrics.ms_ssim(image, other) > 0.1).all()
    assert metrics._downsample_2x(mx.array([[[[1.0, 3, 5]]]])).tolist() == [[[[2, 5]]]]


@pytest.mark.parametrize(
    ("measure", "least"), [(metrics.mse, 1), (metrics.psnr, 1), (metrics.ssim, 11), (metrics.ms_ssim, 161)]
)
def test_smallest_image_is_measured_and_smaller_ones_refused(measure, least):
    picture = mx.random.uniform(0, 255, (1, 1, least, least), key=mx.random.key(0))
    assert measure(picture, picture * 0.9).item() > 0
    with pytest.raises(ImageError, match="too small"):
        measure(picture[:, :, 1:], picture[:, :, 1:])


@pytest.mark.parametrize("shapes", [((1, 3, 8, 8), (1, 3, 8, 9)), ((3, 8, 8), (3, 8, 8)), ((1, 3, 8, 8), (2, 3, 8, 8))])
def test_pictures_that_do_not_fit_each_other_are_refused(shapes):
    with pytest.raises(ImageError, match="expected \\(B, C, H, W\\) twice"):
        metrics.psnr(*map(mx.zeros, shapes))


def test_measures_are_losses_too():
    image, other = (values[:, :, :24, :24].astype(mx.float32) for values in SMALL)
    for measure in (metrics.mse, metrics.ssim):
        gradient = mx.grad(lambda x, measure=measure: measure(x, other).sum())(image)
        step = 0.5 * mx.sign(gradient)
        change = (measure(image + step, other) - measure(image - step, other)).sum().item()
        assert change == pytest.approx(2 * (gradient * step).sum().item(), rel=0.02)


# LPIPS


def test_perceptual_distance_is_zero_for_equals_symmetric_and_grows():
    network = small_lpips()
    image, other = SMALL
    assert metrics.lpips(image, image, network).tolist() == [0, 0]
    near, far = metrics.lpips(image, other, network), metrics.lpips(image, 255 - image, network)
    np.testing.assert_allclose(near, metrics.lpips(other, image, network), rtol=1e-5)
    assert near.shape == (2,) and (near > 0).all() and (far > near).all()
    grey = image[:, :1]
    repeated = mx.repeat(grey, 3, axis=1)
    np.testing.assert_allclose(
        metrics.lpips(grey, 255 - grey, network), metrics.lpips(repeated, 255 - repeated, network), rtol=1e-5
    )


def test_gradients_are_numbers_where_all_features_are_zero():
    network = small_lpips()
    network.features[0].bias = mx.full((64,), -100.0)  # nothing passes the first ReLU
    pixels = mx.zeros((1, 16, 16, 3))
    gradient = mx.grad(lambda x: network(x, pixels).sum())(pixels + 0.5)
    assert mx.isfinite(gradient).all()


def test_lpips_refuses_small_images():
    network = small_lpips()
    with pytest.raises(ImageError, match="16"):
        metrics.lpips(mx.zeros((1, 3, 16, 15)), mx.zeros((1, 3, 16, 15)), network)
    with pytest.raises(ImageError, match="not 4"):
        metrics.lpips(mx.zeros((1, 4, 16, 16)), mx.zeros((1, 4, 16, 16)), network)
    with pytest.raises(ImageError, match="at least 16"):
        network(mx.zeros((1, 16, 8, 3)), mx.zeros((1, 16, 8, 3)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[LPIPS, Path, Path]:
    """A network, and its two files under torchvision's and lpips' names, the classifier included."""
    network, folder = small_lpips(3), tmp_path_factory.mktemp("lpips")
    tensors = from_mlx(dict(tree_flatten(network.parameters())), TABLE)
    backbone = {key: value for key, value in tensors.items() if key.startswith("features.")}
    write_safetensors(folder / "vgg16.safetensors", backbone | {"classifier.0.weight": mx.zeros((4, 4))})
    write_safetensors(folder / "vgg.safetensors", {k: v for k, v in tensors.items() if k not in backbone})
    return network, folder / "vgg16.safetensors", folder / "vgg.safetensors"


def test_weights_come_back_from_files(saved, tmp_path):
    network, backbone, linear = saved
    expected = metrics.lpips(*SMALL, network)
    np.testing.assert_array_equal(metrics.lpips(*SMALL, LPIPS.from_files(backbone, linear)), expected)

    slices = (4, 9, 16, 23, 30)  # the package cuts the layers after each tap
    whole = {}
    for key, value in from_mlx(dict(tree_flatten(network.parameters())), TABLE).items():
        if key.startswith("features."):
            _, layer, kind = key.split(".")
            whole[f"net.slice{1 + sum(int(layer) >= end for end in slices)}.{layer}.{kind}"] = value
        else:
            whole[key] = whole[key.replace("lin", "lins.", 1)] = value
    whole |= {"scaling_layer.shift": mx.zeros((1, 3, 1, 1)), "scaling_layer.scale": mx.zeros((1, 3, 1, 1))}
    write_safetensors(tmp_path / "lpips.safetensors", whole)
    np.testing.assert_array_equal(metrics.lpips(*SMALL, LPIPS.from_files(tmp_path / "lpips.safetensors")), expected)


def test_files_that_do_not_fit_are_told_by_key(saved, tmp_path):
    _, backbone, linear = saved
    with pytest.raises(WeightsError, match=r"vgg16.safetensors: .*5 missing: linear.0, linear.1"):
        LPIPS.from_files(backbone)
    with pytest.raises(WeightsError, match=r"26 missing: features.0.bias"):
        LPIPS.from_files(linear)
    with pytest.raises(WeightsError, match="no such weights file"):
        LPIPS.from_files(tmp_path / "nowhere.pth", linear)
    alexnet = {f"lin{i}.model.1.weight": mx.ones((1, c, 1, 1)) for i, c in enumerate((64, 192, 384, 256, 256))}
    write_safetensors(tmp_path / "alex.safetensors", alexnet)
    with pytest.raises(WeightsError, match=r"misshapen: linear.1 is \(192,\), expected \(128,\)"):
        LPIPS.from_files(backbone, tmp_path / "alex.safetensors")
    vgg = {f"lin{i}.model.1.weight": -mx.ones((1, c, 1, 1)) for i, c in enumerate((64, 128, 256, 512, 512))}
    write_safetensors(tmp_path / "negative.safetensors", vgg)
    with pytest.raises(WeightsError, match="negative"):
        LPIPS.from_files(backbone, tmp_path / "negative.safetensors")


# distances between sets


def test_statistics_in_portions_are_those_of_the_whole():
    features = np.random.default_rng(0).normal(1e4, 1, (70, 5))  # far from zero: sums of squares would lose digits
    whole, left, right = FeatureStatistics(), FeatureStatistics(), FeatureStatistics()
    whole.update(features)
    for start, end in ((0, 1), (1, 1), (1, 30)):
        left.update(features[start:end])
    right.update(features[30:])
    left.merge(right)
    left.merge(FeatureStatistics())
    for one in (whole, left):
        assert one.count == 70
        np.testing.assert_allclose(one.mean, features.mean(0), rtol=1e-12)
        np.testing.assert_allclose(one.covariance(), np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    assert left.distance(whole) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_in_closed_form():
    """Of covariances that commute it is |m1 - m2|^2 + |S1^(1/2) - S2^(1/2)|^2, however they are turned."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    first, second = np.array([4.0, 1, 0.25, 0]), np.array([1.0, 1, 9, 0])
    sigma1, sigma2 = (rotation @ np.diag(values) @ rotation.T for values in (first, second))
    expected = 9 + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    mu = np.array([3.0, 0, 0, 0])
    assert frechet_distance(mu, sigma1, 0 * mu, sigma2) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(mu, sigma1, mu, sigma1) == pytest.approx(0, abs=1e-6)


def test_bad_distributions_are_refused():
    one = FeatureStatistics()
    with pytest.raises(ImageError, match="vectors"):
        one.distance(one)
    one.update(np.zeros((1, 3)))
    with pytest.raises(ImageError, match="got 1"):
        one.covariance()
    with pytest.raises(ImageError, match="expected"):
        one.update(np.zeros((2, 4)))
    with pytest.raises(ImageError, match="NaN"):
        one.update(np.full((2, 3), np.nan))
    other = FeatureStatistics()
    other.update(mx.zeros((2, 4)))
    with pytest.raises(ImageError, match="merge"):
        one.merge(other)
    with pytest.raises(ImageError, match="expected \\(D,\\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(4))
    with pytest.raises(ImageError, match="infinite"):
        frechet_distance(np.zeros(3), np.eye(3), np.full(3, np.inf), np.eye(3))
