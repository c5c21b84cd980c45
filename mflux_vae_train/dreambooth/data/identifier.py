"""Recognise the *identifier* in a prompt: the meaningless word for the subject, as "sks" in "a photo of sks dog".

An identifier is a word of `IDENTIFIERS`, words in brackets (``[V]``, ``<new>``, ``<s0><s1>``), a word with a star
(``S*``), or three to five lower-case letters without a vowel (y is a vowel), optionally followed by digits. If a prompt
has none of these, a word in capitals (``TOK``), a capitalized one without a vowel (``Zxq``) or a mix of letters and
digits (``p3rs0n``) is one. `ABBREVIATIONS`, ordinals and numbers with a unit (``35mm``) are not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


IDENTIFIERS = word_set("sks ohwx zwx xyz xjy hta bnha olis ukj")
"""Rare tokens that DreamBooth prompts commonly use, including those that the vowel rule misses."""

ABBREVIATIONS = word_set(
    "bmw brr cctv cgi dslr dvd fps gps hdr hmm html http jpg kbps lcd ltd mph mrs mtv nfl nhl nth pdf phd png"
    " psst pvc rgb rpg rpm shh slr sms svg tsk usb vhs"
)

_CAPITALS = word_set(
    "ac ad ai akc am amd ar asap atv bbc bc bw cd ceo cia cnn cpu cyberpunk dc dhl diy dj dna dnd dof eu ex faq fbi fda"
    " fedex fifa gmc gmo gpu gt hbo hd hq ibm id ikea iq ir iso it jeep jfk jpeg kfc kgb la laser led lego lgbt ma mac"
    " mba mc md mg mgm mit mma mr ms nasa nato nba nbc nsfw nyc ok oled ps pc pm pov pr qr radar raf raw rv scuba sd"
    " sdxl sfw suv swat tif tiff tnt tv ufc ufo uhd uk un unesco us usa usaf uv vip vr vw wifi ww wwe"
    " all art big black blue cat cute dark dog girl good great green high hot huge large little man neon new nice no"
    " not old one only photo pink portrait real red small super tall the tiny two very white woman yes young"
)
"""Words in capitals that are not identifiers: abbreviations, and words that are emphasized."""

_NUMBERED = word_set(
    "a b boeing canon class f figure frame galaxy gen iphone iso level mark mk model mp nikon no nr page part phase"
    " pixel player ps stage step take type u v version vol"
)
"""Words that a number follows in the name of a thing."""

_MIXED = word_set("bb8 c3po co2 h2o h264 h265 k9 mp3 mp4 r2d2 u2 wd40 y2k b2b p2p")
_MEASURE = re.compile(
    r"\d+(st|nd|rd|th|s|k|p|d|x|mm|cm|m|km|in|ft|g|kg|mg|lb|lbs|oz|ml|l|fps|hz|khz|mhz|ghz|mp|mb|gb|tb|px|bit|bits|v|w|h"
    r"|hr|hrs|min|sec|am|pm|yo|deg|c|e|ad|bc|pcs?|girls?|boys?|others?|people|men|women|year|years|days?|in1|x\d+)"
)


def is_identifier(word: str) -> bool:
    """Whether a word is an identifier wherever it stands."""
    if re.fullmatch(r"(\[[\w*-]+\]|<[\w*-]+>)+|\w+\*", word.rstrip(",.;:!?")):
        return True
    bare = _bare(word)
    if bare.lower() in IDENTIFIERS:
        return True
    return bare.islower() and _has_no_vowel(bare)


def find_identifiers(words: Sequence[str]) -> list[int]:
    """Positions of the identifiers among the words of a prompt."""
    found = [index for index, word in enumerate(words) if is_identifier(word)]
    if found:
        return found
    shouted = not any(letter.islower() for letter in "".join(words))
    return [index for index, word in enumerate(words) if _is_mixed(word) or (not shouted and _is_name(word))]


def split_words(prompt: str) -> list[str]:
    """The words of a prompt; adjacent words in brackets are one: ``<s0> <s1>`` is ``<s0><s1>``."""
    return re.sub(r"(?<=[>\]])\s+(?=[<\[])", "", prompt).split()


def identifier_of(prompt: str, class_prompt: str | None = None) -> str | None:
    """The identifier of a prompt, if there is exactly one: recognised, or the only word that its class prompt lacks."""
    words = split_words(prompt)
    found = [words[index] for index in find_identifiers(words)]
    if not found and class_prompt is not None:
        common = {_bare(word).lower() for word in class_prompt.split()} | {"a", "an", "the", "my"}
        found = [word for word in words if _bare(word).lower() not in common]
    return _bare(found[0]) if len(found) == 1 else None


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()")


def _has_no_vowel(bare: str) -> bool:
    letters = bare.lower().rstrip("0123456789")
    return bool(re.fullmatch("[bcdfghjklmnpqrstvwxz]{3,5}", letters)) and letters not in ABBREVIATIONS


def _is_name(word: str) -> bool:
    """In capitals, or capitalized without a vowel."""
    bare = _bare(word)
    if bare.istitle():
        return _has_no_vowel(bare)
    plain = bare.lower().rstrip("0123456789-")
    known = plain in ABBREVIATIONS or plain in _CAPITALS or re.fullmatch("[IVXLM]+", bare)
    return bool(re.fullmatch("[A-Z][A-Z0-9]{1,11}", bare)) and not known


def _is_mixed(word: str) -> bool:
    bare = _bare(word).lower()
    if not re.fullmatch("[a-z0-9_]{3,16}", bare) or not (re.search("[a-z]", bare) and re.search("[0-9]", bare)):
        return False
    letters = bare.rstrip("0123456789")
    known = _MIXED | {bare for bare in (letters,) if letters in _NUMBERED or letters in ABBREVIATIONS}
    return not _MEASURE.fullmatch(bare) and bare not in known and letters not in known
