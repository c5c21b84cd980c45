"""Write diffusers' own answers for a small autoencoder, which the tests compare with where diffusers is absent.

    python -m tests.parity.make_golden

The folder holds an `AutoencoderKL` as diffusers saves it (half precision) and `golden.safetensors`: `pixels` in
[-1, 1], the encoder's `moments`, and `decoded`, the image of the moments' mean; NCHW, computed in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

GOLDEN = Path(__file__).parents[1] / "vae" / "golden"
SIZE_LIMIT = 200_000
"""Bytes of the whole folder."""

SETTINGS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 6,
    "norm_num_groups": 4,
    "sample_size": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights nowhere zero or one, of a size that keeps the signal's."""
    draws = torch.Generator().manual_seed(seed)
    for name, value in sorted(model.named_parameters()):
        spread = (value.numel() // value.shape[0]) ** -0.5 if value.ndim > 1 else 0.2
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        value.copy_(offset + spread * torch.randn(value.shape, generator=draws))


@torch.no_grad()
def main() -> None:
    """Write the folder anew."""
    model = AutoencoderKL(**SETTINGS)
    randomise(model)
    model.half().save_pretrained(GOLDEN)
    model = AutoencoderKL.from_pretrained(GOLDEN, torch_dtype=torch.float32).eval()
    pixels = 2 * torch.rand(2, 3, 20, 28, generator=torch.Generator().manual_seed(1)) - 1
    pixels = pixels.half().float()
    moments = model.quant_conv(model.encoder(pixels))
    decoded = model.decode(moments.chunk(2, dim=1)[0]).sample
    tensors = {"pixels": pixels, "moments": moments, "decoded": decoded}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN / "golden.safetensors")
    size = sum(file.stat().st_size for file in GOLDEN.iterdir())
    if size > SIZE_LIMIT:
        raise SystemExit(f"{GOLDEN} has {size} bytes, more than {SIZE_LIMIT}")


if __name__ == "__main__":
    main()
