"""Read latent-diffusion's `ddconfig`, alone or inside a YAML configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_few

_REQUIRED = ("ch", "out_ch", "num_res_blocks", "in_channels", "resolution", "z_channels")
_OPTIONAL = ("ch_mult", "attn_resolutions", "dropout", "resamp_with_conv", "double_z", "attn_type", "use_linear_attn")
_FIXED = {"give_pre_end": False, "tanh_out": False}
"""Options that must be off: the network does not support them."""

_ATTENTION = {"vanilla": "vanilla", "vanilla-xformers": "vanilla", "linear": "linear", "none": "none"}
"""xFormers attention computes the same function."""


def kl_settings(config: Mapping[str, Any], embed_dim: int | None = None) -> dict[str, Any]:
    """Convert a ddconfig to fields of `AutoencoderKLConfig`.

    Args:
        config: `{"ch": 128, "ch_mult": (1, 2, 4, 4), ...}`, or the content of a YAML file with it under
            `model: params: ddconfig:`, also of a whole diffusion model (`first_stage_config`), whose `scale_factor` is
            used.
        embed_dim: latent channels; None: `embed_dim` beside the ddconfig, else z_channels.

    Raises:
        SettingsError: a key is missing, unknown or not supported.
    """
    scale = None
    for part in _parts(config):
        embed_dim = part.get("embed_dim", embed_dim) if embed_dim is None else embed_dim
        scale = part.get("scale_factor", scale)
    values = {key: value for key, value in part.items() if key not in ("embed_dim", "scale_factor")}
    if "attn_resolution" in values and "attn_resolutions" not in values:
        values["attn_resolutions"] = values.pop("attn_resolution")
    if missing := [key for key in _REQUIRED if key not in values]:
        raise SettingsError(f"ddconfig: {', '.join(missing)} missing; add them")
    if unknown := sorted(values.keys() - {*_REQUIRED, *_OPTIONAL, *_FIXED}):
        raise SettingsError(f"ddconfig: {first_few([*map(str, unknown)])} unknown")
    if refused := [key for key, fixed in _FIXED.items() if values.get(key, fixed) != fixed]:
        raise SettingsError(f"ddconfig: {', '.join(refused)} not supported")
    kind = "linear" if values.get("use_linear_attn") else values.get("attn_type", "vanilla")
    if kind not in _ATTENTION:
        raise SettingsError(f"ddconfig: attn_type {kind!r} not supported; only {', '.join(_ATTENTION)}")
    widths = [values["ch"] * factor for factor in values.get("ch_mult", (1, 2, 4, 8))]
    resolutions = values.get("attn_resolutions", ()) if _ATTENTION[kind] != "none" else ()
    attention = tuple(i for i in range(len(widths)) if values["resolution"] // 2**i in resolutions)
    settings = {
        "in_channels": values["in_channels"],
        "out_channels": values["out_ch"],
        "latent_channels": embed_dim or values["z_channels"],
        "block_out_channels": widths,
        "layers_per_block": values["num_res_blocks"],
        "sample_size": values["resolution"],
        "encoder_attention": attention,
        "decoder_attention": attention,
        "attention_type": "vanilla" if kind == "none" else _ATTENTION[kind],
        "mid_block_add_attention": _ATTENTION[kind] != "none",
        "dropout": values.get("dropout", 0.0),
        "resample_with_conv": values.get("resamp_with_conv", True),
        "double_z": values.get("double_z", True),
        "z_channels": values["z_channels"],
        "stem_channels": values["ch"],
    }
    return settings if scale is None else {**settings, "scaling_factor": scale}


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield nested mappings from the outermost to the ddconfig."""
    while True:
        if not isinstance(config, Mapping):
            raise SettingsError(f"ddconfig must be a mapping, not {config!r}")
        yield config
        inner = next((key for key in ("model", "params", "first_stage_config", "ddconfig") if key in config), None)
        if inner is None:
            return
        config = config[inner]
