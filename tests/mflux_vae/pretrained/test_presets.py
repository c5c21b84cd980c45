"""The table of presets: names are unambiguous, sizes are the published ones, and diffusers' files say the same."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.presets import PRESETS, find

PARAMETERS = {
    **dict.fromkeys(["sd1", "sd-vae-ft-mse", "sd2", "sdxl", "sdxl-fp16-fix", "playground"], (83_653_863, 248)),
    **dict.fromkeys(["sd3", "flux1", "z-image"], (83_819_683, 244)),
    "flux2": (84_046_115, 251),
    "flux2-small-decoder": (62_373_091, 251),
    "kl-f8-d16": (57_266_643, 248),
    "cogview4": (406_100_643, 288),
    **dict.fromkeys(["taesd", "taesdxl"], (2_445_063, 134)),
    **dict.fromkeys(["taesd3", "taef1"], (2_458_899, 134)),
    **dict.fromkeys(["qwen-image", "wan2.1"], (44_599_603, 186)),  # without the weights for videos
    "taef2": (2_677_027, 158),
    "taew2.1": (11_315_539, 128),
}
"""As published: parameters, and tensors, running statistics included."""


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes(name: str) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    preset = PRESETS[name]
    network = FAMILIES[preset.family].network(preset.config)
    count = sum(value.size for _, value in tree_flatten(network.trainable_parameters()))
    assert (count, len(tree_flatten(network.parameters()))) == PARAMETERS[name]
    assert mx.get_peak_memory() - before < 2**20, "building a network computes nothing"


def test_encoder_and_decoder_of_stable_diffusion() -> None:
    network = FAMILIES["AutoencoderKL"].network(PRESETS["sd1"].config)
    counts = [sum(v.size for _, v in tree_flatten(half.parameters())) for half in (network.encoder, network.decoder)]
    assert counts == [34_163_592, 49_490_179]


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_there_and_back(name: str) -> None:
    preset = PRESETS[name]
    written = preset.config.to_dict()
    extended = preset.name == "taef2"
    assert written["_class_name"] == preset.family + "Extended" * extended, "diffusers opens the others of its classes"
    assert FAMILIES[preset.family].config.from_dict(written) == preset.config


@pytest.mark.parametrize(
    ("name", "channels", "factor"),
    [
        *(
            ("sd1", 4, 8),
            ("sd3", 16, 8),
            ("qwen-image", 16, 8),
            ("wan2.1", 16, 8),
            ("taef1", 16, 8),
            ("taew2.1", 16, 8),
        ),
        *(("flux2", 128, 16), ("flux2-small-decoder", 128, 16), ("taef2", 128, 16)),
    ],
)
def test_what_the_denoiser_sees(name: str, channels: int, factor: int) -> None:
    config = PRESETS[name].config
    assert (config.scaled_channels, config.scaled_downsampling) == (channels, factor)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd1", "sd1"),
        ("SD 1.5", "sd1"),
        ("stabilityai/sdxl-vae", "sdxl"),
        ("sdxl_vae_fp16_fix", "sdxl-fp16-fix"),
        ("Playground 2.5", "playground"),
        ("sd3.5", "sd3"),
        ("FLUX.1-dev", "flux1"),
        ("flux", "flux1"),
        ("FLUX.2", "flux2"),
        ("FLUX.2 small decoder", "flux2-small-decoder"),
        ("CogView4", "cogview4"),
        ("TAESD-XL", "taesdxl"),
        ("Qwen_Image", "qwen-image"),
        ("Krea 2", "qwen-image"),
        ("Wan-2.1", "wan2.1"),
        ("taew2_1", "taew2.1"),
        ("sd4", None),
        ("", None),
    ],
)
def test_names(name: str, expected: str | None) -> None:
    found = find(name)
    assert (found and found.name) == expected


def test_no_name_is_two_presets() -> None:
    for preset in PRESETS.values():
        for name in (preset.name, preset.title, preset.repository, *preset.aliases):
            assert find(name) is preset, name


def test_published_scaling() -> None:
    def scaling(name: str) -> tuple[Any, ...]:
        config = PRESETS[name].config
        return config.scaling_factor, config.shift_factor, config.force_upcast

    assert scaling("sd1") == scaling("sd2") == (0.18215, None, True)
    assert scaling("sdxl") == (0.13025, None, True) and scaling("sdxl-fp16-fix") == (0.13025, None, False)
    assert scaling("sd3") == (1.5305, 0.0609, True)
    assert scaling("flux1") == scaling("z-image") == (0.3611, 0.1159, True)
    assert scaling("cogview4") == (1.0, 0.0, True)
    assert scaling("taesd") == scaling("taef1") == (1.0, 0.0, False)
    assert scaling("kl-f8-d16") == (pytest.approx(0.244474202), None, True)
