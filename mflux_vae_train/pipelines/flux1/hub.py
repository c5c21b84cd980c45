"""FLUX.1 on the hub: what is known before a download, and the download of what is needed and no more."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained.hub import cache_folder, cached, download
from mflux_vae.weights.formats.files import open_folder
from mflux_vae.weights.keymaps.diffusers import STEM
from mflux_vae_train.pipelines.flux1 import folder as layout
from mflux_vae_train.pipelines.flux1 import weights
from mflux_vae_train.pipelines.flux1.configs import PUBLISHED, REPOSITORIES, published
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.flux1.weights import TEXT_STEM, saved_by_mflux, single_file
from mflux_vae_train.pipelines.lazy import Lazy

logger = logging.getLogger(__name__)

_STEMS = {"transformer": STEM, "vae": STEM, "text_encoder": TEXT_STEM, "text_encoder_2": TEXT_STEM}
_SMALL = ("model_index.json", "recommended.json", "*/*.json", "tokenizer*/*.txt", "tokenizer*/*.model")
_SINGLE = ("flux1-*.safetensors", "ae.safetensors")


def open_repository(model: str, *, revision: str | None = None, variant: str | None = None) -> FluxPipeline:
    """A pipeline whose parts are downloaded, all together, when the first is needed.

    Args:
        model: `schnell`, `dev` or `owner/name`. The former's configurations are known; the latter's are downloaded.
        revision, variant: see `flux1.load`.

    Raises:
        WeightsError: see `mflux_vae.pretrained.hub.download`.
    """
    snapshot = Snapshot(REPOSITORIES.get(model, model), revision, variant)
    configs = PUBLISHED.get(snapshot.repository) if revision is None else None
    if configs is None:
        configs = layout.read_configs(download(snapshot.repository, _SMALL, revision))
    return FluxPipeline(**layout.parts(configs, snapshot, dtype=None, variant=variant), name=model, snapshot=snapshot)


def open_file(file: Path) -> FluxPipeline:
    """A pipeline of a transformer in a file, and of the other parts of the published model that it is a kind of.

    Raises:
        WeightsError: the file holds no such transformer, or is broken.
    """
    config = weights.told_by_weights(file)
    known = published(config.guidance_embeds)
    snapshot = Snapshot(
        REPOSITORIES["dev" if config.guidance_embeds else "schnell"], None, None, parts=_STEMS.keys() - {"transformer"}
    )
    parts = layout.parts(replace(known, transformer=config), snapshot, dtype=None, variant=None)
    parts["transformer"] = Lazy(lambda: weights.transformer(file, config), config=config)
    logger.info("%s: all but the transformer is that of %s", file, snapshot.repository)
    return FluxPipeline(**parts, name=file.stem, snapshot=snapshot)


class Snapshot:
    """A repository's files in the hub's cache; calling it gives their folder, after a download where one is needed.

    Args:
        parts: those that are wanted; None for all.
    """

    def __init__(
        self, repository: str, revision: str | None, variant: str | None, *, parts: Collection[str] | None = None
    ) -> None:
        self.repository, self._revision, self._variant = repository, revision, variant
        self.parts = _STEMS.keys() if parts is None else parts
        self._place: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether all of the model is from there."""
        return set(self.parts) == _STEMS.keys()

    def __call__(self) -> Path:
        """
        Raises:
            WeightsError: see `mflux_vae.pretrained.hub.download`.
        """
        if self._place is None:
            place = download(self.repository, patterns(self._variant, self.parts), self._revision)
            # Black Forest Labs' file is all there is
            if self.whole and not any((place / "transformer").glob("*.safetensors")):
                place = download(self.repository, [*patterns(self._variant), *_SINGLE], self._revision)
            logger.info("%s: in %s", self.repository, place)
            self._place = place
        return self._place

    def is_here(self) -> bool:
        """Whether nothing is to be downloaded any more; asks nobody."""
        place = cached(self.repository, self._revision)
        return place is not None and all(self._has(place, part) for part in self.parts)

    def cache(self) -> Path:
        """The folder that downloads go to."""
        return cache_folder()

    def _has(self, place: Path, part: str) -> bool:
        if saved_by_mflux(place / part) or single_file(place, part) is not None:
            return True
        try:
            open_folder(place / part, _STEMS[part], self._variant)
        except WeightsError:  # none, or some shards of them
            return False
        return True


def patterns(variant: str | None, parts: Collection[str] = _STEMS.keys()) -> Sequence[str]:
    """Files of a repository that a pipeline is made of: not those of other variants, nor the same weights twice.

    Args:
        parts: whose weights.
    """
    middle = "" if variant is None else f".{variant}"
    files = [
        f"{part}/{stem}{middle}{rest}.safetensors"
        for part, stem in _STEMS.items()
        if part in parts
        for rest in ("", "-?????-of-?????")  # one file, or shards
    ]
    return [
        *_SMALL,
        *files,
        *(f"{part}/[0-9]*.safetensors" for part in _STEMS if part in parts),
    ]  # the last are mflux's
