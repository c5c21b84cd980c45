"""What draws: the model, adapters and settings of a run, or an adapter file. Nothing is opened yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.pretrained import hub
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.links import missing
from mflux_vae.utils.paths import same_place
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.identifier import identifier_of
from mflux_vae_train.dreambooth.data.sampling import Size
from mflux_vae_train.dreambooth.export import TRAINED
from mflux_vae_train.dreambooth.run_folder import ADAPTER, BEST, RunFolder, run_of
from mflux_vae_train.lora.metadata import base_model
from mflux_vae_train.settings.values import DERIVED, read_file

LAST = "last"
"""Labels: of a run's result, of the newest checkpoint of an unfinished run, or of the only adapter; and of the adapter
that ``--keep_best`` keeps."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to draw with. A setting that is None is the pipeline's recommendation.

    Attributes:
        path: as it was given, for messages.
        model: the model that drew the run's previews: that of ``--preview_model``, else the trained one. After
            ``--train_mode full`` the trained pipeline.
        revision, variant, vae, prediction_type: see `registry.open_pipeline`.
        settings: the file that names the model; None if the user does.
        adapters: file of each adapter, or folder that holds it, by label, oldest first: numbers of updates, then
            `LAST`, `BEST`. Empty after ``--train_mode full``.
        chosen: label of the adapter that `path` names.
        root: the run's folder; None for an adapter file.
        untrained: what draws the untrained images after ``--train_mode full``; None if `adapters` scaled by 0 do.
        seed, images: of the previews; images per prompt.
        identifier: the word for the subject, if it is known.
        encodings: the run's cache of encoded prompts, if it is there; it is only read.
    """

    path: str
    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    prediction_type: str | None = None
    settings: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    chosen: str = LAST
    root: Path | None = None
    untrained: Source | None = None
    quantize: int | None = None
    max_sequence_length: int | None = None
    clip_skip: int | None = None
    steps: int | None = None
    guidance: float | None = None
    size: Size | None = None
    seed: int = 0
    images: int = 1
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    identifier: str | None = None
    encodings: Path | None = None

    def changed(self, **changes: Any) -> Source:
        """This source with other settings, also of the untrained model."""
        if self.untrained is not None:
            changes["untrained"] = replace(self.untrained, **changes)
        return replace(self, **changes)

    def file(self, label: str) -> Path:
        """The file of an adapter."""
        return lora.adapter_file(self.adapters[label])

    def label(self, name: str) -> str:
        """The label of an adapter that the user names: ``200``, ``checkpoint-200`` or ``last``.

        Raises:
            SettingsError: there is none, or this is no run with adapters.
        """
        label = name.removeprefix("checkpoint-")
        if self.root is None:
            raise SettingsError(f"--checkpoint {name}: {self.path} is an adapter, not the folder of a run")
        if not self.adapters:
            raise SettingsError(f"--checkpoint {name}: {self.path} trained all weights; only its result can be drawn")
        if label not in self.adapters:
            raise SettingsError(f"--checkpoint {name}: {self.root} has {first_few([*self.adapters], 8)}")
        return label


def read_source(path: str, model: str | None = None) -> Source:
    """
    Args:
        path: folder of a run, of a checkpoint or of an adapter; the file of an adapter; or `owner/name` or
            `owner/name/FILE` of an adapter on the hub, which is downloaded.
        model: instead of the run's; needed for an adapter.

    Raises:
        SettingsError: there is nothing at the path, no model, or an unfinished run without checkpoints.
        WeightsError: a folder without an adapter, or one that cannot be downloaded.
    """
    place = Path(path)
    if (root := run_of(place)) is not None:
        return _of_run(path, root, model)
    if not place.exists() and (hub.split(path) is None or place.parent.is_dir()):
        lora.adapter_file(path)  # of a missing checkpoint, names those that are there
        raise SettingsError(f"{path}: {missing(place, 'no such file or folder')}; give a run's folder or an adapter")
    file = lora.fetch_adapter(path)
    assert file is not None  # it may be downloaded
    if model is None:
        named = base_model(file)
        hint = "" if named is None else f" (its {named[0]} names {named[1]})"
        raise SettingsError(f"--model is missing: {path} is an adapter; give the model that it was trained for{hint}")
    return Source(path=path, model=model, adapters={LAST: file})


def _of_run(path: str, root: Path, model: str | None) -> Source:
    stated = read_file(DreamBoothSettings, RunFolder(root).settings)
    derived = stated.pop(DERIVED, {})
    values = {**stated, **derived}
    if missing := [name for name in ("model", "resolution", "seed") if values.get(name) is None]:
        raise SettingsError(f"{RunFolder(root).settings}: lacks {', '.join(missing)}; give the adapter and --model")
    sibling = values.get("preview_model")
    opening: dict[str, Any] = {"model": model or sibling or values["model"], "vae": values.get("vae")}
    if sibling is None:
        opening |= {name: values.get(name) for name in ("variant", "prediction_type")}
        opening["revision"] = values.get("revision") if model is None else None
    resolution, encodings = values["resolution"], Path(values.get("encodings_dir") or RunFolder(root).encodings)
    source = Source(
        path=path,
        **opening,
        root=root,
        settings=RunFolder(root).settings if model is None else None,
        quantize=values.get("quantize"),
        max_sequence_length=values.get("max_sequence_length"),
        clip_skip=values.get("clip_skip"),
        steps=values.get("num_inference_steps"),
        guidance=stated.get("guidance"),
        size=(resolution, resolution),
        seed=values["seed"],
        images=values.get("num_validation_images") or 1,
        prompts=tuple(values.get("validation_prompt") or ()),
        identifier=identifier_of(values.get("instance_prompt") or "", values.get("class_prompt")),
        encodings=encodings if encodings.is_dir() else None,
    )
    if values.get("train_mode") == "full":
        return _fully_trained(source, root, Path(path), model)
    adapters = {str(update): folder for update, folder in reversed(checkpoint.numbered(root))}
    result = RunFolder(root).adapter
    if result.is_file() or adapters:
        adapters[LAST] = result if result.is_file() else [*adapters.values()][-1]
        if ((best := RunFolder(root).best) / ADAPTER).is_file():
            adapters[BEST] = best
    chosen = LAST
    if not same_place(path, root):
        file = lora.adapter_file(path)
        chosen = next((label for label, one in adapters.items() if same_place(one, file.parent)), LAST)
        adapters[chosen] = file
    if not adapters:
        raise SettingsError(f"{root}: the run has no adapter yet, neither a result nor a checkpoint")
    return replace(source, adapters=adapters, chosen=chosen)


def _fully_trained(source: Source, root: Path, place: Path, model: str | None) -> Source:
    result = root / TRAINED
    if model is not None:
        raise SettingsError(f"--model {model}: {root} trained all weights, so that its result is the model")
    if not result.is_dir() or not (same_place(place, root) or same_place(place, result)):
        what = f"draw its result, {root}" if result.is_dir() else "there is no pipeline/ to draw with"
        raise SettingsError(f"{place}: --train_mode full saves a pipeline at the end of the run; {what}")
    trained = replace(
        source, model=str(result), revision=None, variant=None, vae=None, prediction_type=None, settings=None
    )
    return replace(trained, untrained=source)
