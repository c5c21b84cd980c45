"""Measure every claim about speed and memory; print one table.

    python -m benchmarks [--quick] [--compile] [--only NAME] [--rounds 5] [--at-once 2] [--json]

NAME is a script, such as `denoisers`, or part of a row's name; `--list` prints all rows. Each row alternates between
ours and torch (in both memory layouts, with `--compile` also compiled) and checks first that their outputs agree. Peers
are optional (extra `parity`); missing ones are listed below the table. `--at-once 2` measures instead how much two
processes slow down each other. On a GPU that MLX and torch both support, the same rows are measured there.

Single operations: `benchmarks.kernels`. Whole commands: `benchmarks.quick_start`, and `benchmarks.diffusers_scripts`
beside the scripts of diffusers. Quality of DreamBooth: `benchmarks.dreambooth_quality`, `.dreambooth_photos`; total
correlation of autoencoders: `benchmarks.disentanglement`.

AMD EPYC (Zen 4, AVX-512), two cores, Linux, MLX 0.32.4, torch 2.13.0, diffusers 0.42.1, transformers 5.23.0, float32,
2026-11-30, medians of two to five rounds (torch in the faster layout, not compiled). The last column is the speed ratio
with AVX2: autoencoders' training steps on the same machine, both sides limited to AVX2, and the others on Zen 3:

| work | ours | speed ratio | memory ratio | AVX2 |
|---|---|---|---|---|
| SD autoencoder, encode 256x256 | 0.598 s | 2.33x (2.21 to 2.43) | 0.79x | 2.24x |
| SD autoencoder, decode 256x256 | 1.19 s | 2.81x (2.58 to 3.01) | 0.70x | 2.72x |
| SD autoencoder, encode 512x512 | 2.68 s | 2.45x (2.30 to 2.61) | 0.89x | 2.21x |
| SD autoencoder, decode 512x512 | 5.11 s | 2.86x (2.84 to 2.89) | 0.87x | 2.54x |
| SD autoencoder, training step 128x128, batch 1 | 1.88 s | 2.04x (1.88 to 2.07) | 0.77x | 2.35x |
| tiny autoencoder, training step 64x64, batch 8 | 0.126 s | 1.35x (0.99 to 1.59) | 0.77x | 1.39x |
| MNIST, vector latents, training step 28x28, batch 128 | 0.0727 s | 1.35x (1.01 to 1.41) | 0.53x | 1.29x |
| small, vector latents, training step 64x64, batch 128 | 0.0846 s | 1.76x (1.15 to 2.01) | 0.46x | 1.25x |
| VanillaVAE, vector latents, training step 256x256, batch 8 | 1.33 s | 1.44x (1.36 to 1.57) | 0.86x | 1.61x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.353 s | 1.26x (1.11 to 1.63) | 0.94x | 1.13x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.762 s | 1.41x (1.25 to 1.43) | 0.77x | 1.31x |
| embedded FLUX, 16+16 tokens, batch 8, forward | 0.0182 s | 1.30x (1.17 to 1.49) | 1.16x | 1.26x |
| embedded FLUX, 16+16 tokens, batch 8, LoRA step | 0.0484 s | 1.39x (1.25 to 1.48) | 0.80x | 1.60x |
| SD UNet, widths 160 to 640, 32x32 latents, forward | 0.169 s | 1.43x (1.25 to 1.59) | 0.98x | 1.44x |
| SD UNet, widths 160 to 640, 32x32 latents, LoRA step | 0.419 s | 1.29x (1.28 to 1.50) | 0.83x | 1.33x |
| embedded SD UNet, 8x8 latents, batch 8, forward | 0.0154 s | 1.39x (1.06 to 1.73) | 0.81x | 1.51x |
| embedded SD UNet, 8x8 latents, batch 8, LoRA step | 0.0347 s | 1.33x (1.04 to 2.37) | 0.66x | 1.23x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, forward | 0.319 s | 1.29x (1.11 to 1.34) | 0.93x | 1.34x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.73 s | 1.37x (1.32 to 1.39) | 0.72x | 1.10x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.329 s | 1.32x (1.28 to 1.33) | 0.91x | 1.05x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.65 s | 1.42x (1.42 to 1.6) | 0.75x | 1.08x |
| T5, encode 4 x 256 tokens | 1.02 s | 1.31x (1.23 to 1.40) | 0.84x | 1.08x |
| CLIP, encode 4 x 77 tokens | 0.144 s | 1.14x (1.03 to 1.18) | 0.92x | 1.09x |
| Qwen3, encode 4 x 128 tokens | 0.338 s | 1.19x (1.14 to 1.30) | 0.85x | 1.07x |

Speed ratios with the lowest and highest of a round. Near 1: large matrix products, which reach 190 to 210 of 210
GFLOP/s (AVX2: 140 to 185 of 200). Ratios of two runs differ by up to 0.2, as other machines take part of this
processor's cores and caches.
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
