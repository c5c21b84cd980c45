"""latent-diffusion's description of an autoencoder: its `ddconfig` dictionary, alone or inside of a YAML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mflux_vae.errors import SettingsError

_REQUIRED = ("ch", "out_ch", "num_res_blocks", "in_channels", "resolution", "z_channels")
_OPTIONAL = ("ch_mult", "attn_resolutions", "dropout", "resamp_with_conv", "double_z", "attn_type", "use_linear_attn")
_IDLE = {"give_pre_end": False, "tanh_out": False}
"""What this project's network never does: accepted where it says so."""

_ATTENTION = {"vanilla": "vanilla", "vanilla-xformers": "vanilla", "linear": "linear", "none": "none"}
"""xFormers' attention is the same function."""


def kl_settings(config: Mapping[str, Any], embed_dim: int | None = None) -> dict[str, Any]:
    """Fields of `AutoencoderKLConfig`.

    Args:
        config: `{"ch": 128, "ch_mult": (1, 2, 4, 4), ...}`; or what a YAML file of latent-diffusion holds, with the
            same under `model: params: ddconfig:`, there also of a whole diffusion model (`first_stage_config`), whose
            `scale_factor` is then taken, too.
        embed_dim: channels of a latent; None for the one beside the ddconfig, or else z_channels.

    Raises:
        SettingsError: a key is missing, unknown or not supported.
    """
    scale = None
    for part in _parts(config):
        embed_dim = part.get("embed_dim", embed_dim) if embed_dim is None else embed_dim
        scale = part.get("scale_factor", scale)
    given = {key: value for key, value in part.items() if key not in ("embed_dim", "scale_factor")}
    if "attn_resolution" in given and "attn_resolutions" not in given:
        given["attn_resolutions"] = given.pop("attn_resolution")
    if missing := [key for key in _REQUIRED if key not in given]:
        raise SettingsError(f"ddconfig: {', '.join(missing)} missing")
    if unknown := sorted(given.keys() - {*_REQUIRED, *_OPTIONAL, *_IDLE}):
        raise SettingsError(f"ddconfig: {', '.join(unknown)} not known")
    if refused := [key for key, idle in _IDLE.items() if given.get(key, idle) != idle]:
        raise SettingsError(f"ddconfig: {', '.join(refused)} not supported")
    kind = "linear" if given.get("use_linear_attn") else given.get("attn_type", "vanilla")
    if kind not in _ATTENTION:
        raise SettingsError(f"ddconfig: attn_type {kind!r} not supported; only {', '.join(_ATTENTION)}")
    widths = [given["ch"] * factor for factor in given.get("ch_mult", (1, 2, 4, 8))]
    resolutions = given.get("attn_resolutions", ()) if _ATTENTION[kind] != "none" else ()
    attention = tuple(i for i in range(len(widths)) if given["resolution"] // 2**i in resolutions)
    settings = {
        "in_channels": given["in_channels"],
        "out_channels": given["out_ch"],
        "latent_channels": embed_dim or given["z_channels"],
        "block_out_channels": widths,
        "layers_per_block": given["num_res_blocks"],
        "sample_size": given["resolution"],
        "encoder_attention": attention,
        "decoder_attention": attention,
        "attention_type": "vanilla" if kind == "none" else _ATTENTION[kind],
        "mid_block_add_attention": _ATTENTION[kind] != "none",
        "dropout": given.get("dropout", 0.0),
        "resample_with_conv": given.get("resamp_with_conv", True),
        "double_z": given.get("double_z", True),
        "z_channels": given["z_channels"],
        "stem_channels": given["ch"],
    }
    return settings if scale is None else {**settings, "scaling_factor": scale}


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """From the outermost mapping to the ddconfig itself."""
    while True:
        if not isinstance(config, Mapping):
            raise SettingsError(f"ddconfig: expected a mapping, not {config!r}")
        yield config
        inner = next((key for key in ("model", "params", "first_stage_config", "ddconfig") if key in config), None)
        if inner is None:
            return
        config = config[inner]
