"""A pipeline's files on the Hugging Face hub: which of them are needed, and their download."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from mflux_vae.pretrained.hub import cached, download, file_hashes

logger = logging.getLogger(__name__)

SMALL_FILES = (
    *("model_index.json", "recommended.json", "*/*.json"),
    *(f"tokenizer*/*.{kind}" for kind in ("txt", "model", "jinja")),
)
"""Patterns of configurations and tokenizers, their chat templates included."""


def weight_files(stems: Mapping[str, str], variant: str | None) -> list[str]:
    """Patterns of the weights of some parts: one file or shards, of one variant, so that nothing is downloaded twice.

    Args:
        stems: name of the weights file by part.
        variant: such as "fp16".
    """
    middle = "" if variant is None else f".{variant}"
    shards = ("", "-?????-of-?????")
    files = [f"{part}/{stem}{middle}{shard}.safetensors" for part, stem in stems.items() for shard in shards]
    return [*files, *(f"{part}/[0-9]*.safetensors" for part in stems)]  # the latter are mflux's names


class Snapshot:
    """Files of a repository in the hub's cache. Calling it returns their folder and downloads what is missing.

    Args:
        revision: branch, tag or commit; None for the main branch.
        stems: parts to download, the denoiser first, and the names of their weights files.
        variant: of the weights files, such as "fp16".
        single_files: patterns of files that hold whole networks, downloaded if the denoiser has no folder.
        is_stored: whether a folder holds the weights of a part.

    Attributes:
        variant: as given.
    """

    def __init__(
        self,
        repository: str,
        *,
        revision: str | None,
        variant: str | None,
        stems: Mapping[str, str],
        single_files: Sequence[str] = (),
        is_stored: Callable[[Path, str, str | None], bool],
    ) -> None:
        self.repository, self.variant, self._revision, self._is_stored = repository, variant, revision, is_stored
        self._stems, self._single_files = dict(stems), single_files
        self._folder: Path | None = None

    def __call__(self) -> Path:
        """
        Raises:
            WeightsError: see `mflux_vae.pretrained.hub.download`.
        """
        if self._folder is None:
            patterns = [*SMALL_FILES, *weight_files(self._stems, self.variant)]
            folder = download(self.repository, patterns, self._revision)
            if self._single_files and not any((folder / self.parts[0]).glob("*.safetensors")):
                folder = download(self.repository, [*patterns, *self._single_files], self._revision)
            logger.info("%s: in %s", self.repository, folder)
            self._folder = folder
        return self._folder

    @property
    def parts(self) -> list[str]:
        """Names of the parts whose weights are downloaded."""
        return list(self._stems)

    def skip(self, parts: Collection[str]) -> None:
        """Do not download the weights of these parts from now on."""
        self._stems = {part: stem for part, stem in self._stems.items() if part not in parts}

    def lists_same_files(self, other: Snapshot, folders: Sequence[str]) -> bool:
        """Whether the hub lists the same weights and tokenizers in both; False if it cannot be reached.

        Args:
            folders: names of parts and tokenizers.
        """
        ours, theirs = (one._listed(folders) for one in (self, other))
        return ours == theirs and all(any(path.startswith(f"{folder}/") for path in ours) for folder in folders)

    def _listed(self, folders: Sequence[str]) -> dict[str, str]:
        """Hashes of files by path."""
        patterns = weight_files({part: stem for part, stem in self._stems.items() if part in folders}, self.variant)
        patterns += [f"{folder}/*" for folder in folders if folder.startswith("tokenizer")]
        hashes = file_hashes(self.repository, self._revision)
        return {path: found for path, found in hashes.items() if any(fnmatch(path, one) for one in patterns)}

    def is_cached(self) -> bool:
        """Whether nothing has to be downloaded. The hub is not contacted."""
        folder = cached(self.repository, self._revision)
        return folder is not None and all(self._is_stored(folder, part, self.variant) for part in self.parts)
