"""Sample images for prompts, and measure with the checker how many show what the prompts say.

`CheckerEvaluator` judges adapters of the embedded pipelines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import covered, to_pictures
from mflux_vae_train.evaluation import score
from mflux_vae_train.evaluation.evaluator import Features, Measure, Prompt, Subject, of_kind
from mflux_vae_train.evaluation.score import Score
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.tiny_world.checker import SIDE, Reading, read, shows
from mflux_vae_train.tiny_world.textures import BACKGROUNDS
from mflux_vae_train.tiny_world.world import COLOURS, SHAPES, Scene, evaluation_prompts

BATCH = 48

OTHER_PROMPTS, OTHER_PROMPTS_SEED = 96, 1234


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Fractions of images with the right shape, colour, background, and with all of these."""

    shape: float
    colour: float
    background: float
    all: float
    count: int


def sample_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    guidance: float | None = None,
    steps: int | None = None,
) -> np.ndarray:
    """One image per prompt, uint8 (N, H, W, 3). Guidance and steps default to the recommended ones."""
    recommended = pipeline.recommended
    size = (recommended.resolution, recommended.resolution)
    sampled = []
    for start in range(0, len(prompts), BATCH):
        chunk = list(prompts[start : start + BATCH])
        images = pipeline.sample(
            pipeline.encode_prompts(chunk),
            size=size,
            steps=steps or recommended.steps,
            guidance=recommended.guidance if guidance is None else guidance,
            key=sample_keys(seed, Stream.EVALUATION, 0, range(start, start + len(chunk))),
        )
        sampled.append(to_pictures(np.array(images)))
    return np.concatenate(sampled)


def accuracy(images: np.ndarray, truths: Sequence[Scene]) -> Accuracy:
    """Compare images with the scenes of their prompts."""
    readings = [read(image) for image in images]
    return Accuracy(
        shape=_fraction(r.shape == t.shape for r, t in zip(readings, truths, strict=True)),
        colour=_fraction(r.colour == t.colour for r, t in zip(readings, truths, strict=True)),
        background=_fraction(r.background == t.background for r, t in zip(readings, truths, strict=True)),
        all=_fraction(shows(r, t) for r, t in zip(readings, truths, strict=True)),
        count=len(truths),
    )


def other_prompts(shape: str) -> list[tuple[str, Scene]]:
    """`OTHER_PROMPTS` prompts of the world with other shapes, and their scenes."""
    others = [(prompt, scene) for prompt, scene in evaluation_prompts(True) if scene.shape != shape]
    chosen = np.random.default_rng(OTHER_PROMPTS_SEED).choice(len(others), OTHER_PROMPTS, replace=False)
    return [others[index] for index in chosen]


def distances(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """RMS distance of every two images (N, N), in units of the full range."""
    flat = np.asarray(images).reshape(len(images), -1).astype(np.float64) / 255
    return np.sqrt(np.square(flat[:, None] - flat[None]).mean(axis=2))


class CheckerEvaluator:
    """Judges adapters of the embedded pipelines without a network: the checker reads what each image shows.

    The subject is the shape, colour and core that most instance images show.
    """

    name = "checker of the embedded pipelines"
    fingerprint = "checker 1"
    measures = (
        Measure(
            name="subject_fidelity",
            heading="subject",
            text="share of images of the instance prompt that show the subject, in [0, 1]",
            role="gained",
        ),
        Measure(
            name="prompt_fidelity",
            heading="prompts",
            text="share of images of other prompts with the right shape, colour and background, in [0, 1]",
            role="kept",
        ),
        Measure(
            name="prior_preservation",
            heading="class",
            text="share of images of the class prompt that show it in other colours than the subject's, in [0, 1]",
            role="kept",
        ),
        Measure(
            name="diversity",
            heading="diversity",
            text="mean RMS distance of two images of the class prompt, in [0, 1]",
            role="kept",
        ),
    )

    def prompts(self, subject: Subject, *, images: int, quick: bool) -> Sequence[Prompt]:
        """8 images of instance and class prompt for each one in `images`, and other prompts; `quick`: a quarter.

        Raises:
            SettingsError: the class is not a shape of the world.
            ImageError: most instance images do not show a shape.
        """
        if subject.noun not in SHAPES:
            raise SettingsError(
                f"the checker knows {', '.join(SHAPES)}, not {subject.noun!r}; give --class_noun, or --dino and --clip"
            )
        _subject(self.reference(subject)["readings"])
        part = 4 if quick else 1
        count = max(2, 8 * images // part)
        others = [prompt for prompt, _ in other_prompts(subject.noun)][: OTHER_PROMPTS // part]
        return [
            Prompt(text=subject.instance_prompt, count=count, kind="subject"),
            Prompt(text=subject.class_prompt, count=count, kind="class"),
            *(Prompt(text=text, count=max(1, images // 4), kind="other") for text in others),
        ]

    def features(self, subject: Subject, prompts: Sequence[Prompt], images: Sequence[np.ndarray]) -> Features:
        """The readings of all images, and `distances` of those of the class prompt."""
        of_class = [images[index] for index in of_kind(prompts, "class")]
        return {"readings": _readings(images), "distances": distances(of_class)}

    def reference(self, subject: Subject) -> Features:
        sides = [max(SIDE, min(image.shape[:2])) for image in subject.images]
        squares = [covered(image, (side, side)) for image, side in zip(subject.images, sides, strict=True)]
        return {"readings": _readings(squares)}

    def scores(
        self, subject: Subject, prompts: Sequence[Prompt], features: Features, reference: Features
    ) -> Mapping[str, Score]:
        readings = _decoded(features["readings"])
        named, of_class, other = (
            [readings[index] for index in of_kind(prompts, kind)] for kind in ("subject", "class", "other")
        )
        looks, shape = _subject(reference["readings"]), subject.noun
        truths = dict(other_prompts(shape))
        scenes = [truths[prompt.text] for prompt in prompts if prompt.kind == "other" for _ in range(prompt.count)]
        return {
            "subject_fidelity": score.share([one.looks == looks for one in named]),
            "prompt_fidelity": score.share([shows(*pair) for pair in zip(other, scenes, strict=True)]),
            "prior_preservation": score.share([one.shape == shape and one.colour != looks[1] for one in of_class]),
            "diversity": score.pair_mean(features["distances"]),
        }

    def goals(self, reference: Features) -> Mapping[str, float]:
        return {"subject_fidelity": 1.0}


def _subject(readings: np.ndarray) -> tuple[str | None, str | None, str | None]:
    """Shape, colour and core that most instance images show.

    Raises:
        ImageError: most show no shape of the world.
    """
    ((looks, _),) = Counter(reading.looks for reading in _decoded(readings)).most_common(1)
    if None in looks[:2]:
        raise ImageError("the checker finds no shape in most instance images; give --dino and --clip for photographs")
    return looks


_WORDS = (SHAPES, tuple(COLOURS), tuple(COLOURS), BACKGROUNDS)
"""Values of the fields of a `Reading`, without the overlap."""


def _readings(images: Iterable[np.ndarray]) -> np.ndarray:
    """Indices of shape, colour, core and background of each image in `_WORDS`, -1 for none: int32 (N, 4)."""
    rows = [astuple(read(image))[:4] for image in images]
    codes = [
        [-1 if word is None else words.index(word) for word, words in zip(row, _WORDS, strict=True)] for row in rows
    ]
    return np.array(codes, np.int32).reshape(-1, 4)


def _decoded(codes: np.ndarray) -> list[Reading]:
    rows = [[None if code < 0 else words[code] for code, words in zip(row, _WORDS, strict=True)] for row in codes]
    return [Reading(shape=a, colour=b, core=c, background=d) for a, b, c, d in rows]


def _fraction(hits: Iterable[bool]) -> float:
    return float(np.mean(list(hits)))
