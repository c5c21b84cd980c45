"""Files of DINO and CLIP, in a folder or in the cache of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.pretrained import hub
from mflux_vae.runtime.device import eval_each
from mflux_vae.utils.links import missing
from mflux_vae.weights.formats.files import read_folder, read_json
from mflux_vae.weights.formats.lazy_tensor import check_numbers
from mflux_vae.weights.keymaps.rules import Tensors, load_strict
from mflux_vae_train.pipelines.loading.config_check import check_config

T = TypeVar("T")

_SMALL_FILES = ("config.json", "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
"""transformers' names of weights files, by kind; safetensors are preferred."""


def locate(source: str | Path) -> Path:
    """A file or folder as given, or the cached snapshot of a hub repository, downloaded if necessary.

    Raises:
        WeightsError: there is no such file, folder or repository, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    repository = hub.split(str(source))
    if repository is None or repository[1]:
        raise WeightsError(f"{source}: {missing(path, 'no such file or folder')}; give a folder or OWNER/NAME")
    name = repository[0]
    try:
        for kind, stem in _STEMS.items():
            files = [f"{stem}{end}" for end in (f".{kind}", f"-*.{kind}", f".{kind}.index.json")]
            folder = hub.download(name, [*_SMALL_FILES, *files])
            if any(folder.glob(f"{stem}*.{kind}")):
                return folder
    except WeightsError as error:
        raise WeightsError(f"{error}; or give a folder with its files, from: hf download {name}") from error
    raise WeightsError(f"{name}: it has no {' and no '.join(f'{stem}.{kind}' for kind, stem in _STEMS.items())}")


def read_config(file: Path, read: Callable[[Mapping[str, Any]], T]) -> T:
    """A config.json as a dataclass.

    Raises:
        WeightsError: the file is missing or broken.
        SettingsError: another kind of model, or an unsupported option.
    """
    values = read_json(file)
    try:
        return check_config(lambda: read(values), file)
    except SettingsError as error:
        raise SettingsError(f"{file}: {error}") from error


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Tensors of a folder: safetensors, else a torch file, both under transformers' names.

    Raises:
        WeightsError: no weights, or a broken file.
    """
    found = [stem for kind, stem in _STEMS.items() if any(folder.glob(f"{stem}*.{kind}"))]
    return read_folder(folder, [*found, _STEMS["safetensors"]][0])


def fill(network: nn.Module, tensors: Tensors, where: Path) -> None:
    """Load all weights, in float32.

    Raises:
        WeightsError: names or shapes differ (all differences are listed), or values are not finite.
    """
    load_strict(network, tensors, where=str(where), dtype=mx.float32)
    eval_each(network.parameters())
    check_numbers(dict(tree_flatten(network.parameters())), str(where), "weights")
