"""The checker reads the world's own pictures, degraded ones too, and no shape where there is none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mflux_vae.errors import ImageError
from mflux_vae_train.tiny_world import checker, world
from mflux_vae_train.tiny_world.textures import BACKGROUNDS
from mflux_vae_train.tiny_world.world import Scene


def _degraded(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurred, noisy and compressed: worse than a good autoencoder makes it."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7))
    noisy = np.asarray(blurred, np.float32) + rng.normal(0, 6, image.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """All (shape, colour) pairs, unseen ones included, on changing backgrounds; individuals; backgrounds."""
    rng = np.random.default_rng(0)
    prompts = world.evaluation_prompts(True)[::3] + world.evaluation_prompts(False)
    plain = [world.place(scene, rng) for _, scene in prompts]
    subjects = [scene for subject in world.SUBJECTS for scene in world.subject_scenes(subject, 12)]
    mixed = [world.training_scene(11, index)[1] for index in range(200)]
    return plain + subjects + mixed


def test_reads_rendered_scenes(scenes: list[Scene]) -> None:
    right = [checker.shows(checker.read(world.render(scene)), scene) for scene in scenes]
    assert np.mean(right) >= 0.99


def test_reads_degraded_images(scenes: list[Scene]) -> None:
    rng = np.random.default_rng(1)
    right = [checker.shows(checker.read(_degraded(world.render(scene), rng)), scene) for scene in scenes]
    assert np.mean(right) >= 0.98


def test_reads_larger_images(scenes: list[Scene]) -> None:
    right = [checker.shows(checker.read(world.render(scene, 128)), scene) for scene in scenes[::4]]
    assert np.mean(right) >= 0.99


def test_distinguishes_the_subject_from_its_class() -> None:
    rng = np.random.default_rng(2)
    for subject in world.SUBJECTS:
        images = world.subject_images(subject, 6, seed=4)
        looks = subject.shape, subject.colour, subject.core
        assert all(checker.read(image).looks == looks for image in images)
        for colour, core in ((subject.colour, None), (subject.core, subject.colour), (subject.core, None)):
            other = Scene(shape=subject.shape, colour=colour, core=core, background="sand")
            reading = checker.read(world.render(world.place(other, rng)))
            assert reading.looks != looks and reading.shape == subject.shape


def test_shows_checks_the_whole_scene() -> None:
    scene = Scene(shape="heart", colour="blue", background="sand")
    reading = checker.read(world.render(scene))
    assert checker.shows(reading, scene)
    for wrong in (
        Scene(shape="star", colour="blue", background="sand"),
        Scene(shape="heart", colour="red", background="sand"),
        Scene(shape="heart", colour="blue", background="snow"),
        Scene(shape="heart", colour="blue", background="sand", core="white"),
        Scene(shape=None, colour=None, background="sand"),
    ):
        assert not checker.shows(reading, wrong)


def test_backgrounds_alone_have_no_shape() -> None:
    for background in BACKGROUNDS:
        for seed in range(10):
            scene = Scene(shape=None, colour=None, background=background, texture_seed=seed)
            assert checker.shows(checker.read(world.render(scene)), scene)


def test_noise_has_no_shape() -> None:
    rng = np.random.default_rng(3)
    garbage: list[np.ndarray] = [rng.integers(0, 256, (64, 64, 3)) for _ in range(20)]
    garbage += [rng.normal(128, 20, (64, 64, 3)) for _ in range(20)]
    garbage += [rng.integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1) for _ in range(20)]
    garbage += [np.full((64, 64, 3), value) for value in (0, 128, 255)]
    garbage += [np.broadcast_to(colour, (64, 64, 3)) for colour in world.COLOURS.values()]
    for image in garbage:
        assert checker.read(np.clip(image, 0, 255).astype(np.uint8)).shape is None


@pytest.mark.parametrize("shape", world.SHAPES)
def test_distorted_shapes_are_not_recognised(shape: str) -> None:
    scene = Scene(shape=shape, colour="white", background="brick")
    image = world.render(scene)
    empty = world.render(Scene(shape=None, colour=None, background="brick"))
    halved, doubled, striped = image.copy(), image.copy(), image.copy()
    halved[32:] = empty[32:]
    doubled[:, 28:] = image[:, :36]
    striped[::4], striped[1::4] = empty[::4], empty[1::4]
    for distorted in (halved, doubled, striped):
        assert checker.read(distorted).shape != shape


def test_a_shape_of_many_colours_has_no_colour() -> None:
    scene = Scene(shape="square", colour="red", background="night")
    image = world.render(scene)
    other = world.render(Scene(shape="square", colour="yellow", background="night"))
    image[:, 32:] = other[:, 32:]
    assert checker.read(image).colour is None


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.float32),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((64, 80, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
    ],
)
def test_invalid_images_raise(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="uint8"):
        checker.read(image)
