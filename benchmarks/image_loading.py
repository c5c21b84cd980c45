"""Reading photographs for training (decoding, turning by EXIF, resizing, cropping): ahead in threads, as training does,
against one after another.

    python -m benchmarks.image_loading [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import noise

WIDTH, HEIGHT, RESOLUTION = 4032, 3024, 512
TURNED = 6
"""EXIF orientation: on its side, as telephones store upright pictures."""


def rows(options: Options) -> list[Row]:
    """The measurement."""
    count = 8 if options.quick else 48

    def side(name: str, ahead: bool) -> Implementation:
        settings = {"count": count, "ahead": ahead}
        return Implementation(
            name=name, build="benchmarks.image_loading:read", settings=settings, imports=("mflux_vae",), units=count
        )

    return [
        Row(
            work=f"{count} photographs of 12 megapixels to {RESOLUTION}x{RESOLUTION}",
            ours=side("ahead in threads", True),
            peers=[side("one after another", False)],
            tolerance=1e-6,
            unit="photographs",
        )
    ]


def read(count: int, ahead: bool) -> Work:
    """All photographs, each batch summed up where an autoencoder would encode it."""
    import mlx.core as mx

    from mflux_vae.images import load_image, to_pixels
    from mflux_vae_train.dreambooth.data.crops import Crop
    from mflux_vae_train.dreambooth.data.encoding import CroppedImage, encode_images

    paths = sorted(Path(_photographs(count).name).iterdir())

    def run() -> dict[str, np.ndarray]:
        if ahead:
            pictures = [CroppedImage(path, Crop(shape=(RESOLUTION, RESOLUTION))) for path in paths]
            means = encode_images(lambda x: mx.mean(x, axis=(1, 2)), pictures)
            return {"mean": np.array(mx.stack(means))}
        return {"mean": np.stack([to_pixels(load_image(p, resolution=RESOLUTION)).mean(axis=(0, 1)) for p in paths])}

    return Work(run=run)


@cache
def _photographs(count: int) -> tempfile.TemporaryDirectory[str]:
    """A folder of different JPEG files that goes with the process."""
    from PIL import Image

    folder = tempfile.TemporaryDirectory()
    exif = Image.Exif()
    exif[0x0112] = TURNED
    for index in range(count):
        small = np.clip(127 + 50 * noise(f"photograph {index}", (HEIGHT // 16, WIDTH // 16, 3)), 0, 255)
        picture = Image.fromarray(small.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        picture.save(Path(folder.name) / f"{index:03}.jpg", quality=92, exif=exif)
    return folder


if __name__ == "__main__":
    sys.exit(main({"reading": rows}, __doc__))
