"""Key tables of diffusers' folders. Our names are diffusers' own; convolution kernels change their layout."""

from __future__ import annotations

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx, matrix_to_mlx

STEM = "diffusion_pytorch_model"
"""Name of the weights file in a folder of diffusers' layout."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

SAME_NAMES = (Rule("{path}", "{path}", conv_to_mlx, conv_from_mlx),)
"""Names as they are; also for networks of this project that are stored beside diffusers' own."""

AUTOENCODER_KL = (
    *(
        Rule(
            f"{{path}}.attentions.{{i}}.{name}.{{kind}}",
            f"{{path}}.attentions.{{i}}.{new}.{{kind}}",
            matrix_to_mlx,
            reads_only=True,
        )
        for old, new in _OLD_ATTENTION.items()
        for name in (old, new)
    ),
    *SAME_NAMES,
)
"""diffusers' `AutoencoderKL`; attention also under the names of its first releases, and as 1x1 convolutions."""
