"""Locate an autoencoder: folder, file, preset or repository -> family, configuration and lazy tensors."""

from __future__ import annotations

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
from mflux_vae.pretrained import detect, hub, presets, refused
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.links import missing, naming_broken_links
from mflux_vae.utils.text_files import parse_json
from mflux_vae.utils.yaml_io import read_yaml
from mflux_vae.weights.formats.files import SUFFIXES, open_folder, open_weights, read_json
from mflux_vae.weights.formats.lazy_tensor import LazyTensor
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Rule, to_mlx

Source: TypeAlias = "str | Path"
Config: TypeAlias = "str | Path | Mapping[str, Any]"

CONFIG_KEY = "mflux_vae.config"
"""Metadata key of the configuration in single files."""

HALVES = ("encoder", "decoder")

COUNTER = "bn.num_batches_tracked"
"""LazyTensor by diffusers with FLUX.2's statistics; unused here."""

SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Keys of a configuration that scale latents."""


@dataclass(frozen=True, kw_only=True)
class Located:
    """A located autoencoder.

    Attributes:
        where: file or folder.
        family: class name of the network.
        naming: key naming.
        config: content of a config.json.
        tensors: lazy tensors by key, without the prefix in a whole model's file.
        preset: assumed preset, or None.
        assumed: a sentence about what the file does not specify, or None.
    """

    where: str
    family: str
    naming: str
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    preset: str | None = None
    assumed: str | None = None

    @property
    def rules(self) -> Sequence[Rule]:
        """Key table of the naming."""
        return FAMILIES[self.family].rules(self.naming, self.tensors)


def locate(source: Source, config: Config | None = None) -> Located:
    """Locate an autoencoder; arguments and errors as in `loading.open_network`."""
    settings = None if config is None else settings_of(config)
    path, preset = _local(source)
    with naming_broken_links(path):
        return _located(path, preset, settings)


def _located(path: Path, preset: str | None, settings: dict[str, Any] | None) -> Located:
    if path.is_dir() and (path / "model_index.json").is_file():
        path = path / "vae"
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_file(path)
    if path.is_dir():
        settings = settings or read_json(path / "config.json")
        family_of(settings, str(path))
        tensors = open_folder(path, STEM)
    else:
        tensors, metadata = _open_file(path)
        settings = settings or _stored_config(metadata, str(path))
        settings = settings or (presets.PRESETS[preset].config.to_dict() if preset else None)
    match = detect.find(tensors, str(path), family_of(settings, str(path)) if settings else None)
    if match.naming not in FAMILIES[match.family].tables:  # a wrong config: loading lists missing and unknown keys
        match = replace(match, naming="diffusers")
    inside = {key[len(match.prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(match.prefix)}
    opened = Located(where=str(path), family=match.family, naming=match.naming, config=settings or {}, tensors=inside)
    if settings:
        return opened
    names = _presets(opened)
    if not names:
        return _without_preset(opened)
    likely = detect.narrow(names, tensors, metadata, path)
    settings = presets.PRESETS[likely[0]].config.to_dict()
    others = [name for name in likely if not _same_scaling(presets.PRESETS[name].config.to_dict(), settings)]
    assumed = None
    if others:
        override = f"pass config={' or '.join(map(repr, others))} to override"
        assumed = f"{path}: latent scaling unknown, assuming that of {likely[0]}; {override}"
    return replace(opened, family=presets.PRESETS[likely[0]].family, config=settings, preset=likely[0], assumed=assumed)


def _without_preset(opened: Located) -> Located:
    """Derive the architecture from shapes; the scaling is unknown."""
    config = FAMILIES[opened.family].config.from_dict(
        detect.settings(opened.family, opened.naming, _shapes(opened), opened.where)
    )
    factor, assumed = getattr(config, "scaling_factor", None), None
    if opened.family == "AutoencoderKL":
        assumed = f"{opened.where}: latent scaling unknown, assuming a factor of {factor}; pass config= to override"
    elif "latents_mean" in config.to_dict():
        assumed = f"{opened.where}: latent scaling unknown, assuming none; pass config= to override"
    return replace(opened, config=config.to_dict(), assumed=assumed)


def equal_preset(opened: Located) -> str | None:
    """First preset with the same shapes and scaling."""
    names = _presets(opened)
    return next((name for name in names if _same_scaling(presets.PRESETS[name].config.to_dict(), opened.config)), None)


def _presets(opened: Located) -> list[str]:
    """Presets that have all these tensors with these shapes."""
    family = FAMILIES[opened.family]
    shapes = {name: shape for name, shape in _shapes(opened).items() if family.used(name)}.items()
    return [
        name
        for name, preset in presets.PRESETS.items()
        if detect.same_files(preset.family, opened.family) and shapes <= _preset_shapes(name).items()
    ]


def _shapes(opened: Located) -> dict[str, tuple[int, ...]]:
    """Shapes by parameter name in MLX layout; tensors are not read."""
    blank = {name: mx.zeros(stored.shape) for name, stored in opened.tensors.items()}
    return {name: tensor.shape for name, tensor in to_mlx(blank, opened.rules).items() if name != COUNTER}


@cache
def _preset_shapes(name: str) -> dict[str, tuple[int, ...]]:
    preset = presets.PRESETS[name]
    network = FAMILIES[preset.family].build(preset.config.to_dict())  # lazy arrays: nothing is computed
    return {path: tensor.shape for path, tensor in dict(tree_flatten(network.parameters())).items()}


def _same_scaling(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all((a.get(key) or None) == (b.get(key) or None) for key in SCALING)


def family_of(config: Mapping[str, Any], where: str) -> str:
    """Family of a config.json. Networks that diffusers lacks have the suffix `Extended`
    (`AutoencoderKLConfig.to_dict`).

    Raises:
        WeightsError: an unknown class.
    """
    refused.check_config(config, where)
    name = str(config.get("_class_name", "AutoencoderKL"))
    if (family := name.removesuffix("Extended")) not in FAMILIES:
        raise WeightsError(f"{where}: unknown autoencoder class {shortened(name, 60)!r}; known: {', '.join(FAMILIES)}")
    return family


def _local(source: Source) -> tuple[Path, str | None]:
    """Local file or folder, downloaded if necessary; and the name of the preset, if any."""
    if not isinstance(source, str | Path) or not str(source):
        raise WeightsError(f"the model is {source!r}; give a folder, a file, a preset or a hub id")
    path = Path(source).expanduser()
    with suppress(OSError):  # the name may be too long for a file
        if path.exists():
            return path, None
        if reason := missing(path, ""):
            raise WeightsError(f"{path} {reason}")
    text = str(source)
    if preset := presets.find(text):
        return hub.fetch(preset.repository, preset.inside), preset.name
    if folder := presets.registered(text):
        return folder, None
    if isinstance(source, str) and (named := hub.split(source)):
        return hub.fetch(*named), None
    hint = did_you_mean(text, presets.names())
    raise WeightsError(f"{source}: no such file or folder{hint or ';'} known presets: {', '.join(presets.names())}")


def not_downloaded(source: Source) -> presets.Preset | None:
    """The preset that describes a published autoencoder which is neither a local file nor in the hub's cache."""
    text = str(source)
    with suppress(OSError):
        if Path(source).expanduser().exists():
            return None
    preset = presets.published(text)
    if preset is None or presets.registered(text):
        return None
    if presets.find(text):
        return None if hub.has_autoencoder(preset.repository, preset.inside) else preset
    repository, inside = hub.split(text) or (text, "")
    return None if hub.has_autoencoder(repository, inside) else preset


def _only_file(folder: Path) -> Path:
    """The only weights file of a folder without config.json; the encoder of TAESD's two halves."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    halves = [file for file in files if "encoder" in file.stem]
    if len(files) == 1 or (len(files) == 2 and len(halves) == 1):
        return (halves or files)[0]
    if not files:
        raise WeightsError(f"{folder}: no autoencoder: neither config.json nor a weights file")
    raise WeightsError(f"{folder}: no config.json, but {len(files)} weights files; name one of them")


def _open_file(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors and metadata of a file; both halves for TAESD."""
    tensors, metadata = open_weights(path)
    if not tensors or not all(re.fullmatch(r"\d+\.(.*\.)?(weight|bias)", key) for key in tensors):
        return tensors, metadata
    half = "encoder" if "0.weight" in tensors else "decoder"
    other = HALVES[half == HALVES[0]]
    beside = [path.with_name(path.stem.replace(half, other) + suffix) for suffix in (path.suffix, *SUFFIXES)]
    found = next((file for file in beside if file.is_file() and file != path), None)
    if found is None:
        raise WeightsError(f"{path}: this is the {half} of TAESD; put the {other} beside it as {beside[0].name}")
    both = {half: tensors, other: open_weights(found)[0]}
    return {f"{name}.{key}": tensor for name, part in both.items() for key, tensor in part.items()}, metadata


def _stored_config(metadata: Mapping[str, str], where: str) -> dict[str, Any] | None:
    """Configuration stored in the metadata of a file, or None."""
    if CONFIG_KEY not in metadata:
        return None
    try:
        config = parse_json(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: the configuration in its metadata is not readable ({error})") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{where}: the configuration in its metadata is not a JSON object")
    return config


def settings_of(config: Config) -> dict[str, Any]:
    """Content of a config.json from a preset, a file or a dictionary of diffusers or latent-diffusion."""
    if not isinstance(config, Mapping):
        if not (path := Path(config)).is_file():
            if preset := presets.published(str(config)):
                return preset.config.to_dict()
            if folder := presets.registered(str(config)):
                return read_json(folder / "config.json")
            hint = did_you_mean(str(config), presets.names()) or ";"
            known = f"no such file or preset{hint} known presets: {', '.join(presets.names())}"
            raise SettingsError(f"config {config}: {missing(path, known)}")
        config = read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if "_class_name" in config or "block_out_channels" in config:
        return dict(config)
    return AutoencoderKLConfig.from_ddconfig(config).to_dict()


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: not a mapping of settings")
    return content
