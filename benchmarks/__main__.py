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
2026-11-30, medians of two to four rounds (torch in the faster layout, not compiled):

| work | ours | speed ratio | memory ratio |
|---|---|---|---|
| SD autoencoder: encode 256x256 | 1.03 s | 1.86x (1.69 to 2.08) | 0.77x |
| SD autoencoder: decode 256x256 | 1.96 s | 2.46x (2.17 to 2.86) | 0.73x |
| SD autoencoder: encode 512x512 | 4.25 s | 2.45x (2.31 to 2.62) | 0.72x |
| SD autoencoder: decode 512x512 | 7.72 s | 2.77x (2.67 to 2.87) | 0.75x |
| SD autoencoder: training step 128x128, batch 1 | 3.06 s | 2.03x (2.01 to 2.06) | 0.76x |
| tiny autoencoder, training step 64x64, batch 8 | 0.19 s | 1.38x (1.26 to 1.73) | 0.68x |
| MNIST, vector latents, training step 28x28, batch 128 | 0.122 s | 1.17x (1.17 to 2.00) | 0.53x |
| small, vector latents, training step 64x64, batch 128 | 0.144 s | 1.41x (1.04 to 1.56) | 0.53x |
| VanillaVAE, vector latents, training step 256x256, batch 8 | 2.01 s | 1.56x (1.31 to 1.97) | 0.85x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.547 s | 1.05x (0.85 to 1.98) | 0.94x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 1.12 s | 1.02x (0.95 to 1.11) | 0.76x |
| embedded FLUX, 16+16 tokens, batch 8, forward | 0.0244 s | 1.44x (1.39 to 3.04) | 1.10x |
| embedded FLUX, 16+16 tokens, batch 8, LoRA step | 0.0553 s | 1.53x (1.35 to 1.73) | 0.77x |
| SD UNet, widths 160 to 640, 32x32 latents, forward | 0.236 s | 1.31x (1.23 to 1.38) | 0.77x |
| SD UNet, widths 160 to 640, 32x32 latents, LoRA step | 0.573 s | 1.16x (1.09 to 1.30) | 0.78x |
| embedded SD UNet, 8x8 latents, batch 8, forward | 0.0252 s | 1.26x (1.04 to 1.61) | 0.68x |
| embedded SD UNet, 8x8 latents, batch 8, LoRA step | 0.0586 s | 1.37x (1.18 to 1.37) | 0.57x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, forward | 0.488 s | 1.07x (0.93 to 1.16) | 0.94x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.908 s | 1.12x (1.01 to 1.14) | 0.78x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.366 s | 1.34x (1.00 to 1.67) | 0.91x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.89 s | 1.15x (0.96 to 1.23) | 0.75x |
| T5, encode 4 x 256 tokens | 1.36 s | 1.07x (0.86 to 1.11) | 0.87x |
| CLIP, encode 4 x 77 tokens | 0.186 s | 1.10x (1.06 to 1.15) | 0.93x |
| Qwen3, encode 4 x 128 tokens | 0.54 s | 1.27x (1.05 to 1.33) | 0.84x |

Speed ratios with the lowest and highest of a round. Near 1: large matrix products (150 to 175 of the 200 GFLOP/s that
this machine reaches at most).
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
