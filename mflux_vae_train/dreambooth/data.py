"""Pictures -> cached latents -> micro-batches. A sample is a function of (seed, update, index) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae.ahead import ahead
from mflux_vae.errors import ImageError
from mflux_vae.images import EXTENSIONS, find_images, load_image, to_pixels
from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.step import MicroBatch

CONDITIONING = "conditioning."

INSTANCE, CLASS = 0, 1
"""Which set a sample is drawn from; part of the names of random draws."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The instance pictures of a folder, as the run uses them.

    Attributes:
        paths: sorted by name.
        skipped: files in the folder that are no pictures.
        arrays: uint8 (resolution, resolution, 3) each.
        fingerprint: hash of the files' contents in order; equal for equal pictures under other names.
    """

    paths: list[Path]
    skipped: int
    arrays: list[np.ndarray]
    fingerprint: str


def load_pictures(folder: str | Path, resolution: int) -> Pictures:
    """Reads every picture of a folder: upright, RGB, the centre square at `resolution`.

    Raises:
        ImageError: no such folder, no picture in it, or one that cannot be read (named).
    """
    paths, skipped = find_images(folder)
    if not paths:
        others = f" among its {skipped} files" if skipped else ""
        raise ImageError(f"{folder} holds no picture{others}: {', '.join(EXTENSIONS)} count")
    arrays = list(ahead(partial(load_image, resolution=resolution), paths))
    return Pictures(paths=paths, skipped=skipped, arrays=arrays, fingerprint=fingerprint(paths))


def fingerprint(paths: Sequence[Path]) -> str:
    """A hash of the contents of files, in order; their names do not count."""
    digest = hashlib.sha256()
    for content in ahead(lambda path: hashlib.sha256(path.read_bytes()).digest(), paths):
        digest.update(content)
    return digest.hexdigest()[:16]


def pictures_at_once(resolution: int) -> int:
    """How many pictures an autoencoder or sampler gets together: a million pixels, at most sixteen."""
    return max(1, min(16, 2**20 // resolution**2))


def encode_pictures(
    encode: Callable[[mx.array], mx.array], pictures: Sequence[np.ndarray | Path], *, resolution: int
) -> mx.array:
    """Pictures -> latents (N, ...), some at a time; files of the next ones are read meanwhile, no more than that."""
    batch_size = pictures_at_once(resolution)

    def pixels(picture: np.ndarray | Path) -> np.ndarray:
        return to_pixels(load_image(picture, resolution=resolution) if isinstance(picture, Path) else picture)

    coming = ahead(pixels, pictures, limit=batch_size)
    latents = []
    while group := list(islice(coming, batch_size)):
        latents.append(encode(mx.array(np.stack(group))))
        mx.eval(latents[-1])
    return mx.concatenate(latents)


@lru_cache(maxsize=8)
def _permutation(seed: int, which: int, count: int, epoch: int) -> np.ndarray:
    return rng(seed, Stream.DATA_ORDER, epoch, which).permutation(count)


def shuffled(seed: int, which: int, count: int, position: int) -> int:
    """Element at a position of the endless order that runs through all `count` elements, ever reshuffled."""
    epoch, place = divmod(position, count)
    return int(_permutation(seed, which, count, epoch)[place])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many samples a run draws, and how they fall into updates and micro-batches.

    Attributes:
        samples: instance samples over the whole run.
        batch_size: instance samples in a micro-batch; the run's last one may hold fewer.
        accumulation: micro-batches in an update; the run's last update may hold fewer.
    """

    samples: int
    batch_size: int
    accumulation: int

    @property
    def updates(self) -> int:
        return -(-self.samples // (self.batch_size * self.accumulation))

    def micro_batches(self, update: int) -> list[range]:
        """Positions of the instance samples in each micro-batch of an update."""
        window = self.batch_size * self.accumulation
        first, end = update * window, min((update + 1) * window, self.samples)
        return [range(start, min(start + self.batch_size, end)) for start in range(first, end, self.batch_size)]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """All that training needs of pictures and prompts, encoded once.

    Attributes:
        instance: latents of the instance pictures (N, ...).
        prior: latents of the class pictures (M, ...), or None without prior preservation.
        prompts: conditioning with three rows: instance prompt, class prompt, empty prompt.
    """

    instance: mx.array
    prior: mx.array | None
    prompts: Mapping[str, mx.array]


EMPTY = 2
"""Row of the empty prompt in `Cache.prompts`; the rows before it are INSTANCE and CLASS."""


def micro_batch(
    cache: Cache, plan: Plan, *, update: int, positions: range, seed: int, caption_dropout: float
) -> MicroBatch:
    """One micro-batch: the instance samples, then as many prior samples where there are class pictures.

    Everything random about a sample follows from its place in the update, not from the micro-batch it falls
    into, so that four micro-batches of one are one of four.

    Returns:
        arrays, batch first: `latents`, `key` for noise, `dropout_key` for adapters, and the rows of the
        conditioning as `conditioning.<name>`. Its weight is the number of instance samples.
    """
    first = update * plan.batch_size * plan.accumulation
    sets = [(INSTANCE, cache.instance)] + ([(CLASS, cache.prior)] if cache.prior is not None else [])
    latents, rows, draws = [], [], []
    for which, source in sets:
        picks = [shuffled(seed, which, source.shape[0], position) for position in positions]
        latents.append(source[mx.array(picks)])
        for position in positions:
            draw = 2 * (position - first) + which
            draws.append(draw)
            rows.append(EMPTY if caption_dropped(seed, update, draw, caption_dropout) else which)
    wanted = mx.array(rows)
    arrays = {
        "latents": mx.concatenate(latents),
        "key": sample_keys(seed, Stream.NOISE, update, draws),
        "dropout_key": sample_keys(seed, Stream.LORA_DROPOUT, update, draws),
        **{CONDITIONING + name: array[wanted] for name, array in cache.prompts.items()},
    }
    return MicroBatch(arrays=arrays, weight=len(positions))


def caption_dropped(seed: int, update: int, draw: int, share: float) -> bool:
    """Whether the caption of a sample is replaced by the empty prompt."""
    return share > 0 and rng(seed, Stream.CAPTION_DROPOUT, update, draw).random() < share


def micro_batches(cache: Cache, plan: Plan, *, update: int, seed: int, caption_dropout: float) -> list[MicroBatch]:
    """The micro-batches of one update."""
    return [
        micro_batch(cache, plan, update=update, positions=positions, seed=seed, caption_dropout=caption_dropout)
        for positions in plan.micro_batches(update)
    ]
