"""Z-Image with some ten thousand random weights, for tests."""

from __future__ import annotations

from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformerConfig


def small_config(**changes) -> ZImageTransformerConfig:
    return ZImageTransformerConfig(
        **{
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 20,
            "axes_dims": (8, 4, 4),
            "axes_lens": (256, 32, 32),
        }
        | changes
    )
