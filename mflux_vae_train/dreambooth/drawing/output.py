"""Where pictures are written. Existing files are never replaced."""

from __future__ import annotations

from pathlib import Path

from mflux_vae.errors import SettingsError
from mflux_vae.images import EXTENSIONS
from mflux_vae.utils.links import missing

SUFFIX = ".png"


def new_picture(output: str, *, several: bool) -> Path:
    """The file for a picture, or for the contact sheet of several.

    Args:
        output: a PNG file, or a folder, in which pictures are numbered.
        several: `pictures_folder` of the file must be free, too.

    Raises:
        SettingsError: the file exists, or its name is not that of a PNG file or of a folder.
    """
    path = Path(output)
    if reason := missing(path, "", "remove the link"):
        raise SettingsError(f"--output {path} {reason}")
    if path.is_dir() or path.suffix.lower() not in EXTENSIONS:
        if place := next((one for one in (path, *path.parents) if one.is_file()), None):
            raise SettingsError(f"--output {path}: {place} is a file, not a folder")
        names = [one.stem for one in path.iterdir()] if path.is_dir() else []
        number = max((int(name) for name in names if name.isdecimal() and name.isascii()), default=0) + 1
        return path / f"{number:03}{SUFFIX}"
    if path.suffix.lower() != SUFFIX:
        raise SettingsError(f"--output {path}: pictures are PNG files; give {path.with_suffix(SUFFIX)} or a folder")
    for taken in (path, *([pictures_folder(path)] if several else [])):
        if taken.exists():
            raise SettingsError(
                f"--output {path}: {taken} exists; give another name, or a folder to number pictures in"
            )
    return path


def pictures_folder(sheet: Path) -> Path:
    """The folder of the single pictures of a contact sheet."""
    return sheet.with_suffix("")


def create_folder(folder: Path) -> None:
    """
    Raises:
        SettingsError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--output {folder}: cannot be written ({error.strerror}); give another") from error
