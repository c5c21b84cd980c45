"""Measure every claim about speed and memory; print one table.

    python -m benchmarks [--quick] [--compile] [--only NAME] [--rounds 5] [--at-once 2] [--json]

NAME is a script, such as `denoisers`, or part of a row's name; `--list` prints all rows. Each row alternates between
ours and torch (in both memory layouts, with `--compile` also compiled) and checks first that their outputs agree. Peers
are optional (extra `parity`); missing ones are listed below the table. `--at-once 2` measures instead how much two
processes slow down each other. On a GPU that MLX and torch both support, the same rows are measured there.

Single operations: `benchmarks.kernels`. Whole commands: `benchmarks.quick_start`, and `benchmarks.diffusers_scripts`
beside the scripts of diffusers. Quality of DreamBooth: `benchmarks.dreambooth_quality`, `.dreambooth_photos`; total
correlation of autoencoders: `benchmarks.disentanglement`.

Intel Xeon (AVX-512), two cores, Linux, MLX 0.32.4 with MKL, torch 2.13.0, diffusers 0.42.1, float32, 2026-11-21. The
virtual machine's speed changes by half within a day; where two runs differ, both are given:

| work | ours | speed ratio | memory ratio |
|---|---|---|---|
| SD autoencoder, encode 256 x 256 | 0.91 s to 1.14 s | 1.06x to 1.15x | 0.88x to 0.99x |
| decode 256 x 256 | 1.76 s to 1.91 s | 1.24x to 1.30x | 0.84x to 0.99x |
| encode 512 x 512 | 3.39 s | 1.33x | 0.86x |
| decode 512 x 512 | 5.71 s to 7.14 s | 1.43x to 1.52x | 0.95x |
| encode 128 x 128, against plain MLX | 0.54 s | 39x | 0.76x |
| T5 base, encode 4 x 256 tokens | 0.69 s | 1.02x to 1.23x | 0.97x |
| CLIP base, encode 4 x 77 tokens | 0.11 s | 1.01x to 1.17x | 0.99x |
| FLUX transformer of 2 + 4 blocks, width 1024, forward | 0.31 s | 0.78x | 1.01x |
| the same, LoRA step | 1.00 s | 0.76x | 0.94x |
| SD autoencoder, training step, 128 x 128, batch 1 | 3.65 s | 0.84x | 0.77x |
| vector autoencoder, training step, 64 x 64, batch 128 | 0.43 s | 0.38x | 0.73x |
| embedded autoencoder, training step, 64 x 64, batch 8 | 0.45 s | 0.42x | 0.87x |
| 48 photographs of 12 megapixels to 512 x 512, prefetched, against one by one | 5.9 s | 1.32x | 3.3x |

Below torch: layers with few channels, Winograd transforms, and denoisers, where all but matrix products runs on one
core.
"""

from __future__ import annotations

import sys

from benchmarks import denoisers, image_loading, text_encoders, vae_speed, vae_training
from benchmarks.diffusers_scripts import draw_speed
from benchmarks.harness.cli import main

SCRIPTS = {
    "vae_speed": vae_speed.rows,
    "vae_training": vae_training.rows,
    "denoisers": denoisers.rows,
    "text_encoders": text_encoders.rows,
    "image_loading": image_loading.rows,
    "draw_speed": draw_speed.rows,
}

if __name__ == "__main__":
    sys.exit(main(SCRIPTS, __doc__))
