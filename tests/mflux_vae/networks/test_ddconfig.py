"""Configurations of latent-diffusion's autoencoders are read."""

from __future__ import annotations

from typing import Any

import pytest
from mlx.utils import tree_flatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig, SettingsError

SEED: dict[str, Any] = {
    "ch": 128,
    "out_ch": 3,
    "ch_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "in_channels": 3,
    "resolution": 256,
    "double_z": True,
    "z_channels": 16,
}
"""An example of latent-diffusion's configuration of an autoencoder."""


def test_a_ddconfig_as_it_stands() -> None:
    config = AutoencoderKLConfig.from_ddconfig(SEED, embed_dim=16)
    assert config == AutoencoderKLConfig(
        latent_channels=16,
        block_out_channels=(128, 128, 256, 256, 512),
        encoder_attention=(4,),
        decoder_attention=(4,),
        scaling_factor=1.0,
        sample_size=256,
    )
    assert config.downsampling == 16
    assert config.to_dict()["_class_name"] == "AutoencoderKL"  # diffusers has this network, too
    names = {name for name, _ in tree_flatten(AutoencoderKL(config).parameters()) if ".attentions.1.group_norm" in name}
    assert names == {
        f"{block}.attentions.1.group_norm.{kind}"
        for block in ("encoder.down_blocks.4", "decoder.up_blocks.0")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("wrapped", "changes"),
    [
        ({"model": {"params": {"ddconfig": SEED, "embed_dim": 16}}}, {}),
        ({"model": {"params": {"ddconfig": SEED}, "embed_dim": 3}}, {"latent_channels": 3, "z_channels": 16}),
        ({"params": {"ddconfig": {**SEED, "ch_mult": [2, 1, 2, 2, 4]}}}, {"stem_channels": 128}),
        ({"ddconfig": {**SEED, "attn_type": "none"}}, {"encoder_attention": (), "mid_block_add_attention": False}),
        ({**SEED, "attn_type": "vanilla-xformers"}, {}),
        ({**SEED, "use_linear_attn": True, "dropout": 0.1}, {"attention_type": "linear", "dropout": 0.1}),
        ({**SEED, "resamp_with_conv": False, "tanh_out": False}, {"resample_with_conv": False}),
        (
            {"model": {"params": {"scale_factor": 0.2, "first_stage_config": {"params": {"ddconfig": SEED}}}}},
            {"scaling_factor": 0.2},
        ),
    ],
    ids=["YAML", "embed_dim outside", "stem", "no attention", "xformers", "linear", "pooling", "diffusion model"],
)
def test_a_ddconfig_inside_of_others(wrapped: dict[str, Any], changes: dict[str, Any]) -> None:
    config = AutoencoderKLConfig.from_ddconfig(wrapped)
    expected = {"scaling_factor": 1.0, "latent_channels": 16, "encoder_attention": (4,), **changes}
    assert {name: getattr(config, name) for name in expected} == expected
    assert AutoencoderKLConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("ddconfig", "word"),
    [
        ({"ch": 128}, "out_ch, num_res_blocks, in_channels, resolution, z_channels missing"),
        ({**SEED, "n_embed": 8192}, "n_embed"),
        ({**SEED, "tanh_out": True}, "tanh_out not supported"),
        ({**SEED, "attn_type": "local"}, "attn_type 'local' not supported"),
        ({**SEED, "ch": "128"}, "invalid"),
        ({**SEED, "ch": 100}, "multiples of norm_num_groups"),
        ({"model": None}, "mapping"),
        ({"model": {"params": {}}}, "missing"),
    ],
)
def test_a_ddconfig_is_checked(ddconfig: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        AutoencoderKLConfig.from_ddconfig(ddconfig)
