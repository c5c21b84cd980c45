"""Prompts and pictures -> conditioning and latents, each encoded once, by this run or an earlier one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mflux_vae.errors import SettingsError
from mflux_vae.images import averaged, load_image, to_pixels
from mflux_vae.utils.prefetch import ahead
from mflux_vae_train.distributed.interrupts import interruptible
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data.batches import EncodedDataset, Latent, Sample
from mflux_vae_train.dreambooth.data.crops import Crop, Shape
from mflux_vae_train.dreambooth.data.dataset import InstanceImage, file_hash, load_mask
from mflux_vae_train.dreambooth.data.encoding_cache import EncodingCache
from mflux_vae_train.pipelines.capabilities import Identifies, Use
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline

PROMPTS_PER_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """Prompts, encoded.

    Attributes:
        rows: where each stands in the conditioning.
    """

    conditioning: Conditioning
    rows: Mapping[str, int]

    def get(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, a batch of one."""
        row = self.rows[prompt]
        return {name: array[row : row + 1] for name, array in self.conditioning.items()}


class CroppedImage(NamedTuple):
    """A picture in one of its views."""

    path: Path
    view: Crop


def open_cache(pipeline: DiffusionPipeline, folder: Path) -> EncodingCache:
    """Where the encodings of a pipeline are kept: nowhere, if it cannot say what encodes."""
    return EncodingCache(folder if isinstance(pipeline, Identifies) else None)


def images_per_batch(resolution: int) -> int:
    """How many pictures an autoencoder or sampler gets together: a million pixels, at most sixteen."""
    return max(1, min(16, 2**20 // resolution**2))


def hash_files(paths: Sequence[Path]) -> str:
    """A hash of the contents of files, in order; their names do not count."""
    digest = hashlib.sha256()
    for content in ahead(file_hash, paths):
        digest.update(bytes.fromhex(content))
    return digest.hexdigest()[:16]


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], store: EncodingCache, *, processes: ProcessGroup = SINGLE
) -> EncodedPrompts:
    """Each prompt once, some at a time; of several processes the first does it for all."""
    unique = list(dict.fromkeys(prompts))
    conditioning = processes.broadcast_arrays(lambda: _conditioning(pipeline, unique, store))
    return EncodedPrompts(conditioning=conditioning, rows={prompt: row for row, prompt in enumerate(unique)})


def _conditioning(pipeline: DiffusionPipeline, unique: Sequence[str], store: EncodingCache) -> Conditioning:
    encoder = _encoder(pipeline, "prompts")
    keys = [{"prompt": prompt, "encoder": encoder} for prompt in unique]
    rows = [store.get(key) for key in keys]
    for start in range(0, len(unique), PROMPTS_PER_BATCH):
        group = slice(start, start + PROMPTS_PER_BATCH)
        if None not in rows[group]:
            continue
        # The groups are fixed, so that no row depends, by a rounding, on which ones were there already.
        found = pipeline.encode_prompts(unique[group])
        mx.eval(found)
        for place, row in enumerate(rows[group]):
            if row is None:
                new = {name: array[place : place + 1] for name, array in found.items()}
                store.put(keys[start + place], new)
                rows[start + place] = new
    known = [row for row in rows if row is not None]
    conditioning = {name: mx.concatenate([row[name] for row in known]) for name in known[0]}
    mx.eval(conditioning)
    return conditioning


def encode_images(
    encode: Callable[[mx.array], mx.array],
    pictures: Sequence[CroppedImage],
    *,
    store: EncodingCache | None = None,
    encoder: str = "",
    processes: ProcessGroup = SINGLE,
) -> list[Latent]:
    """Latents of pictures, some of one shape at a time; files of the next ones are read meanwhile, no more than that.

    Of several processes the first reads files and keeps the store, as what others have may lie on other machines; the
    encoding is shared out.

    Args:
        encode: (B, H, W, 3) in [-1, 1] -> latents.
        encoder: what `encode` is, for the store.
    """
    store = store or EncodingCache(None)
    keys = _keys(pictures, encoder) if processes.is_main else []
    known = [kept["latents"] if (kept := store.get(key)) else None for key in keys]
    latents = {place: latent for place, latent in enumerate(known) if latent is not None}
    there = set(processes.broadcast(lambda: list(latents)))
    pending = [group for group in _alike(pictures) if not there.issuperset(group)]
    coming = ahead(
        lambda one: one.view.of(load_image(one.path)),
        [pictures[place] for group in pending for place in group] if processes.is_main else [],
        limit=max(map(len, pending), default=1) * processes.size,
    )

    def read(groups: Sequence[Sequence[int]]) -> dict[str, mx.array]:
        """uint8 (B, H, W, 3) of each group."""
        return {str(rank): mx.array(np.stack(list(islice(coming, len(one))))) for rank, one in enumerate(groups)}

    def encoded(pixels: mx.array | None) -> list[mx.array]:
        own = [] if pixels is None else [encode(mx.array(to_pixels(np.array(pixels))))]
        mx.eval(own)
        return own

    shown = None if pending and processes.is_main else True
    with tqdm(total=sum(map(len, pending)), desc="latents", unit="picture", disable=shown) as bar:
        for start in range(0, len(pending), processes.size):
            groups = pending[start : start + processes.size]
            pixels = processes.broadcast_arrays(partial(read, groups)).get(str(processes.rank))
            own = interruptible(processes, partial(encoded, pixels))
            for group, found in zip(groups, processes.gather_arrays(own), strict=False):
                for place, latent in zip(group, found[0], strict=True):
                    if processes.is_main and place not in latents:
                        latents[place] = latent
                        store.put(keys[place], {"latents": latent})
                bar.update(len(group))
    everyones = processes.broadcast_arrays(lambda: {str(place): latents[place] for place in range(len(pictures))})
    return list(everyones.values())


def _keys(pictures: Sequence[CroppedImage], encoder: str) -> list[dict[str, object]]:
    """What each picture's latents are kept under."""
    paths = list(dict.fromkeys(one.path for one in pictures))
    contents = dict(zip(paths, ahead(file_hash, paths), strict=True))
    return [{"picture": contents[one.path], "view": astuple(one.view), "encoder": encoder} for one in pictures]


def _alike(pictures: Sequence[CroppedImage]) -> list[list[int]]:
    """Numbers of pictures that are encoded together. Which ones are does not depend on what is in the store, so that
    no latent does by a rounding."""
    by_shape: dict[Shape, list[int]] = {}
    for place, one in enumerate(pictures):
        by_shape.setdefault(one.view.shape, []).append(place)
    groups = []
    for (height, width), places in by_shape.items():
        size = images_per_batch(math.isqrt(height * width))
        groups += [places[start : start + size] for start in range(0, len(places), size)]
    return groups


def encode_dataset(
    pipeline: DiffusionPipeline,
    images: Sequence[InstanceImage],
    prompts: EncodedPrompts,
    concepts: Sequence[Concept],
    store: EncodingCache,
    *,
    class_pictures: Sequence[Sequence[Path]] | None,
    preserves_output: bool,
    processes: ProcessGroup = SINGLE,
) -> EncodedDataset:
    """Encodes all pictures; nothing else of them is needed after it.

    Args:
        concepts: with nothing left open.
        class_pictures: by concept; None where there are none.

    Raises:
        SettingsError: there are masks, and latents that are no pictures.
    """
    encoder = _encoder(pipeline, "images")

    def encoded(pictures: Sequence[CroppedImage]) -> list[Latent]:
        return encode_images(pipeline.encode_images, pictures, store=store, encoder=encoder, processes=processes)

    # every view of every instance picture, numbered
    latents = encoded([CroppedImage(one.path, view) for one in images for row in one.views for view in row])
    numbers = count()
    entries = [[[next(numbers) for _ in row] for row in one.views] for one in images]
    samples = [
        Sample(
            entries=own,
            prompt=prompts.rows[one.caption],
            class_prompt=None if (asked := concepts[one.concept].class_prompt) is None else prompts.rows[asked],
            concept=one.concept,
        )
        for one, own in zip(images, entries, strict=True)
        for _ in range(concepts[one.concept].repeats or 1)
    ]

    # beside each shape of instance pictures, class pictures cut to it
    prior: dict[tuple[int, tuple[int, ...]], Sequence[Latent]] | None = None
    if class_pictures is not None:
        shapes = {(one.concept, one.shape): latents[own[0][0]].shape for one, own in zip(images, entries, strict=True)}
        prior = {
            (concept, shape): encoded([CroppedImage(path, Crop(shape=pixels)) for path in class_pictures[concept]])
            for (concept, pixels), shape in shapes.items()
        }
    return EncodedDataset(
        samples=samples,
        latents=latents,
        masks=_masks(images, entries, latents) if any(one.mask for one in images) else None,
        prior=prior,
        prompts=prompts.conditioning,
        empty=prompts.rows[""],
        preserves_output=preserves_output,
    )


def _masks(
    images: Sequence[InstanceImage], entries: Sequence[Sequence[Sequence[int]]], latents: Sequence[Latent]
) -> list[mx.array]:
    """What each place of the latents counts, (h, w, 1) in [0, 1]: the grey of the mask, averaged over the place."""
    masks = []
    for one, own in zip(images, entries, strict=True):
        grey = None if one.mask is None else load_mask(one.mask)
        for views, numbers in zip(one.views, own, strict=True):
            for view, number in zip(views, numbers, strict=True):
                shape = latents[number].shape
                if len(shape) != 3:
                    raise SettingsError(f"--masked_loss needs latents that are pictures, and these are {shape}")
                levels = np.full(shape[:2], 255) if grey is None else averaged(view.of(grey), shape[:2])
                masks.append(mx.array(levels.reshape(*shape[:2], 1).astype(np.float32) / 255))
    return masks


def _encoder(pipeline: DiffusionPipeline, use: Use) -> str:
    return pipeline.encoder_identity(use) if isinstance(pipeline, Identifies) else ""
