"""The procedural world: pure functions of their seeds, honest captions, and nothing of what is kept out."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from mflux_vae_train.tiny_world import world
from mflux_vae_train.tiny_world.shapes import CORE_RADIUS, DISTANCES, coordinates
from mflux_vae_train.tiny_world.textures import BACKGROUNDS
from mflux_vae_train.tiny_world.words import EXTRA_WORDS, NAMES
from mflux_vae_train.tiny_world.world import Scene

EXAMPLES = 6000


@pytest.fixture(scope="module")
def training() -> list[tuple[str, Scene]]:
    return [world.training_scene(3, index) for index in range(EXAMPLES)]


def _kind(caption: str, scene: Scene) -> str:
    words = caption.split()
    if scene.core is not None:
        return "individual"
    if scene.shape is None:
        return "background"
    return "full" if scene.colour in words and scene.background in words else "open"


def test_an_example_is_a_function_of_seed_and_index() -> None:
    image, caption, scene = world.training_example(5, 17)
    again, *rest = world.training_example(5, 17)
    assert np.array_equal(image, again)
    assert rest == [caption, scene] == list(world.training_scene(5, 17))
    assert world.training_scene(5, 18)[1] != scene != world.training_scene(6, 17)[1]


def test_rendering_does_not_change_textures() -> None:
    alone = Scene(shape=None, colour=None, background="sand")
    before = world.render(alone)
    world.render(Scene(shape="star", colour="red", background="sand", core="white"))
    assert np.array_equal(world.render(alone), before)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_scene_is_independent_of_image_size(background: str) -> None:
    rng = np.random.default_rng(1)
    for shape in world.SHAPES:
        core = "white" if shape in world.INDIVIDUAL_SHAPES else None
        scene = world.place(Scene(shape=shape, colour="blue", background=background, core=core), rng)
        small, large = world.render(scene, 64), world.render(scene, 128).astype(np.float64)
        shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.sqrt(np.mean((small - shrunk) ** 2)) < 5


def test_held_out_pairs_and_subjects_are_not_in_training(training: list[tuple[str, Scene]]) -> None:
    scenes = [scene for _, scene in training]
    assert not world.UNSEEN_PAIRS & {(scene.shape, scene.colour) for scene in scenes}
    pairs = {(scene.colour, scene.core) for scene in scenes if scene.core is not None}
    assert not pairs & {(subject.colour, subject.core) for subject in world.SUBJECTS}


def test_all_other_combinations_are_in_training(training: list[tuple[str, Scene]]) -> None:
    plain = {(s.shape, s.colour, s.background) for _, s in training if s.shape is not None and s.core is None}
    assert len(plain) == (8 * 8 - 8) * 6
    individuals = [scene for _, scene in training if scene.core is not None]
    assert {scene.shape for scene in individuals} == set(world.INDIVIDUAL_SHAPES)
    # 8 x 7 ordered pairs, less blue with purple in both orders, less the subjects'
    assert len({(scene.colour, scene.core) for scene in individuals}) == 8 * 7 - 2 - len(world.SUBJECTS)


def test_held_out_pairs_use_each_shape_and_colour_once() -> None:
    shapes, colours = zip(*world.UNSEEN_PAIRS, strict=True)
    assert sorted(shapes) == sorted(world.SHAPES) and sorted(colours) == sorted(world.COLOURS)


def test_subjects_are_new_individuals_of_known_classes() -> None:
    subjects = world.SUBJECTS
    for field in ("name", "shape", "colour"):
        assert len({getattr(subject, field) for subject in subjects}) == len(subjects)
    for subject in subjects:
        assert subject.name in NAMES and subject.shape in world.INDIVIDUAL_SHAPES
        assert subject.colour != subject.core and {subject.colour, subject.core} != {"blue", "purple"}
        assert (subject.shape, subject.colour) not in world.UNSEEN_PAIRS


def test_subject_images_vary_and_repeat_by_seed() -> None:
    subject = world.SUBJECTS[0]
    scenes = world.subject_scenes(subject, 6, seed=2)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert len({(scene.x, scene.y, scene.radius) for scene in scenes}) == 6
    images = world.subject_images(subject, 6, size=96, seed=2)
    assert all(image.shape == (96, 96, 3) and image.dtype == np.uint8 for image in images)
    assert np.array_equal(images, [world.render(scene, 96) for scene in world.subject_scenes(subject, 6, seed=2)])
    assert scenes != world.subject_scenes(subject, 6, seed=3)


@pytest.mark.parametrize("shape", world.INDIVIDUAL_SHAPES)
def test_cores_lie_inside_their_shapes(shape: str) -> None:
    u, v = coordinates(128, 0.5, 0.5, min(world.RADII))
    core = np.hypot(u, v) < CORE_RADIUS
    assert DISTANCES[shape](u, v)[core].max() < 0


@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_stay_in_the_image(shape: str) -> None:
    jitter, radius = world.POSITION_JITTER, max(world.RADII)
    for x in (0.5 - jitter, 0.5 + jitter):
        inside = DISTANCES[shape](*coordinates(128, x, x, radius)) < 0
        assert not (inside[[0, -1]].any() or inside[:, [0, -1]].any())


def test_captions_use_exactly_the_vocabulary(training: list[tuple[str, Scene]]) -> None:
    used = Counter(word for caption, _ in training for word in caption.split())
    assert set(used) == set(world.WORDS)
    assert list(world.WORDS) == sorted(set(world.WORDS))
    assert list(EXTRA_WORDS) == sorted(set(EXTRA_WORDS))
    assert not set(world.WORDS) & set(EXTRA_WORDS)
    assert max(len(caption.split()) for caption, _ in training) <= 12


def test_captions_are_true(training: list[tuple[str, Scene]]) -> None:
    for caption, scene in training:
        for words, truth in (
            (world.SHAPES, scene.shape),
            (world.COLOURS, scene.colour),
            (BACKGROUNDS, scene.background),
        ):
            assert set(caption.split()) & set(words) <= {truth}
        assert bool(set(caption.split()) & set(NAMES)) == (scene.core is not None)


def test_caption_kinds_have_their_shares(training: list[tuple[str, Scene]]) -> None:
    shares = Counter(_kind(caption, scene) for caption, scene in training)
    for kind, share in world.CAPTION_SHARES.items():
        sigma = np.sqrt(share * (1 - share) / EXAMPLES)
        assert abs(shares[kind] / EXAMPLES - share) < 4 * sigma


def test_articles_fit_the_word_after_them(training: list[tuple[str, Scene]]) -> None:
    prompts = [caption for caption, _ in training] + [prompt for prompt, _ in world.evaluation_prompts(True)]
    for prompt in prompts:
        words = prompt.split()
        for word, following in itertools.pairwise(words):
            if word in ("a", "an"):
                assert (word == "an") == (following[0] in "aeiou"), prompt
    assert any("an orange" in prompt for prompt in prompts)


def test_evaluation_prompts_split_all_combinations() -> None:
    seen, unseen = world.evaluation_prompts(True), world.evaluation_prompts(False)
    assert (len(seen), len(unseen)) == (56 * 6, 8 * 6)
    assert len({prompt for prompt, _ in seen + unseen}) == 8 * 8 * 6
    assert {(scene.shape, scene.colour) for _, scene in unseen} == world.UNSEEN_PAIRS
    for prompt, scene in seen + unseen:
        assert {scene.shape, scene.colour, scene.background} <= set(prompt.split()) <= set(world.WORDS)
