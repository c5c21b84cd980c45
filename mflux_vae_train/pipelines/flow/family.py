"""What a family of models stores in which files: all that `flow.files` needs to open and write its pipelines."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae.weights.keymaps.rules import Rule, Tensors
from mflux_vae_train.pipelines.loading.folder import TEXT_STEM

logger = logging.getLogger(__name__)

_BLOCK = re.compile(r"(\w+)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class NetworkFiles:
    """How one network of a pipeline is stored.

    Attributes:
        build: network of a configuration; a `loading.folder.PartialNetwork` may leave out tensors of its file.
        read_config: parsed config.json -> configuration.
        entry: library and class in `model_index.json`.
        stem: name of the weights file in diffusers' layout, without suffix.
        named: tensors of any layout -> tensors under the network's names, which are diffusers' or transformers'.
        quantized: which layers `--quantize` changes, by path; None for none.
        single_file: pattern of a file beside the folders that holds the network if it has no folder.
        stored_bytes: bytes of the published file by configuration and bytes per number, if `build` leaves out a part.
    """

    build: Callable[[Any], nn.Module]
    read_config: Callable[[Mapping[str, Any]], Any]
    entry: tuple[str, str]
    stem: str = TEXT_STEM
    named: Callable[[Tensors], Tensors] = dict
    quantized: Callable[[str], bool] | None = None
    single_file: str | None = None
    stored_bytes: Callable[[Any, int], int] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a pipeline class.

    Configurations of a pipeline are a frozen dataclass with one field per network, named like its folder, and
    `vae` (accepted by `mflux_vae.pretrained.loading.new_network`), `schedule` and `recommended`. The transformer's has
    `in_channels`.

    Attributes:
        class_name: diffusers' pipeline, `_class_name` in `model_index.json`.
        version: first release of diffusers with it.
        networks: by folder, `transformer` first, then the text encoders.
        tokenizers: class in `model_index.json` by folder.
        vae_class: diffusers' autoencoder.
        latent_scale, latent_inputs: pixels per latent in height and width, and inputs of the transformer per channel of
            a latent; for the check that autoencoder and transformer belong together.
        text_widths: width of prompt embeddings that the transformer reads, and that the text encoders give, for the
            same check.
        recognizes: whether these names are all those of a transformer of this family, in any layout.
        config_from_tensors: configuration of a transformer without config.json, from its tensors under our names.
        published: configurations by repository.
        derives_from: repository of the published model that a transformer derives from, by its configuration, by
            `model_index.json` (empty if there is none), and by the folder or file that is opened.
        index: further entries of `model_index.json`, by configurations.
        names: values of ``--model`` and their repositories.
        gated: repositories whose licence has to be accepted before a download.
        vae_file: as `NetworkFiles.single_file`.
        mflux_vae: rules for the autoencoder in folders that mflux saved.
    """

    class_name: str
    version: str
    networks: Mapping[str, NetworkFiles]
    tokenizers: Mapping[str, str]
    vae_class: str
    latent_scale: int
    latent_inputs: int = 1
    text_widths: Callable[[Any], tuple[int, int]]
    recognizes: Callable[[Iterable[str]], bool]
    config_from_tensors: Callable[[Tensors], Any]
    published: Mapping[str, Any]
    derives_from: Callable[[Any, Mapping[str, Any], Path], str]
    index: Callable[[Any], Mapping[str, Any]] = field(default=lambda configs: {})
    names: Mapping[str, str]
    gated: frozenset[str] = frozenset()
    vae_file: str | None = None
    mflux_vae: Sequence[Rule] = ()

    @property
    def stems(self) -> dict[str, str]:
        """Names of weights files by part."""
        return {**{part: files.stem for part, files in self.networks.items()}, "vae": STEM}

    @property
    def single_files(self) -> dict[str, str]:
        """Patterns of single files by part."""
        patterns = {**{part: files.single_file for part, files in self.networks.items()}, "vae": self.vae_file}
        return {part: pattern for part, pattern in patterns.items() if pattern is not None}

    def repository_of(self, model: str) -> str | None:
        """The published repository with this name of `names`, or with this ``owner/name`` in any case."""
        return self.names.get(model) or next((name for name in self.published if name.lower() == model.lower()), None)

    def access(self, repository: str) -> str | None:
        """What the user has to do before a download; None for nothing."""
        if repository not in self.gated:
            return None
        return f"gated, non-commercial: accept the licence on https://huggingface.co/{repository}, then hf auth login"


def block_counts(names: Iterable[str], *kinds: str) -> list[int]:
    """Number of blocks of each kind in tensors named ``{kind}.{number}.*``: the largest number and one."""
    counts = dict.fromkeys(kinds, 0)
    for kind, number in (match.groups() for match in map(_BLOCK.match, names) if match):
        if kind in counts:
            counts[kind] = max(counts[kind], int(number) + 1)
    return list(counts.values())


def taken_by_name(place: Path, repository: str) -> str:
    """`repository`, with a warning that only the name of a file or folder decided between it and its siblings."""
    logger.warning("%s: taken for %s because of its name; rename it if it is another model", place, repository)
    return repository
