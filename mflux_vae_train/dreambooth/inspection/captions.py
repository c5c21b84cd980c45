"""What captions lack: the identifier, the class word, a difference to other captions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mflux_vae.utils.formatting import count_text, first_names, shortened
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data.dataset import InstanceImage
from mflux_vae_train.dreambooth.data.identifier import identifier_of, split_words
from mflux_vae_train.dreambooth.data.placeholders import contains
from mflux_vae_train.dreambooth.planning.class_prompt import FUNCTION_WORDS


def caption_remarks(concept: Concept, images: Sequence[InstanceImage]) -> tuple[Mapping[int, list[str]], list[str]]:
    """Remarks by index of the image, and warnings.

    Args:
        images: of this concept.
    """
    prompt = concept.instance_prompt
    identifier = identifier_of(prompt, concept.class_prompt)
    nouns = class_words(prompt, identifier)
    remarks: dict[int, list[str]] = defaultdict(list)
    without, same = [], defaultdict(list)
    for index, image in enumerate(images):
        if image.caption == prompt:
            continue
        same[image.caption].append(image.path.name)
        if identifier and not contains(image.caption, identifier):
            remarks[index].append(f"no {identifier!r} in caption")
        if nouns and not any(_names(image.caption, noun) for noun in nouns):
            remarks[index].append(f"no {nouns[-1]!r} in caption")
            without.append(image.path.name)
    lines = []
    if without:
        listed = f"{len(without)} of {count_text(sum(map(len, same.values())), 'caption')} ({first_names(without)})"
        lines.append(
            f"the class word {nouns[-1]!r} is missing in {listed}: write '{identifier or ''} {' '.join(nouns)}' there,"
            " so that the model starts from what it knows"
        )
    for caption, names in same.items():
        if len(names) > 1:
            lines.append(
                f"{len(names)} captions are equal ({first_names(names)}): {shortened(repr(caption), 80)}; describe what"
                " differs, such as place and pose"
            )
    return remarks, lines


def class_words(prompt: str, identifier: str | None) -> list[str]:
    """The words after the identifier that name the class: "toy robot" of "a photo of sks toy robot on a table"."""
    words = split_words(prompt)
    places = [index for index, word in enumerate(words) if identifier and word.strip(".,;:!?\"'()") == identifier]
    found: list[str] = []
    for word in words[places[0] + 1 :] if places else ():
        bare = word.rstrip(",.;:!?").lower()
        if bare in FUNCTION_WORDS or not re.fullmatch(r"[\w-]+", bare):
            break
        found.append(bare)
        if bare != word.lower():
            break
    return found


def _names(caption: str, noun: str) -> bool:
    """Whether a noun is among the words of a caption, as singular or plural."""
    stem = re.escape(noun.removesuffix("s"))
    return bool(re.search(rf"\b{stem}(s|es)?\b", caption, re.IGNORECASE))
