"""`VAE`: layout, range and scale at its border, folders there and back, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mflux_vae import VAE, DiagonalGaussian, ImageError, SettingsError, WeightsError
from mflux_vae.networks.latent_scaling import ScaledLatents
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.tiling.tiles import Tiling
from mflux_vae.weights.keymaps.diffusers import STEM
from tests.mflux_vae.small_models import pictures, small_kl, small_plain

Build = Callable[..., nn.Module]
both = pytest.mark.parametrize("build", [small_kl, small_plain])
SCALES = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def weights(vae: VAE) -> dict[str, mx.array]:
    return dict(tree_flatten(vae.network.parameters()))


def test_shapes_of_the_default_network() -> None:
    vae = VAE(latent_channels=4)
    traced = mx.compile(lambda image: (vae.encode(image), vae.decode(vae.encode(image))))  # shapes, uncomputed
    latents, image = traced(mx.zeros((1, 3, 512, 512), dtype=mx.uint8))
    assert latents.shape == (1, 4, 64, 64)
    assert image.shape == (1, 3, 512, 512)
    assert (vae.latent_channels, vae.spatial_scale, vae.scaling_factor, vae.shift_factor) == (4, 8, 1.0, 0.0)
    assert VAE(latent_channels=16).encode(mx.zeros((1, 3, 64, 72))).shape == (1, 16, 8, 9)


@both
def test_it_is_shown_in_one_line(build: Build) -> None:
    vae = VAE(network=build())
    assert "\n" not in repr(vae) and f"{type(vae.network).__name__}, {vae.latent_channels} latent" in repr(vae)


def test_arrays_of_numpy_are_taken_as_those_of_mlx() -> None:
    vae = VAE(network=small_kl())
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 24, 16), dtype=np.uint8)
    latent, again = vae.encode(image), vae(image)[0]
    assert np.array_equal(latent, vae.encode(mx.array(image)))
    assert np.array_equal(vae.decode(np.array(latent)), vae.decode(latent))
    assert np.array_equal(again, vae(mx.array(image))[0])


@both
def test_encode_is_the_networks_mode_scaled(build: Build) -> None:
    network, image = build(**SCALES), pictures()
    vae = VAE(network=network)
    pixels = image.astype(mx.float32).transpose(0, 2, 3, 1) / 127.5 - 1
    raw = np.array(network.encode(pixels).mean)
    expected = ((raw - 0.1159) * 0.3611).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(vae.encode(image), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vae.encode_nhwc(pixels), expected.transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


@both
def test_decode_takes_the_scale_back_and_clips_to_the_range_of_pixels(build: Build) -> None:
    network = build(**SCALES)
    vae = VAE(network=network)
    raw = mx.random.normal((2, 3, 5, 4), key=mx.random.key(2))
    pixels = np.array(network.decode(raw))
    np.testing.assert_allclose(vae.decode_nhwc(vae.scaled(raw)), pixels, rtol=1e-4, atol=1e-5)
    image = vae.decode(vae.scaled(raw).transpose(0, 3, 1, 2))
    expected = np.clip((pixels + 1) * 127.5, 0, 255).transpose(0, 3, 1, 2)
    assert image.dtype == mx.float32 and image.min().item() >= 0 and image.max().item() <= 255
    np.testing.assert_allclose(image, expected, rtol=1e-4, atol=2e-3)


def test_scale_and_shift_cancel() -> None:
    class Identity(ScaledLatents):
        """Latents are the pixels of every eighth row and column."""

        config = small_plain(**SCALES).config

        def encode(self, pixels: mx.array) -> DiagonalGaussian:
            moments = mx.pad(pixels[:, ::8, ::8], [(0, 0), (0, 0), (0, 0), (0, 5)])
            return DiagonalGaussian.from_moments(moments)

        def decode(self, latents: mx.array) -> mx.array:
            return mx.repeat(mx.repeat(latents[..., :3], 8, axis=1), 8, axis=2)

    vae, blocks = VAE(network=Identity()), pictures(1, 3, 4)
    image = mx.repeat(mx.repeat(blocks, 8, axis=2), 8, axis=3)
    np.testing.assert_allclose(vae.decode(vae.encode(image)), image, atol=1e-3)
    np.testing.assert_allclose(vae(image)[0], image, atol=1e-3)


@both
def test_whole_and_fractional_pixels_are_the_same(build: Build) -> None:
    vae, image = VAE(network=build()), pictures()
    assert mx.array_equal(vae.encode(image), vae.encode(image.astype(mx.float32)))
    np.testing.assert_allclose(vae.encode(image), vae.encode(image.astype(mx.float16)), atol=1e-5)


@both
def test_images_of_a_batch_do_not_know_of_each_other(build: Build) -> None:
    vae, image = VAE(network=build()), pictures(3)
    together = vae.decode(vae.encode(image))
    apart = mx.concatenate([vae.decode(vae.encode(image[i : i + 1])) for i in range(3)])
    np.testing.assert_allclose(together, apart, atol=0.05)


@both
def test_reconstruction_is_decode_of_encode(build: Build) -> None:
    vae, image = VAE(network=build(**SCALES)), pictures()
    reconstruction, posterior = vae(image)
    np.testing.assert_allclose(reconstruction, vae.decode(vae.encode(image)), atol=0.01)
    assert mx.array_equal(posterior.mean, vae.posterior(image).mean)


def test_draws_are_decided_by_their_key_and_the_mode_needs_none() -> None:
    vae, image = VAE(network=small_kl()), pictures()
    one, again, other = (vae.encode(image, sample=True, key=mx.random.key(seed)) for seed in (1, 1, 2))
    assert mx.array_equal(one, again) and not mx.array_equal(one, other)
    assert mx.array_equal(vae.encode(image), vae.encode(image, key=mx.random.key(3)))
    posterior = vae.posterior(image)
    expected = vae.scaled(posterior.sample(mx.random.key(1))).transpose(0, 3, 1, 2)
    assert mx.array_equal(one, expected)
    assert posterior.kl().shape == (2,) and posterior.kl().min().item() >= 0


@pytest.mark.parametrize(
    "shape",
    [(3, 16, 16), (1, 16, 16, 3), (1, 1, 16, 16), (1, 3, 0, 16)],
)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    vae = VAE(network=small_plain())
    for use in (vae.encode, vae.posterior, vae):
        with pytest.raises(ImageError, match=re.escape(str(shape))):
            use(mx.zeros(shape))


@both
def test_any_size_is_padded_with_its_edge_and_cropped_back(build: Build) -> None:
    vae, image = VAE(network=build()), pictures(2, 19, 30)
    bigger = mx.array(np.pad(np.array(image), [(0, 0), (0, 0), (0, 5), (0, 2)], mode="edge"))
    latents = vae.encode(image)
    assert latents.shape == (2, 4, 3, 4) and mx.array_equal(latents, vae.encode(bigger))
    whole = vae.decode(latents)
    assert whole.shape == (2, 3, 24, 32)
    assert mx.array_equal(vae.decode(latents, size=(19, 30)), whole[:, :, :19, :30])
    np.testing.assert_allclose(vae(image)[0], whole[:, :, :19, :30], atol=0.01)
    for size in ((16, 30), (19, 33), (0, 0)):  # too few pixels for so many latents, too many, none
        with pytest.raises(ImageError, match="24 x 32"):
            vae.decode(latents, size=size)


@both
def test_tiled_results_equal_untiled_ones(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, image = VAE(network=build()), pictures(2, 44, 60)
    latents = vae.encode(image, tiling=False)
    whole = vae.decode(latents, size=(44, 60), tiling=False)
    exact = Tiling("exact", tile=64)
    np.testing.assert_allclose(vae.encode(image, tiling=exact), latents, atol=1e-4)
    np.testing.assert_allclose(vae.decode(latents, size=(44, 60), tiling=exact), whole, atol=0.1)
    np.testing.assert_allclose(vae(image, tiling=exact)[0], whole, atol=0.1)
    blended = vae.decode(latents, size=(44, 60), tiling=Tiling("blend", tile=24))
    assert blended.shape == whole.shape and not mx.array_equal(blended, whole)

    assert 0 < vae.peak_bytes("decode", 44, 60, tiling=exact) < vae.peak_bytes("decode", 44, 60)
    assert vae.peak_bytes("encode", 41, 57) == vae.peak_bytes("encode", 48, 64)
    monkeypatch.setattr(tiling_plan, "available_bytes", lambda: 1)
    np.testing.assert_allclose(vae.decode(vae.encode(image), size=(44, 60)), whole, atol=60)  # tiled automatically


def test_other_value_ranges_are_refused_or_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    vae, image = VAE(network=small_plain()), pictures().astype(mx.float32)
    for wrong, word in (
        (image / 127.5 - 1, "-1, 1"),
        (mx.where(image > 250, float("nan"), image), "NaN"),
        (mx.where(image > 250, float("inf"), image), "infinite"),
    ):
        for use in (vae.encode, vae.posterior, vae):
            with pytest.raises(ImageError, match=word):
                use(wrong)
    vae.encode(image)
    vae.encode(image - 3)  # overshoot of resampling
    vae.encode(mx.zeros_like(image))
    assert not caplog.records
    vae.encode(image / 255)
    vae.encode(image / 255)
    (record,) = caplog.records
    assert "255" in record.getMessage()
    assert mx.compile(vae.encode)(image / 127.5 - 1).shape == (2, 4, 3, 4)  # traced: nothing to check


@pytest.mark.parametrize("shape", [(4, 2, 2), (1, 2, 2, 4), (1, 16, 2, 2), (1, 4, 0, 2)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ImageError, match="expected"):
        VAE(network=small_plain()).decode(mx.zeros(shape))


# pictures


@both
def test_pictures_of_many_sizes_and_kinds_and_back(build: Build, tmp_path: Path) -> None:
    vae = VAE(network=build())
    draw = np.random.default_rng(0)
    arrays = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((24, 32), (9, 20), (8, 8))]
    Image.fromarray(arrays[1]).save(tmp_path / "a.png")
    latents = vae.encode_images([arrays[0], tmp_path / "a.png", Image.fromarray(arrays[2])])
    assert [value.shape for value in latents] == [(4, 3, 4), (4, 2, 3), (4, 1, 1)]
    sizes = [array.shape[:2] for array in arrays]
    images = vae.decode_images(latents, sizes)
    for array, value, image in zip(arrays, latents, images, strict=True):
        tensor = mx.array(array.transpose(2, 0, 1)[None])
        assert mx.array_equal(value, vae.encode(tensor)[0])
        assert image.size == array.shape[1::-1] and image.mode == "RGB"
        np.testing.assert_allclose(np.array(image).transpose(2, 0, 1), vae(tensor)[0][0], atol=0.51)
    assert [image.size for image in vae.decode_images(latents)] == [(32, 24), (24, 16), (8, 8)]
    with pytest.raises(ImageError, match="sizes"):
        vae.decode_images(latents, sizes[:1])
    one, again, other = (vae.encode_images(arrays, sample=True, key=mx.random.key(seed))[0] for seed in (1, 1, 2))
    assert mx.array_equal(one, again) and not mx.array_equal(one, other)


# as a module


def test_vae_is_a_module() -> None:
    vae = VAE(network=small_kl())
    names = [name for name, _ in tree_flatten(vae.parameters())]
    assert names and all(name.startswith("network.") for name in names)
    assert len(tree_flatten(vae.trainable_parameters())) == len(names)
    vae.freeze()
    assert not tree_flatten(vae.trainable_parameters())
    vae.network.decoder.unfreeze()
    assert {name.split(".")[1] for name, _ in tree_flatten(vae.trainable_parameters())} == {"decoder"}


def test_gradients_reach_every_weight() -> None:
    vae, image = VAE(network=small_kl()), pictures(1)

    def loss(vae: VAE) -> mx.array:
        reconstruction, posterior = vae(image)
        return mx.abs(reconstruction - image).mean() + posterior.kl().mean()

    _, gradients = nn.value_and_grad(vae, loss)(vae)
    for name, gradient in tree_flatten(gradients):
        # a key's bias moves all scores of a query alike, which softmax does not see
        assert ".to_k.bias" in name or mx.abs(gradient).max().item() > 0, name


# folders


@both
def test_save_and_load_is_bitwise(build: Build, tmp_path: Path) -> None:
    vae = VAE(network=build(**SCALES))
    vae.save_pretrained(tmp_path / "out")
    again = VAE.from_pretrained(tmp_path / "out")
    assert again.config == vae.config
    assert weights(again).keys() == weights(vae).keys()
    for name, value in weights(vae).items():
        assert weights(again)[name].dtype == mx.float32 and mx.array_equal(weights(again)[name], value), name
    assert mx.array_equal(again.encode(pictures()), vae.encode(pictures()))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", f"{STEM}.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_compute_in_float32_on_cpus(dtype: str, tmp_path: Path) -> None:
    vae = VAE(network=small_kl())
    vae.save_pretrained(tmp_path, dtype)
    stored = mx.load(str(tmp_path / f"{STEM}.safetensors"))
    assert {value.dtype for value in stored.values()} == {getattr(mx, dtype)}
    again = weights(VAE.from_pretrained(tmp_path))
    assert {value.dtype for value in again.values()} == {mx.float32}
    for name, value in weights(vae).items():
        assert mx.array_equal(again[name], value.astype(getattr(mx, dtype)).astype(mx.float32)), name
    with pytest.raises(SettingsError, match="int8"):
        vae.save_pretrained(tmp_path, "int8")


@pytest.mark.usefixtures("gpu_branch")
def test_float16_that_would_overflow_becomes_float32_on_gpus(tmp_path: Path) -> None:
    for overflows, expected in ((True, mx.float32), (False, mx.float16)):
        VAE(network=small_kl(force_upcast=overflows)).save_pretrained(tmp_path)
        opened = VAE.from_pretrained(tmp_path, mx.float16)
        assert {value.dtype for value in weights(opened).values()} == {expected}
        opened = VAE.from_pretrained(tmp_path)
        assert {value.dtype for value in weights(opened).values()} == {mx.float32}


def test_pipeline_folder_opens_its_vae(tmp_path: Path) -> None:
    vae = VAE(network=small_kl())
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert mx.array_equal(VAE.from_pretrained(str(tmp_path)).encode(pictures()), vae.encode(pictures()))


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        VAE.from_pretrained(tmp_path / "nowhere")
    VAE(network=small_kl()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    with pytest.raises(WeightsError, match="misshapen"):
        VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    with pytest.raises(WeightsError, match="VQModel"):
        VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / f"{STEM}.safetensors").unlink()
    with pytest.raises(WeightsError, match="weights"):
        VAE.from_pretrained(tmp_path)


# what is logged


def test_debug_logs_shapes_time_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    vae, image = VAE(network=small_kl()), pictures(1, 20, 30)
    quiet = vae.decode(vae.encode(image), size=(20, 30))
    assert not caplog.records
    with caplog.at_level("DEBUG", "mflux_vae"):
        told = vae.decode(vae.encode(image), size=(20, 30))
        mx.compile(vae.encode)(image)  # nothing can be evaluated there
    assert mx.array_equal(told, quiet)
    lines = "\n".join(record.getMessage() for record in caplog.records)
    for shape in ("uint8 (1, 3, 20, 30)", "(1, 24, 32, 3)", "(1, 3, 4, 4)", "float32 (1, 3, 20, 30)"):
        assert shape in lines
    assert len(re.findall(r"(en|de)code: .* -> .*, \d+\.\d+ s, \d+\.\d MB", lines)) == 2, lines


def test_info_logs_what_was_opened(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    VAE(network=small_kl()).save_pretrained(tmp_path)
    with caplog.at_level("INFO", "mflux_vae"):
        VAE.from_pretrained(tmp_path).encode(pictures())
    (record,) = caplog.records
    assert f"{tmp_path}: AutoencoderKL" in record.getMessage() and "float32" in record.getMessage()
