"""Prompts and images -> conditioning and latents. Each is encoded once, by this run or by an earlier one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import averaged, content_hash, load_image, load_mask, to_pixels
from mflux_vae.runtime.threads import exclusive
from mflux_vae.utils.arrays import flaw, one_colour
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.item_bar import item_bar
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.distributed.interrupts import interruptible
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data.batches import ClassKey, EncodedDataset, Sample
from mflux_vae_train.dreambooth.data.crops import Crop, Shape
from mflux_vae_train.dreambooth.data.dataset import InstanceImage
from mflux_vae_train.dreambooth.data.encoding_cache import EncodingCache
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import (
    SupportsEncodingCache,
    SupportsSizeConditioning,
    SupportsTrimming,
    Use,
)
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline

PROMPTS_PER_BATCH = 16

_CAUSE = "weights of the {} are not finite, or the device failed; take another file of them, or run the command again"

SHOWN_PROMPT = 60
"""Characters of a prompt in messages."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """
    Attributes:
        conditioning: arrays with one row per prompt.
        rows: prompt -> row.
    """

    conditioning: Conditioning
    rows: Mapping[str, int]

    def get(self, prompt: str) -> Conditioning:
        """The conditioning of one prompt, a batch of one."""
        row = self.rows[prompt]
        return {name: array[row : row + 1] for name, array in self.conditioning.items()}


@dataclass(frozen=True)
class CroppedImage:
    """A crop of an image file.

    Attributes:
        content: hash of the file, if it is known.
        pixels: the crop before mirroring, if it is in memory.
    """

    path: Path
    crop: Crop
    content: str | None = None
    pixels: np.ndarray | None = None

    def load(self) -> np.ndarray:
        """uint8 (*crop.shape, 3)."""
        if self.pixels is not None:
            return self.crop.mirror(self.pixels)
        return self.crop.apply(load_image(self.path, notes=ImageNotes()))  # the scan reported what it noted


def open_cache(pipeline: DiffusionPipeline, folder: Path, processes: ProcessGroup = SINGLE) -> EncodingCache:
    """The cache of the first process, if the pipeline can identify its encoders. Otherwise nothing is kept."""
    return EncodingCache(folder if processes.is_main and isinstance(pipeline, SupportsEncodingCache) else None)


def images_per_batch(resolution: int) -> int:
    """Images that an autoencoder or sampler processes together: a million pixels, at most sixteen images."""
    return max(1, min(16, 2**20 // resolution**2))


def encode_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], cache: EncodingCache, *, processes: ProcessGroup = SINGLE
) -> EncodedPrompts:
    """Encode each distinct prompt once, in batches. The first process encodes for all."""
    unique = list(dict.fromkeys(prompts))
    conditioning = processes.broadcast_arrays(lambda: _conditioning(pipeline, unique, cache))
    return EncodedPrompts(conditioning=conditioning, rows={prompt: row for row, prompt in enumerate(unique)})


def trimmed(pipeline: DiffusionPipeline, prompts: EncodedPrompts, used: Sequence[str]) -> EncodedPrompts:
    """The prompts that the updates use, without padding that none of them needs, if results do not depend on it."""
    if not isinstance(pipeline, SupportsTrimming):
        return prompts
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(used))}
    taken = mx.array([prompts.rows[prompt] for prompt in rows])
    conditioning = pipeline.trim({name: array[taken] for name, array in prompts.conditioning.items()})
    mx.eval(conditioning)
    return EncodedPrompts(conditioning=conditioning, rows=rows)


def _conditioning(pipeline: DiffusionPipeline, prompts: Sequence[str], cache: EncodingCache) -> Conditioning:
    encoder = "" if cache.folder is None else _encoder_identity(pipeline, "prompts")  # which may read weights
    keys = [{"prompt": prompt, "encoder": encoder} for prompt in prompts]
    rows = [cache.get(key) for key in keys]
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch = slice(start, start + PROMPTS_PER_BATCH)
        if None not in rows[batch]:
            continue
        # Rounding may depend on the batch, so batches do not depend on the cache.
        encoded = checks.encode_prompts(pipeline, prompts[batch])
        with exclusive():
            mx.eval(encoded)
        for index, row in enumerate(rows[batch]):
            if row is None:
                rows[start + index] = new = {name: array[index : index + 1] for name, array in encoded.items()}
                _check_embeddings(new.values(), prompts[start + index])
                cache.put(keys[start + index], new)
    complete = [row for row in rows if row is not None]
    checks.check_rows(pipeline, complete)
    conditioning = {name: mx.concatenate([row[name] for row in complete]) for name in complete[0]}
    mx.eval(conditioning)
    return conditioning


def encode_images(
    encode: Callable[[mx.array], mx.array],
    images: Sequence[CroppedImage],
    *,
    cache: EncodingCache | None = None,
    encoder: str = "",
    processes: ProcessGroup = SINGLE,
) -> list[mx.array]:
    """Encode images in batches of one shape, reading at most one batch ahead.

    All processes encode; the first one reads the files and keeps the cache, as others may lack the files.

    Args:
        encode: (B, H, W, 3) in [-1, 1] -> latents.
        encoder: identity of `encode`, a part of the cache keys.

    Returns:
        one array per image, without a batch axis.
    """
    cache = cache or EncodingCache(None)
    keys = _cache_keys(images, encoder) if processes.is_main else []
    cached = [cache.get(key) for key in keys]
    # a failure of an earlier version may have left constant latents: those are computed again, and judged
    latents = {
        index: arrays["latents"]
        for index, arrays in enumerate(cached)
        if arrays is not None and flaw(arrays["latents"]) is None
    }
    known = set(processes.broadcast(lambda: list(latents)))
    batches = [batch for batch in _batches(images) if not known.issuperset(batch)]
    files = prefetch(
        CroppedImage.load,
        [images[index] for batch in batches for index in batch] if processes.is_main else [],
        limit=max(map(len, batches), default=1) * processes.size,
    )

    def read(batches: Sequence[Sequence[int]]) -> dict[str, mx.array]:
        """uint8 (B, H, W, 3) by rank."""
        return {str(rank): mx.array(np.stack(list(islice(files, len(one))))) for rank, one in enumerate(batches)}

    def encoded(pixels: mx.array | None, batch: Sequence[int]) -> list[mx.array]:
        if pixels is None:
            return []
        pictures = np.array(pixels)
        result = encode(mx.array(to_pixels(pictures)))
        with exclusive():
            mx.eval(result)
        for index, picture, one in zip(batch, pictures, result, strict=True):
            if found := flaw(one, varies=not one_colour(picture)):
                raise WeightsError(f"{images[index].path}: latents have {found}: {_CAUSE.format('autoencoder')}")
        return [result]

    disable = None if batches and processes.is_main else True
    with item_bar(total=sum(map(len, batches)), desc="latents", unit="image", disable=disable) as bar:
        for start in range(0, len(batches), processes.size):
            group = batches[start : start + processes.size]
            pixels = processes.broadcast_arrays(partial(read, group)).get(str(processes.rank))
            mine = next(iter(processes.shard(group)), ())
            results = processes.gather_arrays(interruptible(processes, partial(encoded, pixels, mine)))
            for batch, (batch_latents, *_) in zip(group, results, strict=False):
                for index, latent in zip(batch, batch_latents, strict=True):
                    if processes.is_main and index not in latents:
                        latents[index] = latent
                        cache.put(keys[index], {"latents": latent})
                bar.update(len(batch))
    return list(processes.broadcast_arrays(lambda: {str(i): latents[i] for i in range(len(images))}).values())


def _check_embeddings(arrays: Iterable[mx.array], prompt: str) -> None:
    """
    Raises:
        WeightsError: values are NaN or infinite; those of a mask may be minus infinity.
    """
    for array in arrays:
        if mx.issubdtype(array.dtype, mx.floating) and mx.any(mx.isnan(array) | (array == math.inf)):
            shown = shortened(prompt, SHOWN_PROMPT)
            raise WeightsError(
                f"the encoded prompt {shown!r} has NaN or infinite values: {_CAUSE.format('text encoders')}"
            )


def _cache_keys(images: Sequence[CroppedImage], encoder: str) -> list[dict[str, object]]:
    contents = {image.path: image.content for image in images}
    unknown = [path for path, content in contents.items() if content is None]
    contents |= dict(zip(unknown, prefetch(content_hash, unknown), strict=True))
    return [{"image": contents[one.path], "crop": astuple(one.crop), "encoder": encoder} for one in images]


def _batches(images: Sequence[CroppedImage]) -> list[list[int]]:
    """Indices of the images of each batch, cached ones included, as rounding may depend on the batch."""
    by_shape: dict[Shape, list[int]] = {}
    for index, image in enumerate(images):
        by_shape.setdefault(image.crop.shape, []).append(index)
    batches = []
    for (height, width), indices in by_shape.items():
        size = images_per_batch(math.isqrt(height * width))
        batches += [indices[start : start + size] for start in range(0, len(indices), size)]
    return batches


def encode_dataset(
    pipeline: DiffusionPipeline,
    images: Sequence[InstanceImage],
    prompts: EncodedPrompts,
    concepts: Sequence[Concept],
    cache: EncodingCache,
    *,
    class_images: Sequence[Sequence[Path]] | None,
    preserves_output: bool,
    processes: ProcessGroup = SINGLE,
) -> EncodedDataset:
    """Encode all images; training does not read them again.

    Args:
        concepts: with class prompt and repeats resolved.
        class_images: files by concept; None without class images.

    Raises:
        SettingsError: there are masks, and latents have no spatial axes.
    """
    encoder = _encoder_identity(pipeline, "images")

    def encode(images: Sequence[CroppedImage]) -> list[mx.array]:
        return encode_images(
            partial(checks.encode_images, pipeline), images, cache=cache, encoder=encoder, processes=processes
        )

    latents = encode(
        [
            CroppedImage(one.path, crop, one.content, one.pixels.get(crop.unmirrored))
            for one in images
            for row in one.crops
            for crop in row
        ]
    )
    next_index = count()
    indices = [[[next(next_index) for _ in row] for row in image.crops] for image in images]
    samples = [
        Sample(
            latents=rows,
            prompt=prompts.rows[image.caption],
            class_prompt=prompts.rows[concepts[image.concept].class_prompt or ""],
            concept=image.concept,
        )
        for image, rows in zip(images, indices, strict=True)
        for _ in range(concepts[image.concept].repeats or 1)
    ]

    # class images are cropped to each shape of their concept's instance images
    class_latents: dict[ClassKey, Sequence[mx.array]] | None = None
    crops: Conditioning | None = None
    class_crops: dict[ClassKey, Conditioning] | None = None
    if isinstance(pipeline, SupportsSizeConditioning):
        crops = pipeline.encode_crops([crop.geometry(one.size) for one in images for row in one.crops for crop in row])
    if class_images is not None:
        shapes = {
            (one.concept, one.shape): latents[rows[0][0]].shape for one, rows in zip(images, indices, strict=True)
        }
        class_latents = {
            (concept, shape): encode([CroppedImage(path, Crop(shape=pixels)) for path in class_images[concept]])
            for (concept, pixels), shape in shapes.items()
        }
        if isinstance(pipeline, SupportsSizeConditioning):
            sizes = processes.broadcast(lambda: [list(prefetch(_size, paths)) for paths in class_images])
            class_crops = {
                (concept, shape): pipeline.encode_crops([Crop(shape=pixels).geometry(one) for one in sizes[concept]])
                for (concept, pixels), shape in shapes.items()
            }
    return EncodedDataset(
        samples=samples,
        latents=latents,
        masks=list(_masks(images, iter(latents))) if any(image.mask for image in images) else None,
        crops=crops,
        class_latents=class_latents,
        class_crops=class_crops,
        conditioning=prompts.conditioning,
        empty_prompt=prompts.rows[""],
        preserves_output=preserves_output,
    )


def _size(path: Path) -> Shape:
    height, width = load_image(path, notes=ImageNotes()).shape[:2]
    return height, width


def _masks(images: Sequence[InstanceImage], latents: Iterator[mx.array]) -> Iterator[mx.array]:
    """The mask of each latent, (h, w, 1) in [0, 1]: grey levels averaged over the pixels of a position."""
    for image in images:
        grey = None if image.mask is None else load_mask(image.mask, notes=ImageNotes())
        for crop in (crop for row in image.crops for crop in row):
            shape = next(latents).shape
            if len(shape) != 3:
                raise SettingsError(f"--masked_loss needs spatial latents (h, w, channels); latents are {shape}")
            levels = np.full(shape[:2], 255) if grey is None else averaged(crop.apply(grey), shape[:2])
            yield mx.array(levels.reshape(*shape[:2], 1).astype(np.float32) / 255)


def _encoder_identity(pipeline: DiffusionPipeline, use: Use) -> str:
    return checks.encoder_fingerprint(pipeline, use) if isinstance(pipeline, SupportsEncodingCache) else ""
