from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import ImageError
from mflux_vae.images import save_image
from mflux_vae_train.dreambooth import data
from mflux_vae_train.dreambooth.data import Cache, Plan


@pytest.fixture
def cache():
    """Latents that say which picture they are: instance 0..4, class 100..102; prompts 0, 1, 2."""
    return Cache(
        instance=mx.arange(5).reshape(5, 1),
        prior=100 + mx.arange(3).reshape(3, 1),
        prompts={"embedding": mx.arange(3).reshape(3, 1)},
    )


def run_of(cache, plan, *, seed=0, caption_dropout=0.0):
    """Every micro-batch of a run."""
    return [
        data.micro_batches(cache, plan, update=update, seed=seed, caption_dropout=caption_dropout)
        for update in range(plan.updates)
    ]


def joined(batches, name):
    """An array over the micro-batches of an update: instance samples first, then prior samples."""
    halves = [np.split(np.array(batch.arrays[name]), 2) for batch in batches]
    return np.concatenate([half[0] for half in halves] + [half[1] for half in halves])


def test_pictures_are_sorted_counted_and_fingerprinted(instance_dir):
    pictures = data.load_pictures(instance_dir, 16)
    assert [path.name for path in pictures.paths] == [f"picture-{index}.png" for index in range(5)]
    assert pictures.skipped == 1
    assert all(array.shape == (16, 16, 3) for array in pictures.arrays)
    (instance_dir / "picture-0.png").rename(instance_dir / "aaa.png")
    assert data.load_pictures(instance_dir, 16).fingerprint == pictures.fingerprint
    save_image(instance_dir / "aaa.png", np.zeros((16, 16, 3), np.uint8))
    assert data.load_pictures(instance_dir, 16).fingerprint != pictures.fingerprint


def test_a_folder_without_pictures_says_which_files_count(tmp_path):
    (tmp_path / "Thumbs.db").write_bytes(b"")
    with pytest.raises(ImageError, match=r"no picture among its 1 files: .*\.jpg.*\.png"):
        data.load_pictures(tmp_path, 16)


def test_pictures_are_encoded_in_order_a_million_pixels_at_a_time(instance_dir):
    sizes = []

    def encode(pixels):
        sizes.append(pixels.shape[0])
        return pixels[:, 0, 0]

    pictures = data.load_pictures(instance_dir, 600)
    from_arrays = data.encode_pictures(encode, pictures.arrays, resolution=600)
    from_files = data.encode_pictures(encode, pictures.paths, resolution=600)
    assert sizes == [2, 2, 1] * 2
    np.testing.assert_allclose(from_arrays, from_files, atol=1e-6)
    for latent, array in zip(from_arrays, pictures.arrays, strict=True):
        np.testing.assert_allclose(latent, array[0, 0] / 127.5 - 1, atol=1e-5)


def test_reading_stays_one_batch_ahead_of_encoding(instance_dir, monkeypatch):
    read = []
    monkeypatch.setattr(data, "load_image", lambda path, **_: read.append(path) or np.zeros((600, 600, 3), np.uint8))
    paths = [instance_dir / f"{index}.png" for index in range(12)]
    at_encoding = []

    def encode(pixels):
        at_encoding.append(len(read))
        return pixels[:, 0, 0]

    assert data.encode_pictures(encode, paths, resolution=600).shape == (12, 3)
    assert sorted(read) == sorted(paths)
    assert all(count <= 2 * (batch + 2) for batch, count in enumerate(at_encoding))


@pytest.mark.parametrize("broken", [0, 3])
def test_a_broken_picture_is_named_wherever_it_stands(instance_dir, broken):
    path = instance_dir / f"picture-{broken}.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=rf"picture-{broken}\.png"):
        data.load_pictures(instance_dir, 16)
    with pytest.raises(ImageError, match=rf"picture-{broken}\.png"):
        data.encode_pictures(lambda pixels: pixels, sorted(instance_dir.glob("*.png")), resolution=16)


def test_the_order_runs_through_all_and_is_shuffled_anew():
    epochs = [[data.shuffled(3, 0, 5, epoch * 5 + place) for place in range(5)] for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert epochs != [[data.shuffled(4, 0, 5, epoch * 5 + place) for place in range(5)] for epoch in range(20)]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (4, 1), (3, 2), (7, 1)])
def test_epochs_see_every_picture_equally_often_and_flush_the_last_window(cache, batch_size, accumulation):
    plan = Plan(samples=3 * 5, batch_size=batch_size, accumulation=accumulation)
    run = run_of(cache, plan)
    assert len(run) == plan.updates
    assert all(len(batches) == accumulation for batches in run[:-1])
    weights = [batch.weight for batches in run for batch in batches]
    assert sum(weights) == 15 and max(weights) <= batch_size and min(weights) > 0
    seen = np.concatenate([np.array(b.arrays["latents"])[: int(b.weight), 0] for batches in run for b in batches])
    assert np.bincount(seen).tolist() == [3, 3, 3, 3, 3]


def test_four_of_one_are_one_of_four(cache):
    ones = run_of(cache, Plan(samples=14, batch_size=1, accumulation=4), caption_dropout=0.3)
    fours = run_of(cache, Plan(samples=14, batch_size=4, accumulation=1), caption_dropout=0.3)
    assert len(ones) == len(fours) == 4
    for one, four in zip(ones, fours, strict=True):
        for name in four[0].arrays:
            np.testing.assert_array_equal(joined(one, name), joined(four, name))


def test_a_batch_is_a_function_of_its_number_alone(cache):
    plan = Plan(samples=40, batch_size=2, accumulation=2)
    whole = run_of(cache, plan, caption_dropout=0.5)
    alone = data.micro_batches(cache, plan, update=7, seed=0, caption_dropout=0.5)
    for one, other in zip(whole[7], alone, strict=True):
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])


def test_prior_samples_follow_the_instance_samples_with_their_own_prompt_and_noise(cache):
    (batch,) = data.micro_batches(
        cache, Plan(samples=12, batch_size=4, accumulation=1), update=0, seed=0, caption_dropout=0.0
    )
    latents, prompts = (
        np.array(batch.arrays["latents"])[:, 0],
        np.array(batch.arrays["conditioning.embedding"])[:, 0],
    )
    assert (latents[:4] < 5).all() and (latents[4:] >= 100).all()
    assert prompts.tolist() == [data.INSTANCE] * 4 + [data.CLASS] * 4
    for name in ("key", "dropout_key"):
        keys = np.array(batch.arrays[name])
        assert keys.shape == (8, 2) and len(np.unique(keys, axis=0)) == 8


def test_noise_of_the_instance_does_not_depend_on_the_prior(cache):
    plan = Plan(samples=12, batch_size=2, accumulation=2)
    without = run_of(Cache(instance=cache.instance, prior=None, prompts=cache.prompts), plan)
    for one, other in zip(run_of(cache, plan), without, strict=True):
        for batch, bare in zip(one, other, strict=True):
            np.testing.assert_array_equal(batch.arrays["key"][:2], bare.arrays["key"])
            np.testing.assert_array_equal(batch.arrays["latents"][:2], bare.arrays["latents"])


def test_noise_never_repeats(cache):
    plan = Plan(samples=64, batch_size=4, accumulation=2)
    keys = np.concatenate([np.array(b.arrays["key"]) for batches in run_of(cache, plan) for b in batches])
    assert len(np.unique(keys, axis=0)) == 128


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_captions_are_dropped_at_the_asked_rate(cache, share):
    plan = Plan(samples=2000, batch_size=50, accumulation=1)
    batches = [batch for batches in run_of(cache, plan, caption_dropout=share) for batch in batches]
    rows = np.concatenate([np.array(batch.arrays["conditioning.embedding"])[:, 0] for batch in batches])
    assert abs((rows == data.EMPTY).mean() - share) < 0.03
    if share == 0:
        assert (rows != data.EMPTY).all()
