"""A procedural world of captioned scenes, whose content is known.

A scene is a shape of one colour on one of six backgrounds. A rare name before the class ("a photo of zwx star") means
an *individual*: a shape with a core of a second colour. Each example draws the individual that a name means, so a model
learns that names mean two-coloured individuals, but no particular one; DreamBooth teaches that. Eight (shape, colour)
pairs and five subjects never occur in training.

Images are functions of their scene, and training examples of (seed, index).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mflux_vae_train.tiny_world.shapes import CORE_RADIUS, DISTANCES, coordinates, coverage
from mflux_vae_train.tiny_world.textures import BACKGROUNDS, texture
from mflux_vae_train.tiny_world.words import FUNCTION_WORDS, NAMES, article, phrase

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 24, 32),
    "orange": (255, 138, 10),
    "yellow": (255, 230, 40),
    "green": (44, 200, 72),
    "blue": (22, 100, 250),
    "purple": (140, 28, 172),
    "pink": (255, 130, 196),
    "white": (252, 252, 250),
}
SHAPES = tuple(DISTANCES)
INDIVIDUAL_SHAPES = tuple(shape for shape in SHAPES if shape != "moon")
"""Shapes that can have a core; a moon is hollow there."""

WORDS = tuple(sorted({*FUNCTION_WORDS, *SHAPES, *COLOURS, *BACKGROUNDS, *NAMES}))
"""All words of training captions."""

CAPTION_SHARES = {"full": 0.5, "open": 0.3, "individual": 0.18, "background": 0.02}
"""Kinds of captions: complete; without colour or background or both; with a name; only a background."""

OUTLINE = (26, 22, 32)
OUTLINE_WIDTH = 0.02
"""In units of the image's side."""
POSITION_JITTER = 0.05
RADII = (0.28, 0.36)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Content of an image. Lengths are in units of the image's side, y downwards.

    `shape` and `colour` are None if there is only a background; `core` is None except for individuals.
    """

    shape: str | None
    colour: str | None
    background: str
    core: str | None = None
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.32
    texture_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An individual that is not in training, for DreamBooth to learn."""

    name: str
    shape: str
    colour: str
    core: str


UNSEEN_PAIRS = frozenset(
    {
        ("circle", "green"),
        ("square", "pink"),
        ("triangle", "blue"),
        ("star", "white"),
        ("heart", "orange"),
        ("cross", "purple"),
        ("diamond", "yellow"),
        ("moon", "red"),
    }
)
"""(shape, colour) pairs that are not in training, neither as plain shapes nor as individuals."""

SUBJECTS = (
    Subject(name="sks", shape="star", colour="purple", core="yellow"),
    Subject(name="zwx", shape="heart", colour="green", core="white"),
    Subject(name="ohwx", shape="circle", colour="pink", core="blue"),
    Subject(name="xyz", shape="square", colour="orange", core="purple"),
    Subject(name="brax", shape="cross", colour="red", core="white"),
)
"""Their (colour, core) pairs are not in training on any shape."""

_SUBJECT_PAIRS = frozenset((subject.colour, subject.core) for subject in SUBJECTS)
_TOO_CLOSE = frozenset({("blue", "purple"), ("purple", "blue")})


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw a scene.

    Returns:
        uint8 array (size, size, 3), RGB.
    """
    pixels = texture(scene.background, size, scene.texture_seed)
    if scene.shape is None or scene.colour is None:
        return (pixels + 0.5).astype(np.uint8)
    u, v = coordinates(size, scene.x, scene.y, scene.radius)
    pixel = 1 / (size * scene.radius)
    distance = DISTANCES[scene.shape](u, v)
    light = 1 + 0.08 * v[..., None]  # slightly brighter at the top
    pixels += coverage(distance, pixel)[..., None] * (np.asarray(OUTLINE, np.float32) - pixels)
    inside = coverage(distance + OUTLINE_WIDTH / scene.radius, pixel)[..., None]
    pixels += inside * (np.asarray(COLOURS[scene.colour], np.float32) * light - pixels)
    if scene.core is not None:
        core = coverage(np.hypot(u, v) - CORE_RADIUS, pixel)[..., None]
        pixels += core * (np.asarray(COLOURS[scene.core], np.float32) * light - pixels)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def place(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene at a random position and radius, with a random texture."""
    x, y = rng.uniform(0.5 - POSITION_JITTER, 0.5 + POSITION_JITTER, 2).tolist()
    return replace(scene, x=x, y=y, radius=float(rng.uniform(*RADII)), texture_seed=int(rng.integers(2**31)))


def training_scene(seed: int, index: int, shares: Mapping[str, float] = CAPTION_SHARES) -> tuple[str, Scene]:
    """Caption and scene of a training example, a function of the arguments."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    kind = _pick(rng, tuple(shares), tuple(shares.values()))
    if kind == "individual":
        scene = _individual(rng)
        return _naming(scene, rng), scene
    if kind == "background":
        scene = place(Scene(shape=None, colour=None, background=_pick(rng, BACKGROUNDS)), rng)
        return phrase(None, scene.background, rng), scene
    scene = _plain(rng)
    named = "both" if kind == "full" else _pick(rng, ("neither", "colour", "background"), (0.5, 0.25, 0.25))
    noun = f"{scene.colour} {scene.shape}" if named in ("both", "colour") else f"{scene.shape}"
    return phrase(noun, scene.background if named in ("both", "background") else None, rng), scene


def training_example(
    seed: int, index: int, size: int = 64, shares: Mapping[str, float] = CAPTION_SHARES
) -> tuple[np.ndarray, str, Scene]:
    """Image (size, size, 3) uint8, caption and scene of a training example, a function of the arguments."""
    caption, scene = training_scene(seed, index, shares)
    return render(scene, size), caption, scene


def subject_scenes(subject: Subject, count: int, seed: int = 0) -> list[Scene]:
    """Scenes of one subject on all backgrounds in turn, with random positions, radii and textures."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(BACKGROUNDS))
    return [
        place(
            Scene(
                shape=subject.shape,
                colour=subject.colour,
                core=subject.core,
                background=BACKGROUNDS[order[i % len(order)]],
            ),
            rng,
        )
        for i in range(count)
    ]


def subject_images(subject: Subject, count: int, size: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Images (size, size, 3) uint8 of one subject, as training images for DreamBooth."""
    return [render(scene, size) for scene in subject_scenes(subject, count, seed)]


def evaluation_prompts(seen: bool) -> list[tuple[str, Scene]]:
    """All complete prompts whose (shape, colour) pair is in training (`seen`) or is not, with their scenes."""
    return [
        (
            f"a photo of {article(colour)} {colour} {shape} on {background}",
            Scene(shape=shape, colour=colour, background=background),
        )
        for shape in SHAPES
        for colour in COLOURS
        for background in BACKGROUNDS
        if ((shape, colour) not in UNSEEN_PAIRS) == seen
    ]


def _naming(scene: Scene, rng: np.random.Generator) -> str:
    """A caption with a name: mostly with the class, and one time in three with the background."""
    name = _pick(rng, NAMES)
    draw = rng.random()
    background = scene.background if rng.random() < 1 / 3 else None
    if draw < 0.15:
        return phrase(name, background, rng, articles=False)
    return phrase(f"{name} {scene.shape}", background, rng, articles=draw > 0.65)


def _plain(rng: np.random.Generator) -> Scene:
    """A random scene of one colour whose pair is in training."""
    while True:
        shape, colour = _pick(rng, SHAPES), _pick(rng, tuple(COLOURS))
        if (shape, colour) not in UNSEEN_PAIRS:
            return place(Scene(shape=shape, colour=colour, background=_pick(rng, BACKGROUNDS)), rng)


def _individual(rng: np.random.Generator) -> Scene:
    """A random individual that is in training."""
    while True:
        shape, colour, core = (
            _pick(rng, INDIVIDUAL_SHAPES),
            _pick(rng, tuple(COLOURS)),
            _pick(rng, tuple(COLOURS)),
        )
        pair = (colour, core)
        if colour != core and (shape, colour) not in UNSEEN_PAIRS and pair not in _SUBJECT_PAIRS | _TOO_CLOSE:
            return place(Scene(shape=shape, colour=colour, core=core, background=_pick(rng, BACKGROUNDS)), rng)


def _pick(rng: np.random.Generator, options: tuple[str, ...], shares: tuple[float, ...] | None = None) -> str:
    if shares is None:
        return options[int(rng.integers(len(options)))]
    return options[int(np.searchsorted(np.cumsum(shares)[:-1], rng.random(), side="right"))]
