"""Published models and single files: what is downloaded, and when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import read_json, write_json, write_safetensors
from mflux_vae_train.pipelines.stable_diffusion.configs import REPOSITORIES, SD_2, SDXL, recommended
from mflux_vae_train.pipelines.stable_diffusion.files import detect, folder, hub
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import open_single_file, write_single_file
from tests.mflux_vae_train.pipelines.flux1.test_load import Hub
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import small_configs, small_parts


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder and a single file of a small pipeline."""
    place, configs = tmp_path_factory.mktemp("sd1"), small_configs("sd1")
    parts = small_parts(configs, place / "tokenizers")
    folder.write(parts, configs, place / "folder", "float32")
    write_single_file(place / "whole.safetensors", parts, configs)
    return place


def answering(monkeypatch: pytest.MonkeyPatch, answer: Path | Exception) -> list:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in := Hub(answer))
    return stand_in.asked


@pytest.mark.parametrize("name", REPOSITORIES)
def test_published_models_open_without_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, AssertionError("the hub was asked"))
    opened = hub.open_repository(name)
    assert (opened.name, opened.base_model) == (name, REPOSITORIES[name]) and not asked
    assert [*opened.parts.networks] == ["unet", *opened.configs.text_encoders]
    assert opened.snapshot.parts == [*opened.parts.networks, "vae"] and not opened.snapshot.is_cached()


def test_another_repository_is_read_first(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, repository / "folder")
    opened = hub.open_repository("owner/name", revision="main", variant="fp16")
    assert opened.configs == small_configs("sd1") and len(asked) == 1
    with pytest.raises(WeightsError, match=r"unet.*fp16"):
        opened.parts.networks["unet"].get()
    assert asked[1][:2] == ("owner/name", "main")
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked[1][2]


def test_a_file_needs_only_tokenizers_and_what_it_lacks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, repository / "folder")
    whole = open_single_file(repository / "whole.safetensors", configs=small_configs("sd1"))
    lacking = replace(whole, stored={**whole.stored, "vae": {}})
    for single in (whole, lacking):
        monkeypatch.setattr(hub, "open_single_file", lambda *_, one=single, **__: one)
        opened = hub.open_file(single.path)
        assert opened.base_model is None and opened.snapshot.parts == single.missing
        opened.parts.networks["unet"].get()
        opened.parts.networks["text_encoder"].get()
        assert not asked
    opened.parts.vae.get()
    assert opened.parts.tokenizers["tokenizer"].folder == repository / "folder" / "tokenizer"
    assert [repository for repository, *_ in asked] == [REPOSITORIES["sd1.5"]]
    assert not any("unet/" in pattern for pattern in asked[0][2])


def test_a_folder_of_parts_that_do_not_belong_together_is_refused(repository: Path, tmp_path: Path) -> None:
    files = {file: read_json(file) for file in (repository / "folder").rglob("*.json") if "tokenizer" not in file.parts}
    for part, change, word in (
        ("text_encoder/config.json", {"hidden_size": 18}, "text encoders"),
        ("vae/config.json", {"latent_channels": 8}, "autoencoder"),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "Inpaint"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
    ):
        for file, content in files.items():
            name = str(file.relative_to(repository / "folder"))
            write_json(tmp_path / name, content | (change if name == part else {}))
        with pytest.raises((WeightsError, SettingsError), match=word):
            folder.read_configs(tmp_path)


def test_turbo_models_are_recommended_few_steps_without_guidance() -> None:
    schedule = replace(SDXL.schedule, timestep_spacing="trailing")
    found = recommended(replace(SDXL.unet, sample_size=64), schedule)
    assert (found.resolution, found.steps, found.guidance, found.most_guidance) == (512, 4, 1.0, 1.0)
    assert recommended(SDXL.unet, SDXL.schedule) == SDXL.recommended
    assert recommended(SD_2.unet, SD_2.schedule) == SD_2.recommended


def test_broken_files_are_weights_errors(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "empty.safetensors", {})
    (tmp_path / "text.ckpt").write_text("nothing")
    for name in ("empty.safetensors", "text.ckpt", "missing.safetensors"):
        with pytest.raises(WeightsError, match=name):
            open_single_file(tmp_path / name)
    assert not detect.is_known({})
