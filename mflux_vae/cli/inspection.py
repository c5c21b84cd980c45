"""The command ``mflux-vae info``: describe a weights file or folder, or list the presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from mflux_vae.cli import latent_file
from mflux_vae.networks.flux2 import AutoencoderKLFlux2Config
from mflux_vae.networks.laq import LAQConfig
from mflux_vae.pretrained import loading, presets
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.presets import PRESETS
from mflux_vae.runtime.device import DEVICES, kind
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.utils.formatting import count_text, first_names, size_text

SIDES = (512, 1024, 2048)
"""Image sizes (pixels) for the memory estimate."""

WHAT: tuple[Literal["encode", "decode"], ...] = ("encode", "decode")


def info(*, model: str | None, config: str | None, as_json: bool) -> None:
    """Describe a weights file or folder, or a latent file; without one, list the presets."""
    if model is None:
        _list_presets(as_json)
        return
    if config is None and latent_file.is_latent_file(model):
        _describe_latents(model, as_json)
        return
    found = loading.describe(model, config=config)
    network = FAMILIES[found.family].build(found.config).eval()
    latents = _latents(network.config)
    sides = SIDES if "downsampling" in latents else (latents["image"],) if "image" in latents else ()
    needed = {
        what: {f"{side}x{side}": tiling_plan.peak_bytes(network, what, 1, side, side) for side in sides}
        for what in WHAT
    }
    if as_json:
        print(json.dumps({**asdict(found), "latents": latents, "memory_bytes": needed}, indent=2))
        return
    stored = " and ".join(found.dtypes) or "not downloaded"
    row = PRESETS.get(found.preset or "")
    preset = row.title if row else f"preset {found.preset}" if found.preset else "no preset"
    print(f"{found.source}: {preset}")
    print(
        f"  {found.family}, {found.naming} naming, {found.parameters:,} parameters in {found.tensors} tensors, {stored}"
    )
    print(f"  latents: {_describe(latents)}")
    for what, sizes in needed.items() if sides else ():
        memory = ", ".join(f"{size} {size_text(number)}" for size, number in sizes.items())
        print(f"  memory to {what}: {memory} (this {DEVICES[kind()]})")
    if found.assumed:
        print(f"  {found.assumed}")


def _describe_latents(path: str, as_json: bool) -> None:
    entries, settings = latent_file.read(path)
    if as_json:
        pictures = {name: {"size": entry.size, "latents": entry.latents.shape} for name, entry in entries.items()}
        print(json.dumps({"source": path, "settings": settings, "pictures": pictures}, indent=2))
        return
    encoder = f"{settings.get('model', 'an unknown model')} in {settings.get('dtype', 'an unknown dtype')}"
    print(f"{path}: latents of {count_text(len(entries), 'image')}, encoded by {encoder}")
    print(f"  {first_names(list(entries))}")


def _list_presets(as_json: bool) -> None:
    rows = {
        name: {"title": row.title, "repository": row.repository, "inside": row.inside, **_latents(row.config)}
        for name, row in PRESETS.items()
    }
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:20} {row['channels']:3} channels at 1/{row['downsampling']:<3} {row['title']}")
    for name in presets.names()[len(rows) :]:
        print(f"{name:20} registered: {presets.registered(name)}")


def _latents(config: Any) -> dict[str, Any]:
    """Latents as the denoiser sees them; or the size of vector latents; or of codes for a pair of frames."""
    if isinstance(config, LAQConfig):
        return {"codes": config.code_seq_len, "of": config.codebook_size, "frame": config.image_size}
    if config.vectors:
        return {"numbers": config.latent_dim, "image": config.image_size}
    if isinstance(config, AutoencoderKLFlux2Config):
        scaling = "scaled by running statistics"
    elif getattr(config, "latents_mean", None):
        scaling = "scaled by mean and std per channel"
    else:
        scaling = f"(raw - {config.shift_factor or 0}) * {config.scaling_factor}"
    return {"channels": config.scaled_channels, "downsampling": config.scaled_downsampling, "scaling": scaling}


def _describe(latents: Mapping[str, Any]) -> str:
    if "codes" in latents:
        return "{codes} codes of {of} for a pair of frames of {frame} x {frame}".format(**latents)
    if "numbers" in latents:
        return "{numbers} numbers for an image of {image} x {image}".format(**latents)
    return "{channels} channels at 1/{downsampling} of the size, {scaling}".format(**latents)
