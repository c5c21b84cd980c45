"""Encoding images and prompts once, and reusing the cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae.images import load_image, save_image
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data import encoding
from mflux_vae_train.dreambooth.data.batches import Plan, micro_batches
from mflux_vae_train.dreambooth.data.crops import Crop
from mflux_vae_train.dreambooth.data.dataset import load_dataset
from mflux_vae_train.dreambooth.data.encoding import (
    CroppedImage,
    encode_dataset,
    encode_images,
    encode_prompts,
    open_cache,
    trimmed,
)
from mflux_vae_train.dreambooth.data.encoding_cache import EncodingCache
from mflux_vae_train.dreambooth.planning.preservation import resolve_preservation
from tests.contracts.fake import FakePipeline

LARGE = Crop(shape=(600, 600))


def crops_of(folder, crop=LARGE) -> list[CroppedImage]:
    return [CroppedImage(path, crop) for path in sorted(folder.glob("*.png"))]


def corners(pixels: mx.array) -> mx.array:
    return pixels[:, 0, 0]


class Counting:
    """An encoder that records its batch sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, pixels: mx.array) -> mx.array:
        self.sizes.append(pixels.shape[0])
        return corners(pixels) + 0.001 * len(self.sizes)


def test_images_are_encoded_in_order_in_batches_of_a_million_pixels(instance_dir):
    encode = Counting()
    latents = encode_images(encode, crops_of(instance_dir))
    assert encode.sizes == [2, 2, 1]
    for latent, image in zip(latents, crops_of(instance_dir), strict=True):
        expected = load_image(image.path, resolution=600)[0, 0] / 127.5 - 1
        np.testing.assert_allclose(latent, expected, atol=0.004)


def test_batches_have_one_shape(instance_dir):
    wide = Crop(shape=(300, 600))
    pictures = [CroppedImage(image.path, crop) for image in crops_of(instance_dir) for crop in (LARGE, wide)]
    shapes = []
    latents = encode_images(lambda pixels: shapes.append(pixels.shape) or pixels[:, :1, :1], pictures)
    assert shapes == [(2, 600, 600, 3), (2, 600, 600, 3), (1, 600, 600, 3), (5, 300, 600, 3)]
    for latent, image in zip(latents, pictures, strict=True):
        expected = image.crop.apply(load_image(image.path))[:1, :1] / 127.5 - 1
        np.testing.assert_allclose(latent, expected, atol=1e-5)


def test_reading_is_at_most_one_batch_ahead(instance_dir, monkeypatch):
    read = []
    monkeypatch.setattr(
        encoding, "load_image", lambda path, **_: read.append(path) or np.zeros((600, 600, 3), np.uint8)
    )
    pictures = crops_of(instance_dir) * 3
    at_encoding = []

    def encode(pixels):
        at_encoding.append(len(read))
        return corners(pixels)

    assert len(encode_images(encode, pictures)) == 15
    assert sorted(read) == sorted(one.path for one in pictures)
    assert all(count <= 2 * (batch + 2) for batch, count in enumerate(at_encoding))


def test_broken_image_is_named(instance_dir):
    path = instance_dir / "picture-3.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"picture-3\.png"):
        encode_images(corners, crops_of(instance_dir))


# the cache


def test_cached_images_are_not_encoded_again(instance_dir, tmp_path):
    encode = Counting()
    first = encode_images(encode, crops_of(instance_dir), cache=EncodingCache(tmp_path / "cache"), encoder="a")
    cache = EncodingCache(tmp_path / "cache")
    again = encode_images(encode, crops_of(instance_dir), cache=cache, encoder="a")
    assert encode.sizes == [2, 2, 1] and (cache.hits, cache.writes) == (5, 0)
    assert all(mx.array_equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("change", ["encoder", "shape", "offset", "mirrored", "content"])
def test_cache_key_depends_on(instance_dir, tmp_path, change):
    cache, encode = EncodingCache(tmp_path / "cache"), Counting()
    encode_images(encode, crops_of(instance_dir), cache=cache, encoder="a")
    view = {
        "shape": Crop(shape=(300, 600)),
        "offset": Crop(shape=(600, 600), offset=1.0),
        "mirrored": Crop(shape=(600, 600), mirrored=True),
    }.get(change, LARGE)
    if change == "content":
        for image in crops_of(instance_dir):
            save_image(image.path, load_image(image.path) // 2)
    before = sum(encode.sizes)
    encode_images(encode, crops_of(instance_dir, view), cache=cache, encoder="b" if change == "encoder" else "a")
    assert sum(encode.sizes) - before == 5


def test_file_name_does_not_matter(instance_dir, tmp_path):
    cache, encode = EncodingCache(tmp_path / "cache"), Counting()
    encode_images(encode, crops_of(instance_dir), cache=cache)
    for index, image in enumerate(crops_of(instance_dir)):
        image.path.rename(instance_dir / f"z{9 - index}.png")
    encode_images(encode, crops_of(instance_dir), cache=cache)
    assert encode.sizes == [2, 2, 1]


def test_missing_and_broken_entries_are_encoded_in_the_original_batches(instance_dir, tmp_path):
    """Rounding may depend on the batch, so batches are those of a run without cache."""
    folder = tmp_path / "cache"
    encode_images(Counting(), crops_of(instance_dir), cache=EncodingCache(folder))
    kept = sorted(folder.iterdir())
    kept[0].write_bytes(b"broken")
    kept[1].unlink()
    encode = Counting()
    encode_images(encode, crops_of(instance_dir), cache=(cache := EncodingCache(folder)))
    assert cache.hits == 3 and cache.writes == 2 and set(encode.sizes) <= {1, 2}
    encode_images(encode_nothing, crops_of(instance_dir), cache=EncodingCache(folder))
    assert len(list(folder.iterdir())) == 5, "no temporary file is left"


def encode_nothing(pixels: mx.array) -> mx.array:
    raise AssertionError("encoded twice")


def test_interrupted_run_keeps_finished_batches(instance_dir, tmp_path):
    class Stop(Exception):
        pass

    calls = []

    def encode(pixels):
        calls.append(pixels.shape[0])
        if len(calls) == 2:
            raise Stop
        return corners(pixels)

    with pytest.raises(Stop):
        encode_images(encode, crops_of(instance_dir), cache=EncodingCache(tmp_path / "cache"))
    encode_images(encode, crops_of(instance_dir), cache=EncodingCache(tmp_path / "cache"))
    assert calls == [2, 2, 2, 1]


def test_prompts_are_encoded_once(tmp_path):
    pipeline = FakePipeline()
    texts = ["a dog", "", "a dog", "a cat"]
    first = encode_prompts(pipeline, texts, open_cache(pipeline, tmp_path))
    again = encode_prompts(pipeline, ["a cat", ""], open_cache(pipeline, tmp_path))
    assert pipeline.prompts_encoded == ["a dog", "", "a cat"]
    for prompt in ("a cat", ""):
        expected = FakePipeline().encode_prompts([prompt])["embedding"]
        for prompts in (first, again):
            assert mx.array_equal(prompts.get(prompt)["embedding"], expected)
    assert set(first.rows) == set(texts)


def test_pipeline_without_identity_has_no_cache(tmp_path):
    assert open_cache(FakePipeline(), tmp_path).folder == tmp_path

    class Unidentified:
        pass

    assert open_cache(Unidentified(), tmp_path).folder is None


# the whole data set


def cache_of(instance_dir, pipeline, tmp_path, **changes):
    given = {"model": "fake", "instance_data_dir": str(instance_dir), "instance_prompt": "a photo of sks dog"}
    settings = DreamBoothSettings(**given, output_dir=str(tmp_path / "out"), **changes)
    preservation = resolve_preservation(settings)
    pictures = load_dataset(settings, resolution=16, multiple=4)
    prompts = encode_prompts(pipeline, ["a photo of sks dog", "a photo of a dog", ""], EncodingCache(None))
    classes = [sorted(instance_dir.glob("*.png"))[:2]] if preservation.kind == "class_images" else None
    return encode_dataset(
        pipeline,
        pictures.images,
        prompts,
        preservation.concepts,
        EncodingCache(None),
        class_images=classes,
        preserves_output=preservation.kind == "dop",
    )


def test_every_crop_has_a_latent_and_class_images_match_instance_shapes(instance_dir, tmp_path):
    save_image(instance_dir / "wide.png", np.zeros((40, 80, 3), np.uint8))
    cache = cache_of(instance_dir, FakePipeline(), tmp_path, random_flip=True, use_aspect_ratio_buckets=True, repeats=3)
    assert len(cache.samples) == 6 * 3 and len(cache.latents) == 6 * 2
    shapes = {latent.shape for latent in cache.latents}
    assert len(shapes) == 2
    assert cache.class_latents.keys() == {(0, shape) for shape in shapes}
    assert all(latent.shape == shape for (_, shape), latents in cache.class_latents.items() for latent in latents)
    plain, mirrored = (cache.latents[entry] for entry in cache.samples[0].latents[0])
    np.testing.assert_allclose(plain[:, ::-1], mirrored, atol=0.02)


class SizeConditioned(FakePipeline):
    def encode_crops(self, crops):
        return {"sizes": mx.array([[*crop.original, *crop.corner, *crop.target] for crop in crops], mx.float32)}


@pytest.mark.parametrize("preservation", ["class_images", "dop", "none"])
def test_each_image_has_the_conditioning_of_its_own_size_and_crop(instance_dir, tmp_path, preservation):
    save_image(instance_dir / "wide.png", np.zeros((40, 80, 3), np.uint8))
    options = {"random_flip": True, "prior_preservation": preservation, "center_crop": False, "num_crops": 2}
    if preservation != "none":
        options["class_prompt"] = "a photo of a dog"
    cache = cache_of(instance_dir, SizeConditioned(), tmp_path, **options)
    plan = Plan(samples=24, batch_size=4, accumulation=1)
    batches = [
        batch
        for update in range(plan.updates)
        for batch in micro_batches(cache, plan, update=update, seed=0, caption_dropout=0.5)
    ]
    rows = np.concatenate([np.array(batch.arrays["conditioning"]["sizes"][:4]) for batch in batches])
    assert {tuple(row) for row in rows} == {
        *((20, 16, top, 0, 16, 16) for top in (0, 4)),  # 16 px wide: nothing is cut from left and right
        *((40, 80, 0, left, 16, 16) for left in (0, 16)),
    }
    for batch in batches:
        assert len(batch.arrays["conditioning"]["sizes"]) == len(batch.arrays["latents"])
        instance, prior = batch.arrays["conditioning"]["sizes"][:4], batch.arrays["conditioning"]["sizes"][4:]
        if preservation == "class_images":
            np.testing.assert_array_equal(prior, [[20, 16, 2, 0, 16, 16]] * 4)
        elif preservation == "dop":
            np.testing.assert_array_equal(prior, instance)


def test_masks_are_averaged_to_latent_positions(instance_dir, tmp_path):
    mask = np.zeros((20, 16, 1), np.uint8)
    mask[:, 8:] = 255
    mask[:, 4:8] = 128
    save_image(instance_dir / "picture-0-mask.png", mask)
    cache = cache_of(instance_dir, FakePipeline(), tmp_path, masked_loss=True, random_flip=True)
    plain, mirrored = (np.array(cache.masks[entry])[..., 0] for entry in cache.samples[0].latents[0])
    assert plain.shape == cache.latents[0].shape[:2] == (4, 4)
    np.testing.assert_allclose(plain, [[0, 0.5, 1, 1]] * 4, atol=0.1)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert (np.array(cache.masks[cache.samples[1].latents[0][0]]) == 1).all(), "without a mask every position counts"


def test_masks_need_spatial_latents(instance_dir, tmp_path):
    class Flat(FakePipeline):
        def encode_images(self, pixels):
            return super().encode_images(pixels).flatten(1)

    save_image(instance_dir / "picture-0-mask.png", np.full((20, 16, 1), 255, np.uint8))
    with pytest.raises(SettingsError, match="spatial"):
        cache_of(instance_dir, Flat(), tmp_path, masked_loss=True)


def test_encodings_in_another_number_format_are_encoded_again(tmp_path) -> None:
    cache, key = EncodingCache(tmp_path), {"a": 1}
    ids = mx.array([3], mx.int32)
    cache.put(key, {"latents": mx.ones((2,)), "ids": ids})
    (path,) = tmp_path.glob("*.safetensors")
    assert cache.get(key) is not None
    for latents in (mx.ones((2,), mx.uint8), mx.array([1, float("inf")])):
        mx.save_safetensors(str(path), {"latents": latents, "ids": ids})
        assert cache.get(key) is None


def test_encoders_with_broken_weights_are_named_before_training(instance_dir) -> None:
    with pytest.raises(WeightsError, match=r"latents have NaN.*autoencoder"):
        encode_images(lambda pixels: pixels[:, ::4, ::4] * float("nan"), crops_of(instance_dir))


class Padded(FakePipeline):
    """Conditioning is one column per character of the prompt, padded to 40."""

    def encode_prompts(self, prompts):
        return {"embedding": mx.array([[1.0] * len(prompt) + [0.0] * (40 - len(prompt)) for prompt in prompts])}

    def trim(self, conditioning):
        longest = int(conditioning["embedding"].sum(axis=1).max().item())
        return {"embedding": conditioning["embedding"][:, :longest]}


def test_padding_is_as_long_as_the_prompts_of_the_updates_need():
    captions, drawn = ["a dog", "", "a dog on a beach"], "a validation prompt that is longer"
    for pipeline, width in ((Padded(), 16), (FakePipeline(), 8)):
        encoded = encode_prompts(pipeline, [captions[0], drawn, *captions], EncodingCache(None))
        short = trimmed(pipeline, encoded, captions)
        assert short.conditioning["embedding"].shape[1] == width
        for prompt in captions:
            whole = encoded.get(prompt)["embedding"][:, :width]
            assert mx.array_equal(short.get(prompt)["embedding"], whole)
