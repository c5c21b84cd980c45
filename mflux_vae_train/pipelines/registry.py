"""From ``--model`` to a pipeline, through entry points of the group ``mflux_vae_train.pipelines``.

A new pipeline is a folder beside this file (see `protocol`) and an entry point:

    [project.entry-points."mflux_vae_train.pipelines"]
    mine = "my_package:load"
    MyDiffusionPipeline = "my_package:load"

The value is a callable ``load(model: str) -> DiffusionPipeline``; ``revision``, ``variant``, ``vae`` and
``prediction_type`` are passed as keywords if it accepts them. A name like ``mine`` is a value of ``--model``. A name
that ends in ``Pipeline`` is the class in the ``model_index.json`` of the folders and repositories that it opens:
``--model FOLDER`` calls ``load(FOLDER)``. For files, and for folders without a ``model_index.json``, ``opens(path) ->
bool`` is called in the modules of these entry points; for repositories on the hub, ``knows(repository) -> bool`` says
which ones open without a download.

Entry points are imported when they are needed. If two distributions register a name, a warning names both; this
package's entry point is used first, then the others in order of their distributions' names. One that cannot be imported
is skipped with a warning.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mflux_vae.errors import PluginError, SettingsError, WeightsError
from mflux_vae.pretrained import hub
from mflux_vae.utils.formatting import with_article
from mflux_vae.utils.links import missing, naming_broken_links
from mflux_vae.utils.text_files import parse_json, read_text

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.protocol import DiffusionPipeline

GROUP = "mflux_vae_train.pipelines"
HUB = "https://huggingface.co/"
THIS_PACKAGE = "mflux_vae_train"

Loader = Callable[..., "DiffusionPipeline"]


def available() -> list[str]:
    """Names for ``--model``, without those of classes. Nothing is imported."""
    return sorted({entry.name for entry in entry_points(group=GROUP) if not _is_class(entry.name)})


def open_pipeline(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
) -> DiffusionPipeline:
    """Open a registered name, a folder in diffusers' layout, a file, or `owner/name` on the hub.

    Args:
        revision: of a repository on the hub: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".
        vae: another autoencoder, see `parts.open_vae`.
        prediction_type: of the denoiser in a file that does not state it.

    Raises:
        SettingsError: no such name or folder (the message lists the names that work), or an option that the pipeline
            does not support.
        WeightsError: no such repository, or it is gated or cannot be reached.
        PluginError: the entry point cannot be imported, or does not return a pipeline.
    """
    known = _by_name()
    named = {"revision": revision, "variant": variant, "vae": vae, "prediction_type": prediction_type}
    options = {name: value for name, value in named.items() if value is not None}
    if model in known:
        return _open(known[model], model, options)
    folder = Path(model).expanduser()
    if folder.is_file():
        if of_folder := [f"--{name}" for name in ("revision", "variant") if name in options]:
            raise SettingsError(f"{', '.join(of_folder)}: {folder} is a file, which has none")
        if (name := _class_that(known, "opens", folder)) is None:
            names = ", ".join(name for name in sorted(known) if not _is_class(name))
            raise SettingsError(
                f"{folder}: nothing installed opens this file{_holds(folder)}; give a folder, owner/name, or {names}"
            )
        return _open(known[name], str(folder), options)
    if reason := missing(folder, ""):
        raise SettingsError(f"--model {folder} {reason}")
    if folder.is_dir():
        if revision is not None:
            raise SettingsError(f"--revision {revision}: {folder} is a folder, which has none")
        with naming_broken_links(folder):
            return _open(_entries_of(_class_of(folder, known), str(folder), known), str(folder), options)
    repository = model.removeprefix(HUB).rstrip("/")
    if hub.split(repository) == (repository, ""):
        model = repository
        if revision is None and (name := _class_that(known, "knows", model)) is not None:
            return _open(known[name], model, options)
    if hub.split(model) == (model, "") and not _near(model, known):
        index = hub.download(model, ["model_index.json"], revision)
        return _open(_entries_of(_class_of(index, known), model, known), model, options)
    raise SettingsError(_unknown(model, known))


def _holds(file: Path) -> str:
    """What a file holds, or why it cannot be read, for messages."""
    from mflux_vae.weights.formats.files import open_weights
    from mflux_vae.weights.kinds import kind_of

    try:
        kind = kind_of(open_weights(file)[0])
    except WeightsError as error:
        return f": {str(error).removeprefix(f'{file}: ')}"
    adapter = ", which --lora_weights takes" if kind == "an adapter" else ""
    return f", which holds {kind}{adapter}" if kind else ""


def _entries_of(class_name: str, model: str, known: dict[str, list[EntryPoint]]) -> list[EntryPoint]:
    if class_name not in known:
        opens = ", ".join(sorted(filter(_is_class, known))) or "none"
        raise SettingsError(f"{model} holds a {class_name}, which nothing installed opens (known: {opens})")
    return known[class_name]


def _by_name() -> dict[str, list[EntryPoint]]:
    """Name -> its entry points in order of precedence. Warns about names that are registered twice."""
    known: dict[str, list[EntryPoint]] = {}
    for entry in sorted(entry_points(group=GROUP), key=_precedence):
        others = known.setdefault(entry.name, [])
        # an editable install can list one distribution twice
        if all((_distribution(other), other.value) != (_distribution(entry), entry.value) for other in others):
            others.append(entry)
    for name, entries in known.items():
        if len(entries) > 1:
            who = ", ".join(f"{_distribution(entry)} ({entry.value})" for entry in entries)
            warnings.warn(f"pipeline {name!r} is registered more than once: {who}; the first is used", stacklevel=3)
    return known


def _open(entries: list[EntryPoint], model: str, options: Mapping[str, str]) -> DiffusionPipeline:
    broken: list[str] = []
    for entry in entries:
        loader = _load(entry, broken)
        if loader is not None:
            if foreign := sorted(options.keys() - _keywords(loader)):
                flags = ", ".join(f"--{name}" for name in foreign)
                raise SettingsError(f"{flags}: the pipeline {entry.name} does not support this")
            return _checked(loader(model, **options), entry)
    raise PluginError(f"pipeline {entries[0].name!r} cannot be loaded: {'; '.join(broken)}")


def _load(entry: EntryPoint, broken: list[str]) -> Loader | None:
    """Import an entry point. If it fails, warn and append the reason to `broken`."""
    try:
        loader = entry.load()
        if not callable(loader):
            raise TypeError(f"{entry.value} is a {type(loader).__name__}, not a callable load(model)")
    except Exception as error:  # any exception that importing a foreign module raises
        reason = f"{_distribution(entry)} ({entry.value}): {type(error).__name__}: {error}"
        broken.append(reason)
        warnings.warn(f"pipeline {entry.name!r} is broken and skipped: {reason}", stacklevel=4)
        return None
    return loader


def _keywords(loader: Loader) -> set[str]:
    try:
        return set(inspect.signature(loader).parameters)
    except (TypeError, ValueError):  # a callable written in C
        return set()


def _checked(pipeline: Any, entry: EntryPoint) -> DiffusionPipeline:
    from mflux_vae_train.pipelines.checks import check_pipeline

    check_pipeline(
        pipeline, f"{entry.value} of {_distribution(entry)} returned {with_article(type(pipeline).__name__)}"
    )
    return cast("DiffusionPipeline", pipeline)


def missing_members(pipeline: object) -> list[str]:
    """Members of DiffusionPipeline that an object lacks."""
    from mflux_vae_train.pipelines import checks

    return checks.missing_members(pipeline)


def _unknown(model: str, known: dict[str, list[EntryPoint]]) -> str:
    """Message for an unknown name. It lists only names that can be imported."""
    names = [name for name in sorted(known) if not _is_class(name)]
    usable = [name for name in names if any(_load(entry, []) for entry in known[name])]
    near = _near(model, usable)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no pipeline or folder {model!r}{hint} (pipelines: {', '.join(usable) or 'none installed'})"


def _near(model: str, names: Iterable[str]) -> list[str]:
    return get_close_matches(model, list(names), n=2, cutoff=0.5)


def _class_of(folder: Path, known: Mapping[str, list[EntryPoint]]) -> str:
    index = folder / "model_index.json"
    if not index.is_file() and (name := _class_that(known, "opens", folder)) is not None:
        return name
    try:
        return str(parse_json(read_text(index))["_class_name"])
    except FileNotFoundError:
        raise SettingsError(f"{folder} has no model_index.json: {_instead_of(folder)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(f"{index} does not name a _class_name ({type(error).__name__})") from error


def _instead_of(folder: Path) -> str:
    """What to give instead of a folder that is not a pipeline's."""
    for index in sorted(folder.glob("*/model_index.json")):
        return f"give {index.parent}"
    if (folder / "run.json").is_file():
        return f"it is the output folder of a run; give the model of that run, with --lora_weights {folder}"
    return "give a folder in diffusers' layout"


def _class_that(known: Mapping[str, list[EntryPoint]], question: str, subject: Path | str) -> str | None:
    """Name of a class whose module answers a question about a file, folder or repository with yes."""
    for name in sorted(filter(_is_class, known)):
        if any(_answers(entry, question, subject) for entry in known[name]):
            return name
    return None


def _answers(entry: EntryPoint, question: str, subject: Path | str) -> bool:
    module = None if _load(entry, []) is None else sys.modules.get(entry.value.partition(":")[0])
    function = getattr(module, question, None)
    return callable(function) and bool(function(subject))


def _precedence(entry: EntryPoint) -> tuple[str, bool, str, str]:
    foreign = entry.value.split(":")[0].split(".")[0] != THIS_PACKAGE
    return entry.name, foreign, _distribution(entry), entry.value


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"


def _is_class(name: str) -> bool:
    """Whether an entry point is named like a class of diffusers, and opens folders."""
    return name.endswith("Pipeline")
