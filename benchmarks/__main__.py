"""Measure every claim about speed and memory; print one table.

    python -m benchmarks [--quick] [--compile] [--only NAME] [--rounds 5] [--at-once 2] [--json]

NAME is a script, such as `denoisers`, or part of a row's name; `--list` prints all rows. Each row alternates between
ours and torch (in both memory layouts, with `--compile` also compiled) and checks first that their outputs agree. Peers
are optional (extra `parity`); missing ones are listed below the table. `--at-once 2` measures instead how much two
processes slow down each other. On a GPU that MLX and torch both support, the same rows are measured there.

Single operations: `benchmarks.kernels`. Whole commands: `benchmarks.quick_start`, and `benchmarks.diffusers_scripts`
beside the scripts of diffusers. Quality of DreamBooth: `benchmarks.dreambooth_quality`, `.dreambooth_photos`; total
correlation of autoencoders: `benchmarks.disentanglement`.

AMD EPYC (Zen 3, AVX2), two cores, Linux, MLX 0.32.4, torch 2.13.0, diffusers 0.42.1, transformers 5.23.0, float32,
2026-11-29, medians of two or three rounds (torch in the faster layout, not compiled):

| work | ours | speed ratio | memory ratio |
|---|---|---|---|
| SD autoencoder: encode 256x256 | 0.98 s | 1.77x (1.60 to 1.97) | 1.03x |
| SD autoencoder: decode 256x256 | 1.77 s | 2.41x (2.14 to 2.70) | 0.61x |
| SD autoencoder: training step 128x128, batch 1 | 3.54 s | 1.35x (1.31 to 1.39) | 0.75x |
| tiny autoencoder, training step 64x64, batch 8 | 0.204 s | 0.98x (0.98 to 1.10) | 0.52x |
| MNIST, vector latents, training step 28x28, batch 128 | 0.13 s | 1.06x (1.06 to 1.30) | 0.53x |
| small, vector latents, training step 64x64, batch 128 | 0.204 s | 1.13x (1.04 to 1.21) | 0.44x |
| VanillaVAE, vector latents, training step 256x256, batch 8 | 2.71 s | 1.29x (1.23 to 1.32) | 0.89x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.682 s | 0.94x (0.85 to 0.95) | 0.95x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 1.47 s | 0.94x (0.87 to 1.32) | 0.76x |
| embedded FLUX, 16+16 tokens, batch 8, forward | 0.0258 s | 1.33x (0.92 to 1.43) | 1.11x |
| embedded FLUX, 16+16 tokens, batch 8, LoRA step | 0.0699 s | 1.43x (1.23 to 1.98) | 0.77x |
| SD UNet, widths 160 to 640, 32x32 latents, forward | 0.362 s | 0.83x (0.81 to 0.87) | 0.87x |
| SD UNet, widths 160 to 640, 32x32 latents, LoRA step | 0.958 s | 0.70x (0.67 to 0.89) | 0.97x |
| embedded SD UNet, 8x8 latents, batch 8, forward | 0.0277 s | 1.05x (0.86 to 1.46) | 0.73x |
| embedded SD UNet, 8x8 latents, batch 8, LoRA step | 0.0813 s | 1.18x (0.90 to 1.22) | 0.57x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, forward | 0.561 s | 0.89x (0.85 to 1.01) | 0.92x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, LoRA step | 1.08 s | 0.89x (0.89 to 0.91) | 0.74x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.452 s | 1.13x (1.07 to 1.13) | 0.92x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.967 s | 0.95x (0.93 to 0.95) | 0.72x |
| T5, encode 4 x 256 tokens | 1.32 s | 0.91x (0.89 to 0.95) | 0.89x |
| CLIP, encode 4 x 77 tokens | 0.191 s | 0.92x (0.92 to 0.99) | 0.92x |
| Qwen3, encode 4 x 128 tokens | 0.499 s | 0.92x (0.73 to 0.97) | 0.83x |

Speed ratios with the lowest and highest of a round. Below torch: large matrix products (ours reach 120 to 150 GFLOP/s
on this machine), and convolutions of small images with some hundred channels.
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
