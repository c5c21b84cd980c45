"""DreamBench (Ruiz et al. 2023, section 4): DINO, CLIP-I, CLIP-T, PRES and DIV on 25 prompts for objects or pets.

The prompts are those of ``dataset/prompts_and_classes.txt`` in github.com/google/dreambooth, licence CC-BY-4.0. The
paper draws 4 images of each, and leaves open what PRES is drawn with: here the class prompt, 16 images. CLIP-T compares
with the prompt without the identifier, which CLIP does not know.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae_train.evaluation import metrics, score
from mflux_vae_train.evaluation.clip import Clip
from mflux_vae_train.evaluation.dino import Dino
from mflux_vae_train.evaluation.evaluator import Features, Measure, Prompt, Subject, of_kind
from mflux_vae_train.evaluation.score import Score
from mflux_vae_train.fingerprint import weights_hash

logger = logging.getLogger(__name__)

_PLACES = (
    *("in the jungle", "in the snow", "on the beach", "on a cobblestone street", "on top of pink fabric"),
    *("on top of a wooden floor", "with a city in the background", "with a mountain in the background"),
    *("with a blue house in the background", "on top of a purple rug in a forest"),
)
_OF_OBJECTS = (
    *("with a wheat field in the background", "with a tree and autumn leaves in the background"),
    *("with the Eiffel Tower in the background", "floating on top of water", "floating in an ocean of milk"),
    *("on top of green grass with sunflowers around it", "on top of a mirror"),
    *("on top of the sidewalk in a crowded street", "on top of a dirt road", "on top of a white rug"),
)
_OF_PETS = (
    *("wearing a red hat", "wearing a santa hat", "wearing a rainbow scarf"),
    *("wearing a black top hat and a monocle", "in a chef outfit", "in a firefighter outfit", "in a police outfit"),
    *("wearing pink glasses", "wearing a yellow shirt", "in a purple wizard outfit"),
)
_LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")

QUICK = 5
"""Every fifth prompt is drawn for a quick evaluation."""

LIVE = frozenset(
    """
    animal baby bear bird boy bunny cat child cow dog elephant face fish fox girl goat guinea guy hamster horse human
    kid kitten lady lion man monkey mouse owl panda parrot penguin people person pet pig pony pug puppy rabbit sheep
    tiger turtle wolf woman
    """.split()
)
"""Nouns of animals and persons. "stuffed animal" and "bear toy" are objects."""


def templates(live: bool) -> list[str]:
    """The 25 prompts with {} for the subject.

    >>> templates(True)[10], templates(False)[20]
    ('a {} wearing a red hat', 'a red {}')
    """
    return [
        *(f"a {{}} {place}" for place in (*_PLACES, *(_OF_PETS if live else _OF_OBJECTS))),
        *(f"a {look} {{}}" for look in _LOOKS),
    ]


def is_live(noun: str) -> bool:
    """Whether a noun names an animal or a person."""
    words = noun.lower().split()
    return words[-1] in LIVE and not {"stuffed", "toy", "plush"} & {*words}


class DreamBench:
    """
    Args:
        load: the networks, called when the first image is measured: until then they take no memory.
        diverse: whether there is LPIPS, for DIV.
    """

    name = "DreamBench (DINO ViT-S/16, CLIP ViT-B/32)"

    def __init__(self, load: Callable[[], tuple[Dino, Clip, LPIPS | None]], *, diverse: bool) -> None:
        self._load = load
        self.measures: Sequence[Measure] = (
            Measure(
                name="subject_fidelity",
                heading="DINO",
                text="mean cosine of all drawn images of the subject and its real ones, in [-1, 1], higher is better",
                role="gained",
            ),
            Measure(name="image_fidelity", heading="CLIP-I", text="the same with CLIP's features", role="shown"),
            Measure(
                name="prompt_fidelity",
                heading="CLIP-T",
                text="mean cosine of images and prompts, in [-1, 1], higher is better",
                role="kept",
            ),
            Measure(
                name="prior_preservation",
                heading="PRES",
                text="mean cosine (DINO) of drawn images of the class and real ones of the subject, lower is better",
                role="kept",
                worst=1.0,
            ),
            *(
                [
                    Measure(
                        name="diversity",
                        heading="DIV",
                        text="mean LPIPS of two images of one prompt, at least 0, higher is better",
                        role="shown",
                    )
                ]
                if diverse
                else []
            ),
        )

    @classmethod
    def from_pretrained(cls, dino: str, clip: str, lpips: Sequence[str] | None = None) -> DreamBench:
        """Check that the networks can be loaded, downloading what is missing.

        Args:
            dino, clip: folder or `owner/name`.
            lpips: files for `LPIPS.from_files`.

        Raises:
            SettingsError, WeightsError: a network is missing and cannot be downloaded, or its files are broken.
        """

        def load() -> tuple[Dino, Clip, LPIPS | None]:
            return (
                Dino.from_pretrained(dino),
                Clip.from_pretrained(clip),
                LPIPS.from_files(*lpips) if lpips else None,
            )

        for flag, source, network in (("--dino", dino, Dino), ("--clip", clip, Clip)):
            try:
                network.from_pretrained(source)
            except (SettingsError, WeightsError) as error:
                raise type(error)(f"{flag} {error}") from error
        if lpips:
            LPIPS.from_files(*lpips)
        else:
            logger.warning("DIV (diversity) is left out: it needs LPIPS; give its files by --lpips")
        return cls(load, diverse=bool(lpips))

    @cached_property
    def _networks(self) -> tuple[Dino, Clip, LPIPS | None]:
        return self._load()

    @property
    def fingerprint(self) -> str:
        return " ".join(["DreamBench 1", *(weights_hash(one) for one in self._networks if one is not None)])

    def prompts(self, subject: Subject, *, images: int, quick: bool) -> Sequence[Prompt]:
        """`images` of each prompt, and four times as many of the class prompt.

        Raises:
            SettingsError: LPIPS compares images of one prompt, and there is one.
        """
        if images < 2 and any(measure.name == "diversity" for measure in self.measures):
            raise SettingsError("--lpips compares images of one prompt; give --images 2 or more")
        live = is_live(subject.noun) if subject.live is None else subject.live
        texts = [template.format(subject.phrase) for template in templates(live)[:: QUICK if quick else 1]]
        return [
            *(Prompt(text=text, count=images, kind="subject") for text in texts),
            Prompt(text=subject.class_prompt, count=4 * images, kind="class"),
        ]

    def features(self, subject: Subject, prompts: Sequence[Prompt], images: Sequence[np.ndarray]) -> Features:
        _, clip, lpips = self._networks
        of_subject = [prompt for prompt in prompts if prompt.kind == "subject"]
        texts = clip.text_features([_without_identifier(prompt.text, subject) for prompt in of_subject])
        features = {**self._of_images(images), "texts": texts}
        if lpips is not None:
            rows = of_kind(prompts, "subject").reshape(len(of_subject), -1)
            groups = [[images[i] for i in row] for row in rows]
            features["distances"] = np.stack([metrics.lpips_distances(group, lpips) for group in groups])
        return features

    def reference(self, subject: Subject) -> Features:
        return self._of_images(subject.images)

    def _of_images(self, images: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        dino, clip, _ = self._networks
        return {"dino": dino.features(images), "clip": clip.image_features(images)}

    def scores(
        self, subject: Subject, prompts: Sequence[Prompt], features: Features, reference: Features
    ) -> Mapping[str, Score]:
        named, of_class = of_kind(prompts, "subject"), of_kind(prompts, "class")
        groups = np.repeat(np.arange(len(features["texts"])), len(named) // len(features["texts"]))

        def similar(network: str, indices: np.ndarray) -> np.ndarray:
            return metrics.subject_fidelity(features[network][indices], reference[network])

        fitting = metrics.prompt_fidelity(features["clip"][named], features["texts"][groups])
        scores = {
            "subject_fidelity": score.mean(similar("dino", named), groups),
            "image_fidelity": score.mean(similar("clip", named), groups),
            "prompt_fidelity": score.mean(fitting, groups),
            "prior_preservation": score.mean(similar("dino", of_class)),
        }
        if "distances" in features:
            scores["diversity"] = score.average([score.pair_mean(each) for each in features["distances"]])
        return scores

    def goals(self, reference: Features) -> Mapping[str, float]:
        """Mean cosine of two different real images; 1 if there is only one."""
        cosines = reference["dino"] @ reference["dino"].T
        return {"subject_fidelity": score.pair_mean(cosines).value if len(cosines) > 1 else 1.0}


def _without_identifier(text: str, subject: Subject) -> str:
    """ "a sks elephant in the snow" -> "an elephant in the snow"."""
    article = "an" if subject.noun[0].lower() in "aeiou" else "a"
    return text.replace(f"a {subject.phrase}", f"{article} {subject.noun}").replace(subject.phrase, subject.noun)
