"""Words of captions that other tools replace, such as ``[trigger]``, and captions that lack the identifier."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import count_text, first_names, shortened
from mflux_vae_train.dreambooth.data.captions import Captions
from mflux_vae_train.dreambooth.data.identifier import identifier_of, split_words

_NAMES = "trigger|trigger_?word|name|subject|subject_?name|instance|instance_?token|identifier|token|keyword|concept"
_PLACEHOLDER = re.compile(
    rf"\[({_NAMES})\]|\{{({_NAMES})?\}}|<({_NAMES})>|__({_NAMES})__|%({_NAMES})%|\$({_NAMES})\b", re.IGNORECASE
)
"""Stands for the identifier in ai-toolkit, the web UI, textual inversion and others."""

_FILE_WORDS = re.compile(r"\[(filewords|file_words|caption|filename)\]|\{(filewords|caption|filename)\}", re.IGNORECASE)
"""Stands for the caption of the file."""


def adapt_captions(
    captions: Captions, instance_prompt: str, class_prompt: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """The prompt of each image with placeholders replaced by the identifier of the instance prompt.

    Returns:
        prompt by image name; warnings: which placeholders were replaced, and captions without the identifier.

    Raises:
        SettingsError: a placeholder stands in the instance prompt, stands for something else, or no identifier is
            known.
    """
    replace_placeholders(instance_prompt, None, "--instance_prompt")
    identifier = identifier_of(instance_prompt, class_prompt)
    cure = cure_without_identifier(instance_prompt)
    texts, replaced = dict(captions.texts), defaultdict(list)
    for image in captions.texts:
        if image in captions.captioned:
            texts[image], found = replace_placeholders(texts[image], identifier, f"the caption of {image}", cure)
            for word in found:
                replaced[word].append(image)
    lines = []
    if replaced:
        where = list(dict.fromkeys(image for images in replaced.values() for image in images))
        words = first_names([repr(word) for word in replaced])
        lines.append(
            f"{words} in {count_text(len(where), 'caption')} ({first_names(where)}): replaced by {identifier!r}"
        )
    images = [image for image in texts if image in captions.captioned]
    if identifier and (lacking := [image for image in images if not contains(texts[image], identifier)]):
        others = Counter(other for image in lacking if (other := identifier_of(texts[image])))
        instead = f" (they have {others.most_common(1)[0][0]!r})" if others else ""
        lines.append(
            f"{identifier!r} of --instance_prompt is missing in {len(lacking)} of"
            f" {count_text(len(images), 'caption')} ({first_names(lacking)}): these images do not teach it{instead}"
        )
    return texts, lines


def cure_without_identifier(instance_prompt: str) -> str:
    """What to do about a placeholder if the instance prompt has no identifier."""
    shown = shortened(repr(instance_prompt), 120)
    return (
        f"--instance_prompt {shown} has no identifier to put there: put a rare word such as sks before its class word,"
        " or write the prompt without the placeholder"
    )


def replace_placeholders(
    prompt: str,
    identifier: str | None,
    where: str,
    cure: str = "write the word that names the subject, such as sks, here and in --instance_prompt",
) -> tuple[str, list[str]]:
    """A prompt with placeholders replaced, and the placeholders that it had.

    Args:
        cure: what to do if there is a placeholder and no identifier.

    Raises:
        SettingsError: see `adapt_captions`.
    """
    if match := _FILE_WORDS.search(prompt):
        raise SettingsError(
            f"{where}: {match[0]} is a placeholder of another tool; write the caption of each image into NAME.txt"
        )
    found = list(dict.fromkeys(match[0] for match in _PLACEHOLDER.finditer(prompt)))
    if found and identifier is None:
        raise SettingsError(f"{where}: {found[0]} is a placeholder of another tool; {cure}")
    return _PLACEHOLDER.sub(lambda _: identifier or "", prompt), found


def contains(prompt: str, identifier: str) -> bool:
    """Whether an identifier is among the words of a prompt, in any case."""
    pattern = rf"(?<![^\W_]){re.escape(identifier)}(?![^\W_])"
    return bool(re.search(pattern, " ".join(split_words(prompt)), re.IGNORECASE))
