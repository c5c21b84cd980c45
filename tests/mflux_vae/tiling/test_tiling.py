"""Tiling: exact mode matches the untiled result, blended tiles cover the image and blend linearly."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae.tiling import tiles
from mflux_vae.tiling.strips import Buffered, Convolution, StripRun
from mflux_vae.tiling.tiles import Tiling
from tests.mflux_vae.small_models import drawn, small_kl, small_plain, small_qwen_image, small_taehv


def small_tiny() -> nn.Module:
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    return drawn(AutoencoderTiny(AutoencoderTinyConfig(pool=True, **widths)))


def small_flux2() -> nn.Module:
    config = AutoencoderKLFlux2Config(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)
    return drawn(AutoencoderKLFlux2(config))


def small_ddconfig() -> nn.Module:
    """Linear attention at high resolution, resampling without convolutions."""
    ddconfig = {
        "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 16, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [16], "attn_type": "linear", "resamp_with_conv": False,
        "dropout": 0.0,
    }  # fmt: skip
    return drawn(AutoencoderKL(AutoencoderKLConfig.from_ddconfig(ddconfig, norm_num_groups=4)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "kl": small_kl,
    "kl, bare": lambda: small_kl(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    "kl, three levels of another width": lambda: small_kl(block_out_channels=(12, 8, 16), layers_per_block=2),
    "ddconfig": small_ddconfig,
    "flux2": small_flux2,
    "tiny": small_tiny,
    "plain": small_plain,
    "qwen-image": small_qwen_image,
    "taehv": small_taehv,
}
built: dict[str, nn.Module] = {}


def network_of(name: str) -> nn.Module:
    if name not in built:
        built[name] = NETWORKS[name]()
    return built[name]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def assert_close(ours: mx.array, theirs: mx.array) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5 * max(1.0, mx.abs(theirs).max().item()))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(NETWORKS)),
    batch=st.integers(1, 2),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    tile=st.sampled_from([24, 40, 64, 200]),
)
def test_exact_tiling_gives_the_untiled_result(name: str, batch: int, height: int, width: int, tile: int) -> None:
    network, plan = network_of(name), Tiling("exact", tile)
    pixels = normal(batch, 8 * height, 8 * width, 3)
    untiled, tiled = network.encode(pixels), tiles.encode(network, pixels, plan)
    assert_close(tiled.mean, untiled.mean)
    assert_close(tiled.logvar, untiled.logvar)
    assert_close(tiles.decode(network, untiled.mean, plan), network.decode(untiled.mean))


def test_tile_larger_than_image_changes_nothing() -> None:
    network, pixels = network_of("kl"), normal(1, 48, 32, 3)
    for plan in (None, Tiling("blend", 64)):
        assert mx.array_equal(tiles.encode(network, pixels, plan).mean, network.encode(pixels).mean)


def test_gradients_pass_through_strips() -> None:
    network, latents = network_of("kl"), normal(1, 2, 2, 4)
    slopes = [
        mx.grad(lambda z, plan=plan: mx.square(tiles.decode(network, z, plan)).mean())(latents)
        for plan in (None, Tiling("exact", 48))
    ]
    assert_close(slopes[1], slopes[0])


def test_strips_are_dropped_and_convolutions_computed_once() -> None:
    computed: dict[Buffered, int] = {}

    class CountingRun(StripRun):
        peak = 0

        def compute(self, buffer: Buffered, start: int, stop: int) -> mx.array:
            computed[buffer] = computed.get(buffer, 0) + stop - start
            self.peak = max(self.peak, self.held_bytes)
            return super().compute(buffer, start, stop)

    network, latents = network_of("kl"), normal(1, 16, 8, 4)
    strip_run = CountingRun(256)
    (pixels,) = strip_run.run(tiles.array_function(network, "decode"), latents)
    full = pixels.size // 3 * 4 * 8  # bytes of 8 channels at full resolution
    assert strip_run.peak < 1.7 * full
    for buffer, rows in computed.items():
        normed = isinstance(buffer, Convolution) and buffer.groups is not None and buffer.shape[1] == pixels.shape[1]
        passes = rows / buffer.shape[1]
        assert 1.9 < passes < 4 if normed else passes == 1, (buffer.shape, passes)


def test_blended_tiles_approximate_untiled_result() -> None:
    network = small_plain()
    pixels = normal(2, 64, 80, 3)
    latents = network.encode(pixels).mean
    for result, whole in (
        (tiles.decode(network, latents, Tiling("blend", 48)), network.decode(latents)),
        (tiles.encode(network, pixels, Tiling("blend", 64)).mean, latents),
    ):
        assert result.shape == whole.shape
        assert mx.abs(result - whole).mean().item() < 0.1 * mx.abs(whole).mean().item()


@given(length=st.integers(1, 300), tile=st.integers(1, 64), overlap=st.floats(0, 0.5), scale=st.sampled_from([1, 8]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_tiles_cover_the_axis_and_weights_sum_to_one(length: int, tile: int, overlap: float, scale: int) -> None:
    spans = tiles.tile_spans(length, tile, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert {end - start for start, end in spans} == {min(tile, length)}
    for (_, end), (start, _) in pairwise(spans):
        assert end - start >= min(int(np.ceil(tile * overlap)), tile - 1)
    total = np.zeros(length * scale)
    for (start, end), weights in zip(spans, tiles.blend_weights(spans, scale), strict=True):
        assert (weights > 0).all()
        total[start * scale : end * scale] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_weights_are_linear_in_overlap() -> None:
    left, right = tiles.blend_weights([(0, 8), (4, 12)], 1)
    np.testing.assert_allclose(left, [1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(right, left[::-1])


@pytest.mark.parametrize("given", [{"mode": "other"}, {"tile": 0}, {"overlap": 0.6}, {"overlap": -0.1}])
def test_invalid_tilings_raise_error(given: dict) -> None:
    with pytest.raises(SettingsError):
        Tiling(**given)


def test_attention_in_parts_matches(gpu_branch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (normal(2, 50, 1, 16, seed=seed) for seed in range(3))
    mask = normal(2, 1, 50, 50, seed=3)
    whole = kernels.attention(q, k, v, scale=0.3, mask=mask)
    slope = mx.grad(lambda q: mx.square(kernels.attention(q, k, v, scale=0.3, mask=mask)).sum())(q)
    monkeypatch.setattr(import_module("mflux_vae.kernels.gpu_attention"), "MAX_SCORES", 700)
    assert_close(kernels.attention(q, k, v, scale=0.3, mask=mask), whole)
    assert_close(mx.grad(lambda q: mx.square(kernels.attention(q, k, v, scale=0.3, mask=mask)).sum())(q), slope)
    assert_close(mx.compile(lambda q: kernels.attention(q, k, v, scale=0.3, mask=mask))(q), whole)


@pytest.mark.usefixtures("gpu_branch")
def test_blended_tiles_of_a_half_precision_network_are_summed_in_float32() -> None:
    def constant(x: mx.array) -> list[mx.array]:
        return [mx.full(x.shape, 1.0, mx.bfloat16)]

    (blended,) = tiles._run_blended(constant, mx.zeros((1, 96, 96, 1)), Tiling("blend", 32, 0.5), 1, 1)
    assert blended.dtype == mx.bfloat16 and blended.min() == blended.max() == 1
