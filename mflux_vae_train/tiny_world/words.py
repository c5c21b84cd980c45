"""Phrasing of captions: openings, articles and places; names and other words without an image."""

from __future__ import annotations

import numpy as np

NAMES = tuple(
    """
    sks xyz ohwx zwx brax vlorp quib mivu tazik plen dorvo krusk
    jebo fynd glaf wuzo nexo hobri pazu snerl vixa thrun bolu cravi
    """.split()
)
"""Rare words for individuals. Each training example draws which individual a name means."""

EXTRA_WORDS = tuple(
    sorted(
        """
        and animal around at autumn background backpack bag beach bear berry big black boot bowl brown can
        candle car cartoon cat chef city clock cobblestone colorful crowded cube cup dirt dog drawing duck
        eiffel emoji fabric field firefighter flat floating floor flower forest glasses gray grey hat
        house image it jungle leaves milk mirror monocle monster mountain my new next ocean old outfit
        painting plate plushie police poop rainbow road robot rug santa scarf shaped shiny shirt shoe
        sidewalk sky sloth small sneaker street stuffed sunflowers sunglasses table teapot this to top
        tower toy tree under vase water wearing wet wheat with wizard wolf wooden
        """.split()
    )
)
"""Ordinary words of DreamBooth prompts that are in the vocabulary and in no training caption."""

FUNCTION_WORDS = ("a", "an", "photo", "picture", "of", "on", "in", "the")

_OPENINGS = ("a photo of", "a picture of", "")
_OPENING_SHARES = (0.5, 0.2, 0.3)
_NEVER_IN = ("brick",)  # "in the grass" is English, "in the brick" is not


def article(word: str) -> str:
    """The indefinite article before a word, by its first letter."""
    return "an" if word[0] in "aeiou" else "a"


def phrase(noun: str | None, background: str | None, rng: np.random.Generator, *, articles: bool = True) -> str:
    """A caption for a noun ("red star"), a background, or both, with a random opening.

    "a photo of a red star on grass", "a picture of sand", "a heart in the snow". At most 12 words.
    """
    words = [_OPENINGS[int(rng.choice(len(_OPENINGS), p=_OPENING_SHARES))]]
    if noun is None:
        words.append(background or "")
    else:
        words += [article(noun), noun] if articles else [noun]
        if background is not None:
            words.append(_where(background, rng))
    return " ".join(word for word in words if word)


def _where(background: str, rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.8:
        return f"on {background}"
    return f"in the {background}" if draw < 0.9 and background not in _NEVER_IN else f"on the {background}"
