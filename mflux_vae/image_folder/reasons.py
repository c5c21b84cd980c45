"""Reasons why an entry of a folder of images is not used."""

from __future__ import annotations

from dataclasses import dataclass

from mflux_vae.image_files.formats import remedy


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why entries are not used: "3 {noun}s {tail}".

    Attributes:
        remedy: what to do about it.
        quiet: whether it is not worth a warning.
    """

    noun: str
    tail: str = ""
    remedy: str = ""
    quiet: bool = False


BROKEN_LINK = Reason(noun="link", tail="to a file that is not there", remedy="copy the files themselves, as cp -L does")
LINKED_FOLDER = Reason(noun="link", tail="to a folder, which is not followed", remedy="give the folder itself")
SUBFOLDER = Reason(noun="image", tail="in subfolders", remedy="give that folder")
EMPTY_SUBFOLDER = Reason(noun="subfolder", tail="without images")
HIDDEN_IMAGE = Reason(noun="hidden image", remedy="rename it without the dot")
CLOUD = Reason(noun="file", tail="kept in iCloud only", remedy="download them first")
NO_FILE = Reason(noun="device", tail="or pipe")
PARTIAL = Reason(noun="backup", tail="or unfinished download")
ORPHAN_MASK = Reason(noun="mask", tail="without an image of that name", remedy="rename it if it is an image")
SECOND_MASK = Reason(noun="second mask", tail="of an image")
CONDITIONING = Reason(noun="conditioning image")
GREY_TWIN = Reason(
    noun="grey image", tail="beside a colour image of the same name", remedy="name it NAME-mask.png if it is a mask"
)
ORPHAN_CAPTION = Reason(noun="caption", tail="without an image of that name")
SECOND_CAPTION = Reason(noun="second caption", tail="of an image")
SECOND_METADATA = Reason(noun="metadata file", tail="beside metadata.jsonl")
OTHER_CAPTIONS = Reason(
    noun="caption file", tail="of a kind that is not read", remedy="use NAME.txt, NAME.caption or metadata.jsonl"
)
OTHER = Reason(noun="other file")
FAULTY = Reason(noun="image", tail="with an error")
JUNK = Reason(noun="hidden or system file", quiet=True)


def unreadable(format: str) -> Reason:
    """The reason for images of a format that is not read."""
    return Reason(noun=f"{format} image", remedy=remedy(format))


_FIRST = (
    SUBFOLDER,
    CLOUD,
    BROKEN_LINK,
    LINKED_FOLDER,
    ORPHAN_MASK,
    SECOND_MASK,
    GREY_TWIN,
    CONDITIONING,
    OTHER_CAPTIONS,
)


def order(reason: Reason) -> tuple[int, str]:
    """Images that are not read first, other files last."""
    if reason.noun.endswith(" image") and reason not in _FIRST:
        return 0, reason.noun
    return (1 + _FIRST.index(reason) if reason in _FIRST else 50 + 50 * (reason in (OTHER, JUNK))), reason.noun
