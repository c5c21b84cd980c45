"""Open and write the pipelines of a family: folders, repositories on the hub, and single files of a transformer.

Folders are in diffusers' layout (see `pipelines.loading.folder`), or saved by mflux and then without configurations.
Networks that lack a folder may lie in a single file beside the others. Tensors are read when they are first used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.hub import cache_folder, download
from mflux_vae.pretrained.loading import new_network, open_network
from mflux_vae.runtime.device import compute_dtype
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import open_folder, open_weights, read_json, write_json
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Tensors, load_strict, to_mlx
from mflux_vae_train.pipelines.flow.family import Family
from mflux_vae_train.pipelines.footprint import Footprint, Phase, autoencoder_weights, weight_bytes
from mflux_vae_train.pipelines.loading.config_check import check_config
from mflux_vae_train.pipelines.loading.folder import (
    RECOMMENDED,
    fill,
    read_file,
    read_recommended,
    read_tensors,
    saved_by_mflux,
)
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.loading.snapshot import SMALL_FILES, Snapshot
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.quantization import adopt_quantization
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer

logger = logging.getLogger(__name__)

P = TypeVar("P")
Pipeline = Callable[..., P]
"""A class whose arguments are those of `flow.pipeline.FlowPipeline`."""

TRANSFORMER = "transformer"


def load(
    family: Family,
    pipeline: Pipeline[P],
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
) -> P:
    """Open a published model by name, a folder, a file, or a repository on the hub.

    Weights are downloaded and read when they are first used, and for published models configurations, too.

    Args:
        model: a value of ``--model``: a name of the family, `owner/name`, a folder, or a file of the transformer; the
            other parts are then those of the published model.
        revision: of the repository: a branch, a tag or a commit.
        variant: of the weights files, such as "fp16".
        vae: another autoencoder, see `parts.open_vae`.

    Raises:
        SettingsError: a configuration needs an unsupported option, or the other autoencoder does not fit.
        WeightsError: the folder is incomplete, its weights are another model's, or the repository cannot be reached.
    """
    place = Path(model).expanduser()
    if place.is_dir():
        opened = open_local(family, pipeline, place, variant=variant)
    elif place.is_file():
        opened = open_file(family, pipeline, place)
    else:
        opened = open_repository(family, pipeline, model, revision=revision, variant=variant)
    if vae is not None:
        opened.replace_vae(vae)  # type: ignore[attr-defined]
    return opened


def opens(family: Family, place: Path) -> bool:
    """Whether a file holds the family's transformer, or mflux saved a pipeline of the family in a folder.

    Folders with a `model_index.json` are opened by its class instead.
    """
    try:
        if place.is_file():
            return family.recognizes(open_weights(place)[0])
        return _is_mflux_folder(family, place)
    except WeightsError:
        return False


def open_local(
    family: Family, pipeline: Pipeline[P], folder: Path, *, dtype: mx.Dtype | None = None, variant: str | None = None
) -> P:
    """Open a folder; arguments and errors as in `load` and `open_parts`."""
    configs = read_configs(family, folder)
    parts = open_parts(family, configs, lambda: folder, dtype=dtype, variant=variant)
    parts.check()
    return pipeline(parts, configs, name=folder.resolve().name)


def open_repository(
    family: Family, pipeline: Pipeline[P], model: str, *, revision: str | None = None, variant: str | None = None
) -> P:
    """Open a repository. Configurations are downloaded now unless the repository is a published one.

    Arguments and errors as in `load`.
    """
    repository = family.repository_of(model) or model
    configs = family.published.get(repository) if revision is None else None
    if configs is None:
        configs = read_configs(family, download(repository, SMALL_FILES, revision))
    snapshot = Snapshot(
        repository,
        revision=revision,
        variant=variant,
        stems=family.stems,
        single_files=list(family.single_files.values()),
        is_stored=partial(is_stored, family),
    )
    parts = open_parts(family, configs, snapshot, variant=variant)
    return pipeline(parts, configs, name=model, snapshot=snapshot, base_model=repository)


def open_file(family: Family, pipeline: Pipeline[P], file: Path) -> P:
    """Open a transformer in a file; the other parts are those of the published model that it derives from.

    Raises:
        WeightsError: the file is broken, holds no transformer of this family, or one of another width.
    """
    transformer = config_from_weights(family, file)
    repository = family.derives_from(transformer, {}, file)
    configs = replace(family.published[repository], transformer=transformer)
    _check_that_they_fit(family, configs, file)
    snapshot = Snapshot(
        repository,
        revision=None,
        variant=None,
        stems={part: stem for part, stem in family.stems.items() if part != TRANSFORMER},
        is_stored=partial(is_stored, family),
    )
    logger.info("%s: all parts but the transformer are those of %s", file, repository)
    parts = open_parts(family, configs, snapshot, transformer_file=file)
    parts.networks[TRANSFORMER].borrow()  # compares names and shapes; values are not read
    return pipeline(parts, configs, name=file.stem, snapshot=snapshot)


def read_configs(family: Family, folder: Path) -> Any:
    """Read the configurations of a folder's parts; no weights are read.

    Raises:
        WeightsError: it holds another pipeline, or a configuration is missing or broken.
        SettingsError: a configuration needs an unsupported option.
    """
    of_mflux = _is_mflux_folder(family, folder)
    index = {} if of_mflux else read_json(folder / "model_index.json")
    if not of_mflux and (kind := index.get("_class_name")) != family.class_name:
        raise WeightsError(f"{folder}: holds a {kind}; {family.class_name} opens folders of {family.class_name}")
    transformer = _read_config(family, folder, TRANSFORMER) or config_from_weights(family, folder)
    known = family.published[family.derives_from(transformer, index, folder)]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = known.schedule
    if scheduler.is_file() or not of_mflux:
        schedule = check_config(lambda: type(known.schedule).from_dict(read_json(scheduler)), scheduler)
    encoders = {part: _read_config(family, folder, part) for part in family.networks if part != TRANSFORMER}
    configs = replace(
        known,
        transformer=transformer,
        **{part: config for part, config in encoders.items() if config is not None},
        vae=_config_json(family, folder, "vae") or known.vae,
        schedule=schedule,
        recommended=read_recommended(folder) or known.recommended,
    )
    _check_that_they_fit(family, configs, folder)
    return configs


def open_parts(
    family: Family,
    configs: Any,
    folder: Callable[[], Path],
    *,
    dtype: mx.Dtype | None = None,
    variant: str | None = None,
    transformer_file: Path | None = None,
) -> Parts:
    """The parts of a folder, each loaded on first use.

    Args:
        folder: returns the folder, and may download it.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".
        transformer_file: file of the transformer, if it is not in the folder.
    """

    def network(part: str) -> Lazy[Any]:
        place = (lambda: transformer_file) if transformer_file and part == TRANSFORMER else folder
        config = getattr(configs, part)
        return Lazy(lambda: open_part(family, part, config, place(), dtype, variant), prepare=place)

    return parts_of(
        family,
        {part: network(part) for part in family.networks},
        Lazy(lambda: open_autoencoder(family, configs.vae, folder(), dtype, variant), prepare=folder),
        {name: LazyTokenizer(lambda name=name: folder() / name) for name in family.tokenizers},  # type: ignore[misc]
    )


def parts_of(
    family: Family, networks: Mapping[str, Any], vae: VAE | Lazy[VAE], tokenizers: Mapping[str, LazyTokenizer]
) -> Parts:
    """Parts of networks by the names of their folders, lazy or not."""
    return Parts(
        networks={part: Lazy.of(networks[part]) for part in family.networks},
        vae=Lazy.of(vae),
        tokenizers=tokenizers,
        quantized={part: files.quantized for part, files in family.networks.items() if files.quantized is not None},
    )


def write(family: Family, parts: Parts, configs: Any, folder: Path, dtype: str) -> None:
    """Write every part, and last `model_index.json`, which makes the folder a pipeline.

    Raises:
        SettingsError: an unknown dtype.
    """
    parts.save(folder, dtype, family.stems)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.schedule.to_dict())
    write_json(folder / RECOMMENDED, asdict(configs.recommended))
    entries = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", family.vae_class],
        **{part: list(files.entry) for part, files in family.networks.items()},
        **{name: ["transformers", kind] for name, kind in family.tokenizers.items()},
    }
    head = {"_class_name": family.class_name, "_diffusers_version": family.version, **family.index(configs)}
    write_json(folder / "model_index.json", {**head, **dict(sorted(entries.items()))})


def open_part(
    family: Family, part: str, config: Any, place: Path, dtype: mx.Dtype | None = None, variant: str | None = None
) -> nn.Module:
    """Open a network in a pipeline's folder, or in a file.

    Args:
        place: the folder or the file.
        dtype: to compute in; None for float32 on a CPU, bfloat16 elsewhere.
        variant: of the weights files, such as "fp16".

    Raises:
        WeightsError: there are no weights, or their names or shapes differ; all differences are listed.
    """
    source, tensors = _tensors(family, part, place, variant)
    return fill(family.networks[part].build(config), tensors, source, dtype)


def open_autoencoder(
    family: Family,
    config: Mapping[str, Any],
    folder: Path,
    dtype: mx.Dtype | None = None,
    variant: str | None = None,
) -> VAE:
    """Open the autoencoder; arguments and errors as in `open_part`."""
    place = folder / "vae"
    if saved_by_mflux(place):
        return autoencoder_of_mflux(family, config, read_tensors(place, STEM), str(place), dtype)
    of_variant = place / f"{STEM}.{variant}.safetensors"
    if (file := of_variant if of_variant.is_file() else _single_file(family, folder, "vae")) is not None:
        return VAE(network=open_network(file, dtype, config=config))
    return VAE(network=open_network(place, dtype))


def autoencoder_of_mflux(
    family: Family, config: Mapping[str, Any], tensors: Tensors, source: str, dtype: mx.Dtype | None = None
) -> VAE:
    """An autoencoder with arrays under mflux's names; `source` is for messages. Errors as in `open_part`."""
    network = new_network(config)
    parameters: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    # mflux does not count the batches that running statistics are from
    counters = {name: array for name, array in parameters.items() if not mx.issubdtype(array.dtype, mx.floating)}
    ready = adopt_quantization(network, to_mlx(tensors, family.mflux_vae), source, keep=False)
    load_strict(network, counters | ready, where=source, dtype=compute_dtype(dtype or mx.float32))
    return VAE(network=network.eval())


def config_from_weights(family: Family, place: Path) -> Any:
    """Configuration of a transformer as its tensors show it.

    Args:
        place: a pipeline's folder, or a file.

    Raises:
        WeightsError: there is no transformer.
    """
    return family.config_from_tensors(_tensors(family, TRANSFORMER, place)[1])


def is_stored(family: Family, folder: Path, part: str, variant: str | None = None) -> bool:
    """Whether a pipeline's folder holds all weights of a part."""
    if saved_by_mflux(folder / part) or _single_file(family, folder, part) is not None:
        return True
    try:
        open_folder(folder / part, family.stems[part], variant)
    except WeightsError:  # none, or only some shards
        return False
    return True


def footprint(family: Family, configs: Any, phases: list[Phase], snapshot: Snapshot | None) -> Footprint:
    """The phases of a run, and the download before it."""
    if snapshot is None or snapshot.is_cached():
        return Footprint(phases=phases)
    download = published_bytes(family, configs, snapshot.parts)
    access = family.access(snapshot.repository)
    return Footprint(phases=phases, download=download, cache=cache_folder(), access=access)


def published_bytes(family: Family, configs: Any, parts: Collection[str]) -> int:
    """Bytes of some parts as they are published, in bfloat16."""
    total = autoencoder_weights(configs.vae, 2) if "vae" in parts else 0
    for part in family.networks.keys() & parts:
        files, config = family.networks[part], getattr(configs, part)
        total += (files.stored_bytes or partial(weight_bytes, files.build))(config, 2)
    return total


def _is_mflux_folder(family: Family, folder: Path) -> bool:
    """Whether mflux saved a pipeline of the family there, without a `model_index.json`."""
    if (folder / "model_index.json").is_file() or not saved_by_mflux(folder / TRANSFORMER):
        return False
    if not all((folder / part).is_dir() for part in family.networks):
        return False
    return family.recognizes(read_tensors(folder / TRANSFORMER, STEM))


def _single_file(family: Family, folder: Path, part: str) -> Path | None:
    """The file of a part whose folder has no weights."""
    pattern = family.single_files.get(part)
    if pattern is None or any(any((folder / part).glob(f"*{kind}")) for kind in (".safetensors", ".bin")):
        return None
    return min(folder.glob(pattern), default=None)


def _tensors(family: Family, part: str, where: Path, variant: str | None = None) -> tuple[Path, dict[str, mx.array]]:
    """File or folder of a network, and its tensors under our names."""
    file = where if where.is_file() else _single_file(family, where, part)
    place, files = file or where / part, family.networks[part]
    return place, dict(files.named(read_file(place) if file else read_tensors(place, files.stem, variant)))


def _config_json(family: Family, folder: Path, part: str) -> dict[str, Any] | None:
    """A part's config.json; None if it is missing and the layout of the weights implies it."""
    file = folder / part / "config.json"
    implied = saved_by_mflux(folder / part) or _single_file(family, folder, part) is not None
    return None if implied and not file.is_file() else read_json(file)


def _read_config(family: Family, folder: Path, part: str) -> Any:
    config, read = _config_json(family, folder, part), family.networks[part].read_config
    return None if config is None else check_config(lambda: read(config), folder / part / "config.json")


def _check_that_they_fit(family: Family, configs: Any, place: Path) -> None:
    vae = VAE(network=new_network(configs.vae))  # its random weights are lazy and never computed
    packed, inputs = family.latent_inputs * vae.latent_channels, configs.transformer.in_channels
    if (vae.spatial_scale, inputs) != (family.latent_scale, packed):
        raise WeightsError(
            f"{place}: autoencoder and transformer do not belong together: latents of {vae.latent_channels} channels "
            f"at 1/{vae.spatial_scale} of the size, and {inputs} inputs; {packed} inputs and 1/{family.latent_scale} "
            "are needed"
        )
    read, given = family.text_widths(configs)
    if read != given:
        raise WeightsError(
            f"{place}: text encoder and transformer do not belong together: embeddings of width {given} are given, "
            f"and {read} is needed"
        )
