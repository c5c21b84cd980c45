"""The images of an evaluation: drawn once, and kept as PNG files that state what they depend on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import ImageError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_files.reading import text_chunks
from mflux_vae.images import load_image, save_image
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.dreambooth.data.encoding import SHOWN_PROMPT, EncodedPrompts
from mflux_vae_train.dreambooth.data.sampling import preview_batches, sample_images
from mflux_vae_train.dreambooth.drawing.adapted import Adapted
from mflux_vae_train.dreambooth.drawing.source import LAST
from mflux_vae_train.dreambooth.evaluation.plan import Entry
from mflux_vae_train.evaluation.evaluator import Prompt
from mflux_vae_train.randomness import Stream, sample_keys

KEY = "mflux-dreambooth evaluate"
"""PNG text chunk with everything that an image depends on."""


@dataclass(frozen=True, kw_only=True)
class Album:
    """The images of one adapter at one scale.

    Attributes:
        key: everything that the images depend on, beside prompt and index: plain values.
    """

    folder: Path
    entry: Entry
    prompts: Sequence[Prompt]
    seed: int
    key: Mapping[str, Any]

    @property
    def keys(self) -> list[str]:
        """The key of each image, as JSON."""
        return [json.dumps({**self.key, "prompt": prompt, "index": index}) for prompt, index in self._entries]

    @property
    def _entries(self) -> list[tuple[str, int]]:
        return [(prompt.text, index) for prompt in self.prompts for index in range(prompt.count)]

    @property
    def _files(self) -> list[Path]:
        return [self.folder / f"{_slug(prompt)}-{index}.png" for prompt, index in self._entries]

    def missing(self) -> int:
        """Number of images to draw."""
        return sum(not _has_key(file, key) for file, key in zip(self._files, self.keys, strict=True))

    def load(self, indices: Sequence[int] | None = None) -> list[np.ndarray]:
        """Images by index, in the order of the prompts, uint8 (H, W, 3); None for all."""
        files = self._files if indices is None else [self._files[index] for index in indices]
        return list(prefetch(partial(load_image, notes=ImageNotes()), files))

    def draw(self, adapted: Adapted, encoded: EncodedPrompts, drawn: Callable[[int], object]) -> None:
        """Draw what is missing and write each image. Batches do not depend on what exists, as rounding may.

        The noise is a function of (seed, prompt, index), so that adapters and scales are compared on the same noise.

        Args:
            drawn: called with the number of images that were written.
        """
        entries, files, keys = self._entries, self._files, self.keys
        with adapted.using(self.entry.label or LAST, self.entry.scale):
            for batch in preview_batches(len(entries), adapted.size):
                absent = [index for index in batch if not _has_key(files[index], keys[index])]
                if not absent:
                    continue
                chosen = [entries[index] for index in batch]
                rows = [encoded.get(prompt) for prompt, _ in chosen]
                images = sample_images(
                    adapted.pipeline,
                    {name: mx.concatenate([row[name] for row in rows]) for name in rows[0]},
                    mx.concatenate(
                        [sample_keys(_seed(self.seed, text), Stream.EVALUATION, 0, [i]) for text, i in chosen]
                    ),
                    [f"image {index} of {shortened(prompt, SHOWN_PROMPT)!r}" for prompt, index in chosen],
                    size=adapted.size,
                    guidance=adapted.guidance,
                    steps=adapted.steps,
                )
                for index, image in zip(batch, images, strict=True):
                    if index in absent:
                        save_image(files[index], image, text={KEY: keys[index]})
                drawn(len(absent))


def _seed(seed: int, prompt: str) -> int:
    """Prompts have different noise, whichever of them are drawn."""
    return zlib.crc32(f"{seed} {prompt}".encode())


def _slug(prompt: str) -> str:
    """A file name that shows the prompt; a checksum distinguishes those with the same letters."""
    words = "".join(letter if letter.isalnum() and letter.isascii() else " " for letter in prompt).split()
    return f"{'-'.join(words)[:60]}-{zlib.crc32(prompt.encode()):08x}"


def _has_key(file: Path, key: str) -> bool:
    """Whether a file is a whole image with this key."""
    try:
        chunk = text_chunks(file).get(KEY) if file.is_file() else None
    except (ImageError, OSError):
        return False
    return chunk is not None and chunk.text == key
