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
| SD autoencoder, encode 256x256 | 0.876 s | 2.24x (1.78 to 2.41) | 0.64x |
| SD autoencoder, decode 256x256 | 1.65 s | 2.72x (2.54 to 2.96) | 0.78x |
| SD autoencoder, encode 512x512 | 4.7 s | 2.21x (2.03 to 2.43) | 0.68x |
| SD autoencoder, decode 512x512 | 7.92 s | 2.54x (2.39 to 2.70) | 0.69x |
| SD autoencoder, training step 128x128, batch 1 | 2.75 s | 2.40x (1.92 to 2.44) | 0.78x |
| tiny autoencoder, training step 64x64, batch 8 | 0.193 s | 1.28x (1.21 to 1.57) | 0.76x |
| MNIST, vector latents, training step 28x28, batch 128 | 0.127 s | 1.38x (1.01 to 1.56) | 0.53x |
| small, vector latents, training step 64x64, batch 128 | 0.149 s | 1.43x (1.43 to 1.66) | 0.46x |
| VanillaVAE, vector latents, training step 256x256, batch 8 | 1.98 s | 1.57x (1.08 to 1.91) | 0.81x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.459 s | 1.13x (1.02 to 1.27) | 0.95x |
| FLUX transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 1.22 s | 1.31x (1.20 to 1.37) | 0.76x |
| embedded FLUX, 16+16 tokens, batch 8, forward | 0.0326 s | 1.26x (1.08 to 1.43) | 1.18x |
| embedded FLUX, 16+16 tokens, batch 8, LoRA step | 0.0798 s | 1.60x (1.47 to 1.89) | 0.81x |
| SD UNet, widths 160 to 640, 32x32 latents, forward | 0.222 s | 1.44x (1.30 to 1.55) | 0.95x |
| SD UNet, widths 160 to 640, 32x32 latents, LoRA step | 0.559 s | 1.33x (1.01 to 2.04) | 0.72x |
| embedded SD UNet, 8x8 latents, batch 8, forward | 0.0233 s | 1.51x (1.24 to 1.95) | 0.82x |
| embedded SD UNet, 8x8 latents, batch 8, LoRA step | 0.0609 s | 1.23x (1.15 to 1.52) | 0.62x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, forward | 0.406 s | 1.34x (1.11 to 1.35) | 0.93x |
| FLUX.2 transformer 1+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.835 s | 1.10x (1.07 to 1.11) | 0.76x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, forward | 0.405 s | 1.05x (0.94 to 1.10) | 0.90x |
| Z-Image transformer 2+4 blocks, width 1024, 256+128 tokens, LoRA step | 0.791 s | 1.08x (1.04 to 1.14) | 0.74x |
| T5, encode 4 x 256 tokens | 1.21 s | 1.08x (0.93 to 1.12) | 0.89x |
| CLIP, encode 4 x 77 tokens | 0.177 s | 1.09x (1.06 to 1.61) | 0.93x |
| Qwen3, encode 4 x 128 tokens | 0.458 s | 1.07x (0.97 to 1.10) | 0.83x |

Speed ratios with the lowest and highest of a round. Near 1: large matrix products, which reach 140 to 185 of 200
GFLOP/s. Ratios of two runs differ by up to 0.2, as other machines take part of this processor's cores and caches.
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
