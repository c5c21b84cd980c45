"""Sort the entries of a folder of images: images, masks, captions, and the rest with the reason why it is not used.

File names of masks and captions are matched to images exactly, or else without regard to case, Unicode normalization
(NFC, NFD) and kind of space (U+00A0 and U+202F, as in screenshots of macOS, count as a space).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mflux_vae.errors import ImageError
from mflux_vae.image_files.formats import image_format, readable
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_folder.reasons import (
    BROKEN_LINK,
    CLOUD,
    CONDITIONING,
    EMPTY_SUBFOLDER,
    GREY_TWIN,
    HIDDEN_IMAGE,
    JUNK,
    LINKED_FOLDER,
    NO_FILE,
    ORPHAN_CAPTION,
    ORPHAN_MASK,
    OTHER,
    OTHER_CAPTIONS,
    PARTIAL,
    SECOND_CAPTION,
    SECOND_MASK,
    SECOND_METADATA,
    SUBFOLDER,
    Reason,
    order,
    unreadable,
)
from mflux_vae.images import EXTENSIONS, load_image
from mflux_vae.utils.formatting import count_text, first_few, short_name
from mflux_vae.utils.links import missing

METADATA = ("metadata.jsonl", "metadata.csv")
"""Files with the captions of a folder's images, in order of precedence."""

CAPTION_SUFFIXES = (".txt", ".caption")
"""Extensions of the caption of one image, in order of precedence: NAME.txt, or NAME.png.txt."""

MASK_FOLDERS = ("masks", "mask")

MAX_LINE = 300
"""Characters of a line about unused entries."""

_MASK = re.compile(
    r"(?P<name>.+)[-_. ]masks?(label)?(?P<number>[-_. ]?\d+)?|masks?[-_. ](?P<first>.+)|masks?", re.IGNORECASE
)
_CONDITIONING = re.compile(r".+[-_. ]condlabel", re.IGNORECASE)
_KOHYA = re.compile(r"(?P<repeats>\d+)_.+")

_JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin"})
_PARTIAL = (".bak", ".crdownload", ".download", ".old", ".opdownload", ".orig", ".part", ".partial", ".swp", ".tmp")
_TEXT = frozenset(
    ".arrow .cap .caption .captions .csv .html .ini .json .jsonl .log .md .parquet .py .rtf .sh .srt .tags .toml .tsv"
    " .txt .xml .yaml .yml".split()
)
"""Extensions of texts and tables."""

_CAPTION_WORDS = re.compile(r"meta|caption|prompt|tags?\b|labels?\b|dataset|annotation|description", re.IGNORECASE)
_FORMATS = {".heic": "HEIC", ".heif": "HEIC", ".hif": "HEIC", ".avif": "AVIF", ".jxl": "JPEG XL", ".psd": "PSD"}
"""Formats of files whose content is not recognised, by extension."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The entries of a folder. Each one is an image, a mask, a caption, metadata, or in `unused`.

    Attributes:
        images: names of the image files, sorted.
        masks, captions: name of the file that belongs to an image, by the image's name. Masks may be in a subfolder.
        metadata: a file of `METADATA`.
        subfolders: names of the folders to descend into; empty unless `scan` is recursive.
        unused: names of the other entries, by reason.
        images_below: number of images in subfolders, by relative path, of a scan that is not recursive.
    """

    folder: Path
    images: tuple[str, ...] = ()
    masks: Mapping[str, str] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    metadata: str | None = None
    subfolders: tuple[str, ...] = ()
    unused: Mapping[Reason, tuple[str, ...]] = field(default_factory=dict)
    images_below: Mapping[str, int] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """Paths of the images."""
        return [self.folder / name for name in self.images]

    @property
    def unused_files(self) -> int:
        """Number of files that are not used, images in subfolders included, without hidden and system files."""
        skip = (SUBFOLDER, EMPTY_SUBFOLDER)
        files = sum(len(names) for reason, names in self.unused.items() if reason not in skip and not reason.quiet)
        return files + sum(self.images_below.values())

    @property
    def used(self) -> set[str]:
        """Names of the entries that have a use, masks in a subfolder included."""
        metadata = () if self.metadata is None else (self.metadata,)
        return {*self.images, *self.masks.values(), *self.captions.values(), *metadata, *self.subfolders}

    @property
    def shared(self) -> dict[str, list[str]]:
        """Images that share a mask or a caption, by its name."""
        users: dict[str, list[str]] = defaultdict(list)
        for files in (self.masks, self.captions):
            for image, name in files.items():
                users[name].append(image)
        return {name: images for name, images in users.items() if len(images) > 1}

    def find(self, name: str) -> list[str]:
        """Images of a name, with or without extension, that may differ in case, normalization and spaces."""
        return self._index.by_name(name)

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.images)

    def unused_text(self, *, uses: Collection[str] = (), texts: bool = True, repeats_flag: str | None = None) -> str:
        """The unused entries by reason, with counts, first names and remedies, in at most `MAX_LINE` characters or so;
        empty if there are none.

        Args:
            uses: "masks", "captions": what the caller uses beside images.
            texts: whether unused texts alone are worth a line.
            repeats_flag: flag that a folder in kohya's layout, ``10_sks dog``, corresponds to.
        """
        groups = [
            (reason, self._shown(reason)) for reason in self.unused if not reason.quiet and reason is not SUBFOLDER
        ]
        masks, captions = {*self.masks.values()}, {*self.captions.values(), self.metadata} - {None}
        if masks and "masks" not in uses:
            groups.append((Reason(noun="mask"), sorted(masks)))
        if captions and "captions" not in uses:
            groups.append((Reason(noun="caption file"), sorted(map(str, captions))))
        if not texts and all(_is_text(name) for _, names in groups for name in names):
            groups = []
        first = [self._subfolder_text(repeats_flag)] if self.images_below else []
        text = ""
        for names, cures in ((4, 9), (2, 9), (1, 9), (1, 1), (0, 1)):
            remedies = [reason.remedy for reason, _ in groups]
            parts = [
                _group_text(*group, names, cure=len(first) + index < cures and remedies[index] not in remedies[:index])
                for index, group in enumerate(groups)
            ]
            text = "; ".join([*first, *parts])
            if len(text) <= MAX_LINE:
                break
        return text

    def _shown(self, reason: Reason) -> list[str]:
        names = self.unused[reason]
        if reason is not BROKEN_LINK:
            return list(names)
        return [f"{name} -> {_target(self.folder / name)}" for name in names]

    def _subfolder_text(self, repeats_flag: str | None) -> str:
        count, names = sum(self.images_below.values()), list(self.images_below)
        cure = "give that folder" if len(names) == 1 else "give one of them"
        kohya = _KOHYA.fullmatch(names[0].rpartition("/")[2])
        if kohya and repeats_flag and len(names) == 1:
            cure += f", {repeats_flag} {int(kohya['repeats'])}"
        return f"{count_text(count, 'image')} in subfolders ({first_few([_quoted(one) for one in names], 2)}): {cure}"


def scan(
    folder: str | Path, *, recursive: bool = False, trust_extensions: bool = False, find_twins: bool = False
) -> ImageFolder:
    """Sort the entries of a folder.

    Args:
        recursive: the caller scans `subfolders`, too.
        trust_extensions: files with an extension of `EXTENSIONS` are images; otherwise content decides, and reading
            the first bytes of a million files takes minutes.
        find_twins: grey images beside a colour image of the same name, such as a.png beside a.jpg, are not used.

    Raises:
        ImageError: not a folder, or it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ImageError(f"{folder} {missing(folder, f'{what}; give a folder of images')}")
    unused: dict[Reason, list[str]] = defaultdict(list)
    lists: dict[str, list[str]] = {"image": [], "text": [], "folder": []}
    for name, kind in _kinds(folder, recursive=recursive, trust=trust_extensions).items():
        (unused[kind] if isinstance(kind, Reason) else lists[kind]).append(name)
    folders = lists["folder"]
    masks, images = _take_masks(folder, sorted(lists["image"]), folders, unused, trust=trust_extensions)
    if find_twins:
        images = _without_twins(folder, images, unused)
        kept = {image: name for image, name in masks.items() if image in images}
        unused[ORPHAN_MASK] += {*masks.values()} - {*kept.values()}
        masks = kept
    captions, metadata = _take_captions(images, lists["text"], unused)
    below = {} if recursive else _take_subfolders(folder, folders, unused)
    return ImageFolder(
        folder=folder,
        images=tuple(images),
        masks=masks,
        captions=captions,
        metadata=metadata,
        subfolders=tuple(sorted(folders)) if recursive else (),
        unused={reason: tuple(sorted(unused[reason])) for reason in sorted(unused, key=order) if unused[reason]},
        images_below=below,
    )


def no_images(scanned: ImageFolder, *, repeats_flag: str | None = None) -> ImageError:
    """The error for a folder without images, which names what it holds instead."""
    files = sum(len(names) for reason, names in scanned.unused.items() if reason not in (SUBFOLDER, EMPTY_SUBFOLDER))
    among = f" among {count_text(files, 'file')}" if files else ""
    text = scanned.unused_text(uses=("masks", "captions"), repeats_flag=repeats_flag)
    reasons = f": {text}" if text else ""
    return ImageError(f"{scanned.folder} has no images{among}{reasons}; supported: {', '.join(EXTENSIONS)}")


def match_key(name: str) -> str:
    """A file name without regard to case, normalization and kind of space."""
    spaced = "".join(" " if unicodedata.category(letter) == "Zs" else letter for letter in name)
    return unicodedata.normalize("NFC", spaced).casefold()


class _Index:
    """Images by name, exactly or by `match_key`."""

    def __init__(self, images: Sequence[str]) -> None:
        self._exact: dict[str, list[str]] = defaultdict(list)
        self._loose: dict[str, list[str]] = defaultdict(list)
        for image in images:
            for name in {image, Path(image).stem}:
                self._exact[name].append(image)
                self._loose[match_key(name)].append(image)

    def by_name(self, name: str) -> list[str]:
        """Images with this name, with or without extension."""
        return self._exact.get(name) or self._loose.get(match_key(name)) or []


def _kinds(folder: Path, *, recursive: bool = False, trust: bool) -> dict[str, Reason | str]:
    """What each entry of a folder is, see `_kind`."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _kind(entry, recursive=recursive, trust=trust) for entry in entries}
    except OSError as error:
        raise ImageError(f"{folder} cannot be read ({error.strerror})") from error


def _kind(entry: os.DirEntry[str], *, recursive: bool, trust: bool) -> Reason | str:
    """ "image", "text", "folder", or the reason why an entry is not used."""
    name = entry.name
    suffix = os.path.splitext(name)[1].lower()
    if entry.is_symlink() and not os.path.exists(entry.path):
        return JUNK if _is_junk(name) else BROKEN_LINK
    if entry.is_dir():
        if _is_junk(name):
            return JUNK
        return LINKED_FOLDER if recursive and entry.is_symlink() else "folder"
    if not entry.is_file():
        return NO_FILE
    if name.startswith(".") and suffix == ".icloud":  # the place of a file that macOS moved to its server
        return CLOUD
    if name.startswith("._") or (_is_junk(name) and (trust or suffix not in EXTENSIONS)):
        return JUNK
    if name.endswith("~") or suffix in _PARTIAL:
        return PARTIAL
    if suffix in _TEXT:
        return "text"
    if suffix == ".thm":  # the thumbnail of a video, a JPEG file
        return OTHER
    if trust and suffix in EXTENSIONS:
        return "image"
    try:
        found = image_format(entry.path) or _FORMATS.get(suffix)
    except OSError:
        found = None  # an image that cannot be opened is an error when it is loaded
    if name.startswith("."):
        return HIDDEN_IMAGE if readable(found) else JUNK
    if readable(found) or (found is None and suffix in EXTENSIONS):
        return "image"
    return OTHER if found is None else unreadable(found)


def _is_text(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _TEXT


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def _take_masks(
    folder: Path, images: list[str], folders: list[str], unused: dict[Reason, list[str]], *, trust: bool
) -> tuple[dict[str, str], list[str]]:
    """The mask of each image that has one, and the images without masks. Removes a folder of masks from `folders`."""
    found = {name: match for name in images if (match := _MASK.fullmatch(Path(name).stem))}
    conditioning = [name for name in images if _CONDITIONING.fullmatch(Path(name).stem)]
    unused[CONDITIONING] += conditioning
    inside = [name for name in folders if name.lower() in MASK_FOLDERS]
    if not found and not inside:
        return {}, [name for name in images if name not in conditioning]
    kept = [name for name in images if name not in found and name not in conditioning]
    index = _Index(kept)
    prefixed = [
        name
        for name, match in found.items()
        if (match["first"] or match["number"]) and not index.by_name(match["first"] or match["name"])
    ]
    for name in prefixed:  # mask_01.png and 01_mask2.png are masks only beside 01.png
        del found[name]
    if prefixed:
        kept = sorted({*kept, *prefixed})
        index = _Index(kept)
    candidates = [(match["name"] or match["first"] or "", name) for name, match in found.items()]
    for below in inside:
        kinds = _kinds(folder / below, trust=trust)
        names = {name: _mask_stem(name, index) for name, kind in kinds.items() if kind == "image"}
        if any(index.by_name(stem) for stem in names.values()):
            folders.remove(below)
            candidates += [(stem, f"{below}/{name}") for name, stem in names.items()]
            for name in kinds.keys() - names.keys():
                kind = kinds[name]
                unused[kind if isinstance(kind, Reason) else OTHER].append(f"{below}/{name}")
    masks: dict[str, str] = {}
    for stem, name in sorted(candidates, key=lambda one: ("/" in one[1], one[1])):
        targets = index.by_name(stem)
        taken = [image for image in targets if masks.setdefault(image, name) == name]
        if not taken:
            unused[SECOND_MASK if targets else ORPHAN_MASK].append(name)
    return masks, kept


def _mask_stem(name: str, index: _Index) -> str:
    """The stem of the image that a file in a folder of masks belongs to: masks/0.png or masks/0-mask.png."""
    stem = Path(name).stem
    match = None if index.by_name(stem) else _MASK.fullmatch(stem)
    return (match["name"] or match["first"] or stem) if match else stem


def _without_twins(folder: Path, images: list[str], unused: dict[Reason, list[str]]) -> list[str]:
    """The images without grey ones beside a colour image of the same name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in images:
        groups[match_key(Path(name).stem)].append(name)
    twins: set[str] = set()
    for names in groups.values():
        if len(names) > 1:
            grey = {name for name in names if _is_grey(folder / name)}
            twins |= grey if len(grey) < len(names) else set()
    unused[GREY_TWIN] += twins
    return [name for name in images if name not in twins]


def _is_grey(path: Path) -> bool:
    try:
        picture = load_image(path, notes=ImageNotes())
    except ImageError:  # an error when the image is trained on
        return False
    return bool((picture == picture[..., :1]).all())


def _take_captions(
    images: Sequence[str], texts: list[str], unused: dict[Reason, list[str]]
) -> tuple[dict[str, str], str | None]:
    """The caption file of each image that has one, and the metadata file."""
    captions: dict[str, str] = {}
    lower = {name.lower(): name for name in sorted(texts, reverse=True)}
    metadata = next((lower[name] for name in METADATA if name in lower), None)
    index = _Index(images) if texts else None
    ranked = []
    for name in texts:
        stem, suffix = os.path.splitext(name)
        targets = index.by_name(stem) if index else []
        if name == metadata:
            continue
        if name.lower() in METADATA:
            unused[SECOND_METADATA].append(name)
        elif suffix.lower() not in CAPTION_SUFFIXES:
            unused[OTHER_CAPTIONS if targets or _CAPTION_WORDS.search(stem) else OTHER].append(name)
        elif not targets:
            unused[ORPHAN_CAPTION].append(name)
        else:
            # NAME.png.txt belongs to one image, NAME.txt to all of that name
            ranked.append((len(targets), CAPTION_SUFFIXES.index(suffix.lower()), len(name), name, targets))
    for *_, name, targets in sorted(ranked):
        if not [image for image in targets if captions.setdefault(image, name) == name]:
            unused[SECOND_CAPTION].append(name)
    return captions, metadata


def _take_subfolders(folder: Path, folders: Iterable[str], unused: dict[Reason, list[str]]) -> dict[str, int]:
    """Number of images in each folder below that has some."""
    below: dict[str, int] = {}
    for name in sorted(folders):
        circular = os.path.samefile(folder / name, folder)
        found = {} if circular else dict(_count_images(folder, name))
        unused[LINKED_FOLDER if circular else SUBFOLDER if found else EMPTY_SUBFOLDER].append(name)
        below |= found
    return below


def _count_images(root: Path, inside: str, depth: int = 2) -> Iterator[tuple[str, int]]:
    """Yield folders with images and their number, by extension, down to some depth."""
    try:
        with os.scandir(root / inside) as found:
            entries = [entry for entry in found if not _is_junk(entry.name)]
    except OSError:
        return
    suffixes = (*EXTENSIONS, *_FORMATS, ".jfif", ".jpe")
    if count := sum(entry.name.lower().endswith(suffixes) for entry in entries):
        yield inside, count
    for entry in sorted(entries, key=lambda entry: entry.name):
        if depth and entry.is_dir(follow_symlinks=False):
            yield from _count_images(root, f"{inside}/{entry.name}", depth - 1)


def _group_text(reason: Reason, names: Sequence[str], shown: int, *, cure: bool) -> str:
    listed = f" ({first_few([short_name(name) for name in names], shown)})" if shown else ""
    tail = f" {reason.tail}" if reason.tail else ""
    advice = f": {reason.remedy}" if reason.remedy and cure else ""
    return f"{count_text(len(names), reason.noun)}{tail}{listed}{advice}"


def _quoted(name: str) -> str:
    return f"'{short_name(name)}'"


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return "?"
