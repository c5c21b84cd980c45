"""Another autoencoder in place of a pipeline's."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig
from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae_train.pipelines import flux1, registry
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.footprint import Workload
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_pipeline
from tests.mflux_vae_train.pipelines.stable_diffusion import small_sd

OTHER = AutoencoderKLConfig(
    block_out_channels=(4, 4, 4, 8),
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=2,
    scaling_factor=1.5,
    mid_block_add_attention=False,
)
PIXELS = mx.random.uniform(-1, 1, (1, 32, 32, 3), key=mx.random.key(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pipeline")
    small_pipeline(place / "parts").save_pretrained(place / "saved", "float32")
    return place / "saved"


def written(place: Path, config: AutoencoderKLConfig = OTHER) -> VAE:
    vae = VAE(network=drawn(AutoencoderKL(config), 9))
    vae.save_pretrained(place)
    return vae


def test_it_encodes_counts_and_is_saved(folder: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "vae")
    plain, pipeline = flux1.load(str(folder)), registry.open_pipeline(str(folder), vae=str(tmp_path / "vae"))
    assert pipeline.parts.vae.loaded is None
    latents = pipeline.encode_images(PIXELS)
    np.testing.assert_allclose(np.array(latents), np.array(other.encode_nhwc(PIXELS)), atol=1e-6)
    assert not np.allclose(np.array(latents), np.array(plain.encode_images(PIXELS)), atol=0.1)
    assert pipeline.encoder_fingerprint("images") != plain.encoder_fingerprint("images")
    assert pipeline.encoder_fingerprint("prompts") == plain.encoder_fingerprint("prompts")
    work = Workload(resolution=64, trained=1)
    assert pipeline.footprint(work).peak != plain.footprint(work).peak
    pipeline.release("images")
    pipeline.save_pretrained(tmp_path / "saved", "float32")
    again = FluxPipeline.from_pretrained(tmp_path / "saved")
    assert mx.array_equal(again.encode_images(PIXELS), latents)


def test_stable_diffusion_takes_it(tmp_path: Path) -> None:
    small_sd.small_pipeline(tmp_path / "parts").save_pretrained(tmp_path / "saved", "float32")
    other = written(tmp_path / "vae")
    pipeline = registry.open_pipeline(str(tmp_path / "saved"), vae=str(tmp_path / "vae"))
    assert isinstance(pipeline, StableDiffusionPipeline) and pipeline.configs.vae["scaling_factor"] == 1.5
    np.testing.assert_allclose(np.array(pipeline.encode_images(PIXELS)), np.array(other.encode_nhwc(PIXELS)), atol=1e-6)


def test_scaling_that_a_file_does_not_state_is_the_models(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written(tmp_path / "vae", replace(OTHER, block_out_channels=(32,) * 4, norm_num_groups=32))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    model, stated = flux1.load(str(folder)).vae, flux1.load(str(folder), vae=str(tmp_path / "vae")).vae
    assert stated.scaling_factor == 1.5
    assert any("--vae" in line and "1.5" in line for line in caplog.messages)
    caplog.clear()
    moved = file.rename(tmp_path / "mine.safetensors")
    vae = flux1.load(str(folder), vae=str(moved)).vae
    assert (vae.scaling_factor, vae.shift_factor) == (model.scaling_factor, model.shift_factor)
    assert not [line for line in caplog.records if line.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "changes", [{"latent_channels": 8}, {"block_out_channels": (4, 4, 8)}], ids=["channels", "scale"]
)
def test_latents_of_another_shape_are_refused(folder: Path, tmp_path: Path, changes: dict) -> None:
    written(tmp_path / "vae", replace(OTHER, **changes))
    with pytest.raises(SettingsError, match="channels"):
        flux1.load(str(folder), vae=str(tmp_path / "vae"))


def test_wrong_sources_are_refused_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="preset"):
        flux1.load(str(folder), vae="sdxll")
    written(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(replace(OTHER, layers_per_block=2).to_dict()))
    with pytest.raises(WeightsError, match="--vae"):
        flux1.load(str(folder), vae=str(tmp_path / "vae"))
    VAE(network=AutoencoderTiny(AutoencoderTinyConfig())).save_pretrained(tmp_path / "taesd")
    with pytest.raises(SettingsError, match="AutoencoderTiny"):
        flux1.load(str(folder), vae=str(tmp_path / "taesd"))
    with pytest.raises(SettingsError, match="--vae"):
        registry.open_pipeline("tiny", vae="flux1")


def test_a_published_one_is_downloaded_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def asked(repository: str, *, local_files_only: bool = False, **_: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise RuntimeError(f"{repository} was asked for")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    pipeline = flux1.load("dev", vae="flux1")
    with pytest.raises(WeightsError, match="FLUX"):
        _ = pipeline.vae
