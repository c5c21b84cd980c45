"""What a file is, from keys, shapes, names and what lies beside it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mflux_vae.pretrained import loading
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.presets import PRESETS
from mflux_vae.weights.formats.files import write_safetensors
from tests.mflux_vae.naming_samples import kl, lazily, named, write_blank


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_recognised_at_its_full_size(name: str, tmp_path: Path) -> None:
    preset = PRESETS[name]
    for naming in FAMILIES[preset.family].tables:
        hint = f"{name}-" if name in ("qwen-image", "wan2.1") else ""  # their files differ in nothing else
        path = lazily(tmp_path / f"{hint}{naming}.safetensors", name, naming)
        description = loading.describe(path)
        nested = preset.config.to_dict().get("use_quant_conv")
        assert (description.family, description.naming) == (
            preset.family,
            naming if nested or naming != "bfl" else "compvis",
        )
        alike = description.config | {
            key: preset.config.to_dict().get(key) for key in (*SCALING, "sample_size", "force_upcast")
        }
        expected = {key: preset.config.to_dict().get(key) for key in alike}
        assert alike == expected
        chosen = loading.describe(path, config=name)
        assert chosen.config == preset.config.to_dict() and chosen.assumed is None
        # presets that differ in nothing but their purpose have the first one's name
        assert PRESETS[chosen.preset].config.to_dict().get("scaling_factor") == chosen.config.get("scaling_factor")


SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@pytest.mark.parametrize(
    ("file", "like", "others", "metadata", "expected"),
    [
        ("model.safetensors", "sd1", {"conditioner.embedders.1.model.ln_final.weight": (2,)}, {}, "sdxl"),
        ("model.safetensors", "sd1", {"cond_stage_model.model.ln_final.weight": (2,)}, {}, "sd2"),
        ("xl.safetensors", "sd1", {"cond_stage_model.transformer.text_model.x": (2,)}, {}, "sd1"),
        ("model.safetensors", "flux1", {"model.diffusion_model.joint_blocks.0.x": (2,)}, {}, "sd3"),
        ("model.safetensors", "sd3", {"model.diffusion_model.double_blocks.0.x": (2,)}, {}, "flux1"),
        ("vae.safetensors", "sd1", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, "sdxl"),
        ("vae.safetensors", "sd1", {}, {"modelspec.architecture": "stable-diffusion-v1/vae"}, "sd1"),
        ("vae.safetensors", "sd3", {}, {"modelspec.architecture": "stable-diffusion-v3-medium"}, "sd3"),
        ("sdxl_vae.safetensors", "sd1", {}, {}, "sdxl"),
        ("sdxl-vae-fp16-fix.safetensors", "sd1", {}, {}, "sdxl-fp16-fix"),
        ("sd_xl_base_1.0.safetensors", "sd1", {}, {}, "sdxl"),
        ("playground-v2.5.safetensors", "sd1", {}, {}, "playground"),
        ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1", {}, {}, "sd-vae-ft-mse"),
        ("ae.safetensors", "sd3", {}, {}, "flux1"),
        ("sd3.5_vae.safetensors", "flux1", {}, {}, "sd3"),
        ("z_image_vae.safetensors", "sd3", {}, {}, "z-image"),
        ("kl-f8-d16.safetensors", "kl-f8-d16", {}, {}, "kl-f8-d16"),
        ("x.safetensors", "flux2-small-decoder", {}, {}, "flux2-small-decoder"),
        ("x.safetensors", "cogview4", {}, {}, "cogview4"),
    ],
)
def test_scaling_follows_from_what_lies_beside(
    file: str, like: str, others: dict, metadata: dict, expected: str, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    prefix = "first_stage_model." if others else ""
    path = lazily(folder / file, like, "compvis", **metadata)
    if others:
        network = FAMILIES["AutoencoderKL"].network(PRESETS[like].config)
        shapes = {prefix + key: value.shape for key, value in named(network, "compvis").items()}
        path = write_blank(folder / file, {**shapes, **others})
    description = loading.describe(path)
    assert (description.preset, description.assumed) == (expected, None)
    assert description.config == PRESETS[expected].config.to_dict()


@pytest.mark.parametrize(
    ("like", "taken", "others"),
    [("sd1", "sd1", "'sdxl' or 'sdxl-fp16-fix' or 'playground'"), ("flux1", "sd3", "'flux1' or 'z-image'")],
)
def test_unknown_scaling_is_assumed_and_reported(like: str, taken: str, others: str, tmp_path: Path) -> None:
    description = loading.describe(lazily(tmp_path / "x.safetensors", like, "diffusers"))
    assert description.preset == taken
    assert description.assumed is not None and f"{taken}; pass config={others}" in description.assumed
    assert loading.describe(tmp_path / "x.safetensors", config="flux" if like == "flux1" else "sdxl").assumed is None


def test_an_assumption_is_logged_once_it_matters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = kl()
    write_safetensors(tmp_path / "a.safetensors", named(network))
    with caplog.at_level(logging.INFO, "mflux_vae"):
        opened = loading.open_network(tmp_path / "a.safetensors")
        assert "latent scaling unknown" in caplog.text
        caplog.clear()
        assert opened.config.scaling_factor == 0.18215
        assert (
            loading.open_network(tmp_path / "a.safetensors", config=network.config.to_dict()).config == network.config
        )
        loading.convert(
            tmp_path / "a.safetensors", tmp_path / "b.safetensors", "compvis", config=network.config.to_dict()
        )
        assert loading.open_network(tmp_path / "b.safetensors").config == network.config
        assert not caplog.records
