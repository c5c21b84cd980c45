"""From ``--model`` to a pipeline, through entry points.

A pipeline is an entry point of the group ``mflux_vae_train.pipelines``: its name is what ``--model`` takes,
its value a callable ``load(model: str) -> DiffusionPipeline`` that is given that name. An entry point named
like a diffusers class opens folders, and repositories of the hub: ``--model FOLDER`` looks up the class that the
``model_index.json`` names and calls ``load(FOLDER)``. Of a folder without that file, or a single file, the modules of
these entry points are asked in turn: their ``opens(place: Path) -> bool``. This package's own are registered like
anyone's.

A callable that takes the keywords ``revision`` and ``variant`` is given them, too.

    [project.entry-points."mflux_vae_train.pipelines"]
    mine = "my_package:load"
    MyDiffusionPipeline = "my_package:load"

Nothing is imported before it is asked for. Where two distributions register one name, a warning names both
and the first counts: this package's own, then by name of the distribution. One that cannot be imported is
skipped with a warning, and the next of the same name serves.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae.pretrained import hub

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.protocol import DiffusionPipeline

GROUP = "mflux_vae_train.pipelines"
OWN_PACKAGE = "mflux_vae_train"

Loader = Callable[..., "DiffusionPipeline"]


def available() -> list[str]:
    """The names that ``--model`` takes, importing none of them; those that open folders are left out."""
    return sorted({entry.name for entry in entry_points(group=GROUP) if not _opens_folders(entry.name)})


def open_pipeline(model: str, *, revision: str | None = None, variant: str | None = None) -> DiffusionPipeline:
    """Opens a registered name, a folder in diffusers' layout, a file that a pipeline opens, or `owner/name` on the hub.

    Args:
        revision: of a repository on the hub: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".

    Raises:
        SettingsError: there is no such name or folder (the message lists the names that work), or the pipeline has no
            revisions or variants.
        WeightsError: there is no such repository, it is gated, or it cannot be reached.
        PluginError: the entry point cannot be imported, or what it gives is no pipeline.
    """
    known = _by_name()
    options = {name: value for name, value in (("revision", revision), ("variant", variant)) if value is not None}
    if model in known:
        return _open(known[model], model, options)
    folder = Path(model).expanduser()
    if folder.is_file():
        if options:
            raise SettingsError(f"{', '.join(f'--{name}' for name in options)}: {folder} is a file, which has none")
        if (name := _asked(folder, known)) is None:
            names = ", ".join(filter(lambda name: not _opens_folders(name), sorted(known)))
            raise SettingsError(f"{folder}: nothing installed opens this file; give a folder, owner/name, or {names}")
        return _open(known[name], str(folder), options)
    if folder.is_dir():
        if revision is not None:
            raise SettingsError(f"--revision {revision}: {folder} is a folder, which has none")
        return _open(_opener(_class_of(folder, known), str(folder), known), str(folder), options)
    if hub.split(model) == (model, "") and not _near(model, known):
        index = hub.download(model, ["model_index.json"], revision)
        return _open(_opener(_class_of(index, known), model, known), model, options)
    raise SettingsError(_unknown(model, known))


def _opener(class_name: str, model: str, known: dict[str, list[EntryPoint]]) -> list[EntryPoint]:
    if class_name not in known:
        opens = ", ".join(sorted(filter(_opens_folders, known))) or "none"
        raise SettingsError(f"{model} holds a {class_name}, which nothing installed opens (known: {opens})")
    return known[class_name]


def _by_name() -> dict[str, list[EntryPoint]]:
    """Name -> its entry points, the one that counts first. A name taken twice is reported."""
    known: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=_precedence):
        others = known.setdefault(entry.name, [])
        # An editable install can show one distribution twice; that is no conflict.
        if all((_distribution(other), other.value) != (_distribution(entry), entry.value) for other in others):
            others.append(entry)
    for name, entries in known.items():
        if len(entries) > 1:
            who = ", ".join(f"{_distribution(entry)} ({entry.value})" for entry in entries)
            warnings.warn(f"pipeline {name!r} is registered more than once: {who}; the first counts", stacklevel=3)
    return known


def _open(entries: list[EntryPoint], model: str, options: Mapping[str, str]) -> DiffusionPipeline:
    broken: list[str] = []
    for entry in entries:
        loader = _load(entry, broken)
        if loader is not None:
            if foreign := sorted(options.keys() - _keywords(loader)):
                flags = ", ".join(f"--{name}" for name in foreign)
                raise SettingsError(f"{flags}: the pipeline {entry.name} has no such choice")
            return _checked(loader(model, **options), entry)
    raise PluginError(f"pipeline {entries[0].name!r} cannot be loaded: {'; '.join(broken)}")


def _load(entry: EntryPoint, broken: list[str]) -> Loader | None:
    """Imports an entry point; a broken one is warned about and added to `broken`."""
    try:
        loader = entry.load()
        if not callable(loader):
            raise TypeError(f"{entry.value} is a {type(loader).__name__}, not a callable load(model)")
    except Exception as error:  # whatever a foreign module raises while it is imported
        reason = f"{_distribution(entry)} ({entry.value}): {type(error).__name__}: {error}"
        broken.append(reason)
        warnings.warn(f"pipeline {entry.name!r} is broken and skipped: {reason}", stacklevel=4)
        return None
    return loader


def _keywords(loader: Loader) -> set[str]:
    try:
        return set(inspect.signature(loader).parameters)
    except (TypeError, ValueError):  # of a callable written in C
        return set()


def _checked(pipeline: Any, entry: EntryPoint) -> DiffusionPipeline:
    if missing := missing_members(pipeline):
        lacks = f": it lacks {', '.join(missing)}"
        raise PluginError(f"{entry.value} of {_distribution(entry)} gave a {type(pipeline).__name__}{lacks}")
    return cast("DiffusionPipeline", pipeline)


def missing_members(pipeline: object) -> list[str]:
    """What an object lacks to be a DiffusionPipeline."""
    from mflux_vae_train.pipelines.protocol import DiffusionPipeline

    methods = [name for name in vars(DiffusionPipeline) if not name.startswith("_")]
    fields = [name for name in DiffusionPipeline.__annotations__ if not name.startswith("_")]
    return sorted(name for name in {*methods, *fields} if not _has(pipeline, name))


def _has(pipeline: object, name: str) -> bool:
    """Whether there is such a member, without asking for it: a denoiser may be loaded, even downloaded, by that."""
    try:
        inspect.getattr_static(pipeline, name)
    except AttributeError:  # or it is made by a `__getattr__`
        return hasattr(pipeline, name)
    return True


def _unknown(model: str, known: dict[str, list[EntryPoint]]) -> str:
    """The message for a name that is not there. Only names that can be imported are offered."""
    names = [name for name in sorted(known) if not _opens_folders(name)]
    usable = [name for name in names if any(_load(entry, []) for entry in known[name])]
    near = _near(model, usable)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no pipeline or folder {model!r}{hint} (pipelines: {', '.join(usable) or 'none installed'})"


def _near(model: str, names: Iterable[str]) -> list[str]:
    return get_close_matches(model, list(names), n=2, cutoff=0.5)


def _class_of(folder: Path, known: Mapping[str, list[EntryPoint]]) -> str:
    index = folder / "model_index.json"
    if not index.is_file() and (name := _asked(folder, known)) is not None:
        return name
    try:
        return str(json.loads(index.read_text())["_class_name"])
    except FileNotFoundError:
        raise SettingsError(f"{folder} has no model_index.json: give a folder in diffusers' layout") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{index} does not name a _class_name ({type(error).__name__})") from error


def _asked(place: Path, known: Mapping[str, list[EntryPoint]]) -> str | None:
    """Which of those that open folders say that they open a file, or a folder that does not say what it is."""
    for name in sorted(filter(_opens_folders, known)):
        if any(_says_it_opens(entry, place) for entry in known[name]):
            return name
    return None


def _says_it_opens(entry: EntryPoint, folder: Path) -> bool:
    loader = _load(entry, [])
    opens = getattr(sys.modules.get(getattr(loader, "__module__", "")), "opens", None)
    return callable(opens) and bool(opens(folder))


def _precedence(entry: EntryPoint) -> tuple[str, bool, str, str]:
    own = entry.value.split(":")[0].split(".")[0] == OWN_PACKAGE
    return entry.name, not own, _distribution(entry), entry.value


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"


def _opens_folders(name: str) -> bool:
    """diffusers' classes are called SomethingPipeline; names for ``--model`` are not."""
    return name.endswith("Pipeline")
