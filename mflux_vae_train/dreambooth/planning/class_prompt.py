"""Derive the class prompt from an instance prompt: "a photo of sks dog" -> "a photo of a dog".

The rule is narrow on purpose; other prompts need ``--class_prompt``. The instance prompt contains exactly one
*identifier*, a meaningless word for the subject, directly before a *class word*. The class prompt is the instance
prompt without the identifier, with an article if needed.

- An identifier is a word that `identifier.find_identifiers` recognises.
- A class word consists of letters and hyphens, is in the same phrase (no comma before it), and is neither a function
  word (``on``, ``is``, ``style``) nor a participle (``running``).
"""

from __future__ import annotations

import re

from mflux_vae.utils.formatting import first_few, shortened
from mflux_vae_train.dreambooth.data.identifier import find_identifiers, is_identifier, split_words, word_set

FUNCTION_WORDS = word_set(
    "a about above across after against along among an and are around as at be behind being below beneath"
    " beside between beyond but by can character concept do does down during for from had has have he her his i"
    " if in inside into is it its like my near of off on onto or our out outside over person's s she so some"
    " style than that the their them then there these they this those through thing to toward towards under"
    " until up upon was we were what when where which while who wearing will with within without you your"
)

NOUNS_IN_ING = word_set("building drawing duckling earring king painting ring sapling sibling string wing")

DETERMINERS = word_set("a an the my your his her our their this that one")
PREPOSITIONS = word_set("at beside by for from in like near of on under with")


def derive_class_prompt(instance_prompt: str) -> tuple[str | None, str]:
    """
    Returns:
        class prompt and how it was derived; or None and the reason.

    >>> derive_class_prompt("a photo of sks dog")[0]
    'a photo of a dog'
    """
    shown = shortened(repr(instance_prompt), 120)
    words = split_words(instance_prompt)
    positions = find_identifiers(words)
    if not positions:
        return None, f"no identifier such as 'sks' found in {shown}"
    if len(positions) > 1:
        found = first_few([words[index] for index in positions])
        return None, f"{shown} contains several words that may be the identifier ({found})"
    position = positions[0]
    before, identifier, after = words[:position], words[position], words[position + 1 :]
    if not after or not _names_a_class(*after[:2]) or identifier[-1] in ",.;:":
        return None, f"no class word follows the identifier {identifier!r} in {shown}"
    noun = after[0].rstrip(",.;:!?")
    if before and before[-1].lower() in DETERMINERS:
        before = [*before[:-1], *_article(noun)]
    elif not before or before[-1].lower() in PREPOSITIONS or before[-1][-1] in ",;:":
        before = [*before, *_article(noun)]
    return " ".join([*before, *after]), f"the instance prompt without {identifier!r}"


def name_subject(instance_prompt: str) -> tuple[str, str] | None:
    """How a prompt names the subject, and its class: None without exactly one identifier before a class word.

    >>> name_subject("a photo of sks stuffed animal on a beach")
    ('sks stuffed animal', 'stuffed animal')
    """
    words = split_words(instance_prompt)
    positions = find_identifiers(words)
    if len(positions) != 1 or words[positions[0]][-1] in ",.;:":
        return None
    after, nouns = words[positions[0] + 1 :], list[str]()
    while after and _names_a_class(*after[:2]):
        nouns.append(after[0].rstrip(",.;:!?"))
        if nouns[-1] != after.pop(0):
            break
    noun = " ".join(nouns)
    return (f"{words[positions[0]]} {noun}", noun) if nouns else None


def with_article(noun: str) -> str:
    """ "dog" -> "a dog"; a plural stays as it is."""
    return " ".join([*_article(noun), noun])


def _names_a_class(word: str, after: str = "") -> bool:
    noun = word.rstrip(",.;:!?").lower()
    if noun == "can":  # a noun at the end or before a preposition, else a verb
        return not after or noun != word.lower() or after.lower() in PREPOSITIONS
    if not re.fullmatch(r"[a-z]+(-[a-z]+)*", noun) or noun in FUNCTION_WORDS or is_identifier(noun):
        return False
    return not noun.endswith("ing") or noun in NOUNS_IN_ING


def _article(noun: str) -> list[str]:
    """The indefinite article before a singular, none before a plural."""
    noun = noun.lower()
    plural = (noun.endswith("s") and not noun.endswith(("ss", "us", "is", "as"))) or noun in {
        "people",
        "children",
    }
    if plural:
        return []
    consonant_sound = noun.startswith(("uni", "use", "eu", "ewe", "one", "ukulele"))
    vowel_sound = noun.startswith(("hour", "heir", "honest", "honour", "honor"))
    vowel = (noun[0] in "aeiou" and not consonant_sound) or vowel_sound
    return ["an" if vowel else "a"]
