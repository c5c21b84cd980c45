"""Key tables of diffusers' folders: same names, other kernel layout."""

from __future__ import annotations

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx, matrix_to_mlx

STEM = "diffusion_pytorch_model"
"""Weights file in a folder of diffusers' layout, without extension."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

SAME_NAMES = (Rule("{path}", "{path}", conv_to_mlx, conv_from_mlx),)
"""Unchanged names."""

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
"""`AutoencoderKL`; also reads the attention names of early releases, and attention as 1x1 convolutions."""
