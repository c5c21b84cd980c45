"""Finding an autoencoder: folder, file, preset or repository -> its kind, its configuration and its tensors, unread."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError, did_you_mean
from mflux_vae.networks.autoencoder_kl import AutoencoderKLConfig
from mflux_vae.pretrained import detect, hub, presets
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.utils.yaml_io import read_yaml
from mflux_vae.weights.formats.files import SUFFIXES, open_folder, open_weights, read_json
from mflux_vae.weights.formats.lazy_tensor import Stored
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Rule, to_mlx

Source: TypeAlias = "str | Path"
Config: TypeAlias = "str | Path | Mapping[str, Any]"

CONFIG_KEY = "mflux_vae.config"
"""In a single file's metadata: its configuration, so that nothing has to be guessed."""

HALVES = ("encoder", "decoder")

COUNTER = "bn.num_batches_tracked"
"""diffusers stores it beside FLUX.2's statistics; only training would use it."""

_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True, kw_only=True)
class Located:
    """An autoencoder that was found, its tensors unread.

    Attributes:
        where: file or folder.
        family: class name of the network.
        naming: of the keys.
        config: as in a config.json.
        tensors: by their names, without what stands before all of them in a whole model's file.
        preset: the known autoencoder that it was taken for, or None.
        assumed: what was taken for granted as nothing tells it, as one sentence; or None.
    """

    where: str
    family: str
    naming: str
    config: dict[str, Any]
    tensors: dict[str, Stored]
    preset: str | None = None
    assumed: str | None = None

    @property
    def rules(self) -> Sequence[Rule]:
        """The key table of its naming."""
        return FAMILIES[self.family].rules(self.naming, self.tensors)


def find(source: Source, config: Config | None = None) -> Located:
    """See `loading.open_network` for arguments and errors."""
    told = None if config is None else settings_of(config)
    path, preset = _local(source)
    if path.is_dir() and (path / "model_index.json").is_file():
        path = path / "vae"
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_file(path)
    if path.is_dir():
        told = told or read_json(path / "config.json")
        family_of(told, str(path))
        tensors = open_folder(path, STEM)
    else:
        tensors, metadata = _of_file(path)
        told = told or _written(metadata, str(path)) or (presets.PRESETS[preset].config.to_dict() if preset else None)
    place = detect.find(tensors, str(path), family_of(told, str(path)) if told else None)
    if place.naming not in FAMILIES[place.family].tables:  # told wrongly: what is missing and unknown will be listed
        place = replace(place, naming="diffusers")
    inside = {key[len(place.prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(place.prefix)}
    opened = Located(where=str(path), family=place.family, naming=place.naming, config=told or {}, tensors=inside)
    if told:
        return opened
    names = _presets(opened)
    if not names:
        return _unknown(opened)
    likely = detect.narrow(names, tensors, metadata, path)
    told = presets.PRESETS[likely[0]].config.to_dict()
    others = [name for name in likely if not _same_scaling(presets.PRESETS[name].config.to_dict(), told)]
    if others:
        scaled = f"nothing tells how its latents are scaled; taken as those of {likely[0]}"
        assumed = f"{path}: {scaled}; if they are not, say config={' or '.join(map(repr, others))}"
        return replace(opened, config=told, preset=likely[0], assumed=assumed)
    return replace(opened, config=told, preset=likely[0])


def _unknown(opened: Located) -> Located:
    """One that is no preset: its architecture follows from its shapes, its scaling from nothing."""
    config = FAMILIES[opened.family].config.from_dict(
        detect.settings(opened.family, opened.naming, _shapes(opened), opened.where)
    )
    factor, assumed = getattr(config, "scaling_factor", None), None
    if opened.family == "AutoencoderKL":
        assumed = (
            f"{opened.where}: nothing tells how its latents are scaled; taken times {factor}; give config= to say it"
        )
    return replace(opened, config=config.to_dict(), assumed=assumed)


def equal_preset(opened: Located) -> str | None:
    """The first preset that it equals, in shapes and in scaling."""
    names = _presets(opened)
    return next((name for name in names if _same_scaling(presets.PRESETS[name].config.to_dict(), opened.config)), None)


def _presets(opened: Located) -> list[str]:
    """Presets that have all these tensors, in these shapes."""
    shapes = _shapes(opened).items()
    return [
        name
        for name, preset in presets.PRESETS.items()
        if preset.family == opened.family and shapes <= _preset_shapes(name).items()
    ]


def _shapes(opened: Located) -> dict[str, tuple[int, ...]]:
    """By our names in our layout; nothing is read."""
    blank = {name: mx.zeros(stored.shape) for name, stored in opened.tensors.items()}
    return {name: tensor.shape for name, tensor in to_mlx(blank, opened.rules).items() if name != COUNTER}


@cache
def _preset_shapes(name: str) -> dict[str, tuple[int, ...]]:
    preset = presets.PRESETS[name]
    network = FAMILIES[preset.family].build(preset.config.to_dict())  # arrays are lazy: nothing is computed
    return {path: tensor.shape for path, tensor in dict(tree_flatten(network.parameters())).items()}


def _same_scaling(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all((a.get(key) or None) == (b.get(key) or None) for key in _SCALING)


def family_of(config: Mapping[str, Any], where: str) -> str:
    """The kind of network that a config.json is of; a WeightsError where there is no such kind.

    What diffusers has no configuration for (see `AutoencoderKLConfig.to_dict`) has `Extended` at the end of its name.
    """
    name = str(config.get("_class_name", "AutoencoderKL"))
    if (family := name.removesuffix("Extended")) not in FAMILIES:
        raise WeightsError(f"{where}: autoencoders of class {name!r} are not known; known: {', '.join(FAMILIES)}")
    return family


def _local(source: Source) -> tuple[Path, str | None]:
    """The file or folder on this machine, downloaded where it has to be; and the preset that was named."""
    path = Path(source).expanduser()
    with suppress(OSError):  # a name may be too long for one of a file
        if path.exists():
            return path, None
    text = str(source)
    if preset := presets.find(text):
        return hub.fetch(preset.repository, preset.inside), preset.name
    if folder := presets.registered(text):
        return folder, None
    if isinstance(source, str) and (named := hub.split(source)):
        return hub.fetch(*named), None
    hint = did_you_mean(text, presets.names())
    raise WeightsError(f"{source}: no such file or folder{hint or ';'} known presets: {', '.join(presets.names())}")


def _only_file(folder: Path) -> Path:
    """The one weights file of a folder without config.json; of TAESD's two halves, the encoder."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    halves = [file for file in files if "encoder" in file.stem]
    if len(files) == 1 or (len(files) == 2 and len(halves) == 1):
        return (halves or files)[0]
    if not files:
        raise WeightsError(f"{folder}: no autoencoder is in it, neither config.json nor a weights file")
    raise WeightsError(f"{folder}: has no config.json and {len(files)} weights files: name the one to open")


def _of_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors and metadata of one file; of TAESD's two halves, of both."""
    tensors, metadata = open_weights(path)
    if not tensors or not all(re.fullmatch(r"\d+\.(.*\.)?(weight|bias)", key) for key in tensors):
        return tensors, metadata
    half = "encoder" if "0.weight" in tensors else "decoder"
    other = HALVES[half == HALVES[0]]
    beside = [path.with_name(path.stem.replace(half, other) + suffix) for suffix in (path.suffix, *SUFFIXES)]
    found = next((file for file in beside if file.is_file() and file != path), None)
    if found is None:
        raise WeightsError(f"{path}: is TAESD's {half}; put its {other} beside it, as {beside[0].name}")
    both = {half: tensors, other: open_weights(found)[0]}
    return {f"{name}.{key}": tensor for name, part in both.items() for key, tensor in part.items()}, metadata


def _written(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """The configuration that this project wrote into a file."""
    if CONFIG_KEY not in metadata:
        return None
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: its configuration in the metadata is not readable ({error})") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{where}: its configuration in the metadata is no JSON object")
    return config


def settings_of(config: Config) -> dict[str, Any]:
    """A preset's name, a file or a dictionary, diffusers' or latent-diffusion's -> as in a config.json."""
    if not isinstance(config, Mapping):
        if not (path := Path(config)).is_file():
            if preset := presets.find(str(config)):
                return preset.config.to_dict()
            if folder := presets.registered(str(config)):
                return read_json(folder / "config.json")
            raise SettingsError(f"config {config}: no such file, nor a preset ({', '.join(presets.PRESETS)})")
        config = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if "_class_name" in config or "block_out_channels" in config:
        return dict(config)
    return AutoencoderKLConfig.from_ddconfig(config).to_dict()


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: not a table of settings")
    return content
