"""Networks whose files tell their architecture, and weights under the names of any naming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.presets import PRESETS
from mflux_vae.weights.keymaps.rules import from_mlx
from tests.mflux_vae.small_models import drawn, small_plain, small_qwen_image, small_taehv

SMALL = {"block_out_channels": (32, 64), "layers_per_block": 1, "scaling_factor": 0.5}
TINY = {"num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}


def kl(**changes: Any) -> nn.Module:
    """Of widths that 32 groups divide, so that a file tells its architecture."""
    return drawn(AutoencoderKL(AutoencoderKLConfig(**{**SMALL, **changes})))


def flux2(**changes: Any) -> nn.Module:
    network = AutoencoderKLFlux2(
        AutoencoderKLFlux2Config(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, **changes)
    )
    variance = mx.arange(1, 17) / 8
    drawn(network)
    network.bn.running_var, network.bn.num_batches_tracked = variance, mx.array(7, mx.int64)
    return network


def tiny(**changes: Any) -> nn.Module:
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return drawn(AutoencoderTiny(AutoencoderTinyConfig(**{**TINY, **widths, **changes})))


NETWORKS = {
    "kl": kl,
    "no quant convolutions": lambda: kl(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, latent_channels=16
    ),
    "attention in every level": lambda: kl(encoder_attention=(0, 1), decoder_attention=(1,)),
    "linear attention": lambda: kl(attention_type="linear", encoder_attention=(1,), decoder_attention=(1,)),
    "three levels": lambda: kl(block_out_channels=(32, 64, 96), layers_per_block=2, in_channels=1, out_channels=1),
    "another decoder": lambda: kl(decoder_block_out_channels=(64, 96)),
    "other quant convolutions": lambda: kl(z_channels=6),
    "no variances": lambda: kl(double_z=False),
    "pooling": lambda: kl(resample_with_conv=False),
    "a wider stem": lambda: kl(stem_channels=64),
    "flux2": flux2,
    "flux2, small decoder": lambda: flux2(decoder_block_out_channels=(32, 96)),
    "tiny": tiny,
    "tiny, wider": lambda: tiny(latent_channels=16, num_decoder_blocks=(3, 1), num_encoder_blocks=(2, 3)),
    "tiny with pooling": lambda: tiny(pool=True, patch_size=2),
    "qwen-image": lambda: small_qwen_image(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4),
    "qwen-image, two levels": lambda: small_qwen_image(
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4, dim_mult=(2, 3), temperal_downsample=(True,), num_res_blocks=2
    ),
    "taehv": small_taehv,
    "plain": lambda: small_plain(channels=(4, 6, 8)),
}


def parameters(network: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and mx.array_equal(a[key], b[key]) for key in a)


def named(network: nn.Module, naming: str = "diffusers") -> dict[str, mx.array]:
    own = parameters(network)
    return from_mlx(own, FAMILIES[type(network).__name__].rules(naming, own))


def arrays(network: nn.Module, naming: str = "diffusers", prefix: str = "") -> dict[str, np.ndarray]:
    """For files of torch's, without the counter, which is of another dtype."""
    return {prefix + key: np.array(mx.contiguous(value)) for key, value in named(network, naming).items() if value.ndim}


def lazily(path: Path, name: str, naming: str, **metadata: str) -> Path:
    """A file with the keys and shapes of a preset."""
    network = FAMILIES[PRESETS[name].family].network(PRESETS[name].config)
    return write_blank(path, {key: value.shape for key, value in named(network, naming).items()}, **metadata)


def write_blank(path: Path, shapes: dict[str, tuple[int, ...]], **metadata: str) -> Path:
    """A sparse file of zeros, which needs no place on a disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    first = 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [first, first + size]}
        first += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + first)
    return path
