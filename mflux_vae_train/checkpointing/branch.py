"""Going back to an older checkpoint.

A run that goes back is a *branch*. Its record, ``{"checkpoint": path, "update": number}``, is a part of run.json. When
it starts, the later checkpoints are moved to ``abandoned/``. So the newest checkpoint of a folder is always the
branch's, also if its number is lower.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeAlias

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.paths import same_place
from mflux_vae_train.checkpointing import checkpoint

ABANDONED = "abandoned"
"""Folder for the checkpoints that a run no longer uses since it went back to an older one."""

Branch: TypeAlias = Mapping[str, Any] | None
"""Where a run went back; None if it never did."""


def find(root: Path, name: str) -> Path:
    """A checkpoint by its name in the folder, by its path, or by the path of a folder with checkpoints.

    Raises:
        SettingsError: there is none.
    """
    places = [Path(name), root / name]
    for place in places if len(Path(name).parts) > 1 else reversed(places):
        place = place.parent if place.name in (checkpoint.ARRAYS, checkpoint.VALUES) else place
        if not place.is_dir():
            continue
        if (place / checkpoint.VALUES).exists() or (place / checkpoint.ARRAYS).exists():
            return place
        if (newest := checkpoint.latest(place)) is not None:
            return newest
        if place.name.startswith("checkpoint-"):
            return place  # `checkpoint.read` says what it lacks
    there = [path.name for _, path in checkpoint.numbered(root)]
    there += [f"{ABANDONED}/{path.name}" for path in sorted((root / ABANDONED).glob("checkpoint-*"))]
    has = f"has {first_few(there, 6)}" if there else "has none yet"
    raise SettingsError(
        f"--resume_from_checkpoint {name} is not a folder with a checkpoint, nor one in {root}, which {has}"
    )


def began_at(root: Path, name: str, branch: Branch) -> bool:
    """Whether the branch in the folder began at the checkpoint that `find` finds by this name."""
    if branch is None:
        return False
    began, given = root / branch["checkpoint"], (Path(name), root / name)
    if any(same_place(began, one) for one in given):
        return True
    folder = began.resolve().parent
    return any(same_place(folder, one) for one in given) and not same_place(folder, root)


def newest(root: Path, branch: Branch) -> Path | None:
    """The newest sound checkpoint of the folder; where its branch began if that has none yet.

    Raises:
        SettingsError: the branch began at a checkpoint that is gone.
    """
    if (found := checkpoint.latest(root)) is not None or branch is None:
        return found
    began = root / branch["checkpoint"]
    if not began.is_dir():
        raise SettingsError(
            f"{root} continues {began}, which is gone; name a checkpoint by --resume_from_checkpoint, or give another"
            " folder"
        )
    return began


def going_back(root: Path, path: Path, update: int, branch: Branch) -> tuple[Branch, list[Path]]:
    """The branch of a run that continues from the checkpoint at `path`, and the checkpoints that it abandons."""
    here = same_place(path.parent, root)
    abandoned = [
        root / f"checkpoint-{number}" for number, _ in checkpoint.numbered(root) if number > update or not here
    ]
    if here and not abandoned:
        return branch, []
    return {"checkpoint": path.name if here else str(path.resolve()), "update": update}, abandoned


def abandon(root: Path, checkpoints: Sequence[Path], *, after: int, moved: Iterable[Path], copied: Path) -> None:
    """Move checkpoints, and files whose names end with a later update (``step-00008.png``), to ``abandoned/``.

    Args:
        copied: file with metrics, which the run will truncate.
    """
    place = root / ABANDONED
    place.mkdir(exist_ok=True)
    if copied.exists():
        shutil.copy2(copied, _free(place / copied.name))
    numbers = {path: re.search(r"-(\d+)\.\w+$", path.name) for path in moved}
    later = [path for path, number in numbers.items() if number is None or int(number[1]) > after]
    for path in [*checkpoints, *later]:
        path.rename(_free(place / path.name))


def warning(root: Path, update: int, abandoned: Sequence[Path]) -> str:
    """What a run that goes back does to later files."""
    names = first_few([path.name for path in abandoned])
    return (
        f"going back to update {update}: {names} and the previews after it are no longer used; they move to"
        f" {root / ABANDONED}"
    )


def _free(path: Path) -> Path:
    """`path`, or a similar one that does not exist: ``checkpoint-8.2``."""
    numbers = (path.with_name(f"{path.name}.{number}") for number in count(2))
    return next(one for one in chain([path], numbers) if not one.exists())
