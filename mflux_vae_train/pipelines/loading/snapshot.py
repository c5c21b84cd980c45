"""A pipeline's files on the Hugging Face hub: which of them are needed, and their download."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mflux_vae.pretrained.hub import cached, download

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
        parts: names of the parts.
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
        self.repository, self.parts = repository, list(stems)
        self.variant, self._revision, self._is_stored = variant, revision, is_stored
        self._patterns = [*SMALL_FILES, *weight_files(stems, variant)]
        self._single_files = single_files
        self._folder: Path | None = None

    def __call__(self) -> Path:
        """
        Raises:
            WeightsError: see `mflux_vae.pretrained.hub.download`.
        """
        if self._folder is None:
            folder = download(self.repository, self._patterns, self._revision)
            if self._single_files and not any((folder / self.parts[0]).glob("*.safetensors")):
                folder = download(self.repository, [*self._patterns, *self._single_files], self._revision)
            logger.info("%s: in %s", self.repository, folder)
            self._folder = folder
        return self._folder

    def is_cached(self) -> bool:
        """Whether nothing has to be downloaded. The hub is not contacted."""
        folder = cached(self.repository, self._revision)
        return folder is not None and all(self._is_stored(folder, part, self.variant) for part in self.parts)
