"""diffusers' naming of autoencoder weights. Ours is the same, but for the layout of convolution kernels."""

from __future__ import annotations

from mflux_vae.weights.rules import Rule, conv_from_mlx, conv_to_mlx

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

AUTOENCODER_KL = (
    *(
        Rule(f"{{path}}.attentions.{{i}}.{old}.{{kind}}", f"{{path}}.attentions.{{i}}.{new}.{{kind}}", reads_only=True)
        for old, new in _OLD_ATTENTION.items()
    ),
    Rule("{path}", "{path}", conv_to_mlx, conv_from_mlx),
)
