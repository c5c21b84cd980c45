"""What is not an array is refused where an array belongs, with the method that takes files."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mflux_vae import VAE, ImageError, Previewer
from mflux_vae.metrics.image import psnr
from tests.mflux_vae.small_models import small_kl

NOT_ARRAYS = {
    "text": "a.jpg",
    "path": Path("a.jpg"),
    "list of texts": ["a.jpg"],
    "bytes": b"abc",
    "Pillow image": Image.new("RGB", (16, 16)),
    "list of Pillow images": [Image.new("RGB", (16, 16))],
    "nothing": None,
    "mapping": {"a": 1},
    "rows of different lengths": [[1, 2], [3]],
    "complex": np.zeros((1, 3, 8, 8), complex),
}


@pytest.fixture(scope="module")
def vae() -> VAE:
    return VAE(network=small_kl())


@pytest.mark.parametrize("name", NOT_ARRAYS)
@pytest.mark.parametrize("method", ["encode", "posterior", "__call__", "encode_nhwc", "mflux", "pictures"])
def test_images_must_be_arrays(vae, method, name):
    if method == "pictures" and name == "nothing":
        pytest.skip("stands for synthetic images")
    call = {
        "mflux": lambda value: vae.as_mflux().encode(value),
        "pictures": lambda value: Previewer(vae, pictures=value),
    }.get(method) or getattr(vae, method)
    with pytest.raises(ImageError, match="encode_images") as error:
        call(NOT_ARRAYS[name])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("name", NOT_ARRAYS)
@pytest.mark.parametrize(
    "method", ["decode", "decode_nhwc", "decode_images", "one of decode_images", "mflux", "preview"]
)
def test_latents_must_be_arrays(vae, method, name):
    call = {
        "mflux": lambda value: vae.as_mflux().decode(value),
        "one of decode_images": lambda value: vae.decode_images([value]),
        "preview": lambda value: Previewer(vae, vae)(value),
    }.get(method) or getattr(vae, method)
    with pytest.raises(ImageError, match=r"latents|array") as error:
        call(NOT_ARRAYS[name])
    assert len(str(error.value)) < 300


def test_metrics_need_arrays():
    with pytest.raises(ImageError, match="load_images"):
        psnr("a.png", "b.png")


def test_channels_last_input_is_checked(vae):
    with pytest.raises(ImageError, match="expected"):
        vae.encode_nhwc(mx.zeros((1, 3, 16, 16)))
    with pytest.raises(ImageError, match="expected"):
        vae.decode_nhwc(mx.zeros((16, 16, vae.latent_channels)))


def test_numbers_in_lists_stay_accepted(vae):
    image = np.full((1, 3, 8, 8), 100, np.uint8)
    assert mx.array_equal(vae.encode(image.tolist()), vae.encode(image.astype(np.float32)))
    reconstruction, _ = vae(image.tolist())
    assert reconstruction.shape == image.shape


@pytest.mark.parametrize(
    ("method", "shape"),
    [("decode", (4, 5, 6)), ("decode_images", (4, 5, 6)), ("decode_nhwc", (5, 6, 4)), ("encode", (3, 16, 24))],
)
def test_one_sample_without_a_batch_axis_is_named_as_given(vae, method, shape):
    with pytest.raises(ImageError, match=r"\[None\]") as error:
        getattr(vae, method)(mx.zeros(shape))
    assert str(shape) in str(error.value)


def test_latents_in_a_list_are_named_as_given(vae):
    with pytest.raises(ImageError, match="image 1") as error:
        vae.decode_images([mx.zeros((4, 2, 2)), mx.zeros((1, 4, 2, 2))])
    assert "(1, 4, 2, 2)" in str(error.value) and "[None]" not in str(error.value)
