"""Single files: written and read back whole, recognized by their keys, and refused by name."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import open_weights, write_safetensors
from mflux_vae.weights.keymaps.rules import from_mlx
from mflux_vae_train.pipelines.capabilities import SupportsSingleFile
from mflux_vae_train.pipelines.stable_diffusion.configs import REPOSITORIES, SD_2, SD_2_BASE, Configs
from mflux_vae_train.pipelines.stable_diffusion.files import folder, keys
from mflux_vae_train.pipelines.stable_diffusion.files.detect import detect, is_known
from mflux_vae_train.pipelines.stable_diffusion.files.parts import open_parts
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import open_single_file, write_single_file
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import small_configs, small_parts, small_unet
from tests.mflux_vae_train.pipelines.stable_diffusion.files.test_keys import FULL
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import small_pipeline

PREFIX = "model.diffusion_model."
PATH = Path("model.safetensors")


def parameters(parts: Any) -> dict[str, mx.array]:
    modules = {name: part.get() for name, part in parts.networks.items()} | {"vae": parts.vae.get().network}
    return {f"{name}.{key}": value for name, one in modules.items() for key, value in tree_flatten(one.parameters())}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "ssd"])
def test_a_pipeline_comes_back_from_a_folder_and_from_one_file(kind: str, tmp_path: Path) -> None:
    configs = small_configs(kind)
    parts = small_parts(configs, tmp_path / "tokenizers")
    folder.write(parts, configs, tmp_path / "folder", "float32")
    assert folder.read_configs(tmp_path / "folder") == configs
    write_single_file(tmp_path / "a.safetensors", parts, configs, dtype="float32")
    file = open_single_file(tmp_path / "a.safetensors", configs=configs)
    assert not file.missing and not file.notes
    expected = parameters(parts)
    for single in (None, file):
        found = parameters(open_parts(configs, lambda: tmp_path / "folder", single_file=single))
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], value) for name, value in expected.items())


def test_a_file_is_written_in_half_precision_with_its_architecture(tmp_path: Path) -> None:
    configs = small_configs("sdxl")
    configs = replace(configs, schedule=replace(configs.schedule, prediction_type="v_prediction"))
    write_single_file(tmp_path / "a.safetensors", small_parts(configs, tmp_path), configs, title="sks dog")
    stored, metadata = open_weights(tmp_path / "a.safetensors")
    assert {one.dtype for one in stored.values()} == {"float16"} and "v_pred" in stored
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert (metadata["modelspec.title"], metadata["modelspec.prediction_type"]) == ("sks dog", "v")
    with pytest.raises(SettingsError, match="float8"):
        write_single_file(tmp_path / "a.safetensors", small_parts(configs, tmp_path), configs, dtype="float8")


@cache
def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    tensors = from_mlx(dict(tree_flatten(UNet(FULL[kind]).parameters())), keys.original_unet(FULL[kind]))
    return {f"{PREFIX}{key}": tensor.shape for key, tensor in tensors.items()}


def configs_of(given: dict, metadata: dict[str, str] | None = None, path: Path = PATH, **options: Any) -> Configs:
    return detect(given, metadata or {}, path, **{"configs": None, "prediction_type": None, **options}).configs


@pytest.mark.parametrize(
    ("kind", "name", "resolution"), [("sd1", "sd1.5", 512), ("sd2", "sd2.1", 768), ("sdxl", "sdxl", 1024)]
)
def test_the_published_models_are_recognized(kind: str, name: str, resolution: int) -> None:
    found = detect(shapes(kind), {}, PATH, configs=None, prediction_type=None)
    configs = found.configs
    assert (found.base, configs.recommended.resolution) == (REPOSITORIES[name], resolution)
    assert configs.unet == (SD_2.unet if kind == "sd2" else FULL[kind])
    assert len(found.notes) == (kind == "sd2") and configs.class_name.startswith("StableDiffusion")


def test_other_depths_and_files_with_the_unet_alone_are_recognized() -> None:
    alone = {key.removeprefix(PREFIX): shape for key, shape in shapes("ssd").items()}
    for given in (alone, shapes("ssd")):
        unet = configs_of(given).unet
        assert (unet.down, unet.mid, unet.up) == (FULL["ssd"].down, FULL["ssd"].mid, FULL["ssd"].up)


@pytest.mark.parametrize(
    ("metadata", "name", "option", "expected"),
    [
        ({"modelspec.prediction_type": "epsilon"}, "x", None, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "512-base", None, "v_prediction"),
        ({"modelspec.resolution": "512x512"}, "x", None, "epsilon"),
        ({"global_step": "875000"}, "x", None, "epsilon"),
        ({}, "v2-1_512-ema-pruned", None, "epsilon"),
        ({}, "v2-1_768-ema-pruned", None, "v_prediction"),
        ({}, "v2-1_768-ema-pruned", "epsilon", "epsilon"),
        ({}, "mine", None, "v_prediction"),
    ],
)
def test_what_stable_diffusion_2_predicts(metadata: dict, name: str, option: str | None, expected: str) -> None:
    path = Path(f"{name}.safetensors")
    found = detect(shapes("sd2"), metadata, path, configs=None, prediction_type=option)
    like = SD_2_BASE if expected == "epsilon" else SD_2
    assert (found.configs.schedule, found.configs.unet) == (like.schedule, like.unet)
    assert bool(found.notes) == (name == "mine")


def test_v_prediction_and_zero_snr_of_sdxl_by_the_keys_of_comfyui() -> None:
    schedule = configs_of(shapes("sdxl") | {"v_pred": (0,), "ztsnr": (0,)}).schedule
    assert schedule.prediction_type == "v_prediction" and schedule.rescale_betas_zero_snr


def changed(kind: str, key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return shapes(kind) | {f"{PREFIX}{key}": shape}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (lambda: changed("sd1", "input_blocks.0.0.weight", (320, 9, 3, 3)), "inpainting"),
        (lambda: changed("sd1", "input_blocks.0.0.weight", (320, 8, 3, 3)), "InstructPix2Pix"),
        (lambda: changed("sd2", "input_blocks.0.0.weight", (320, 5, 3, 3)), "depth"),
        (lambda: shapes("sdxl") | {"edm_mean": (4,)}, "Playground"),
        (lambda: shapes("sd2") | {"noise_augmentor.data_mean": (1,)}, "unCLIP"),
        (lambda: shapes("sd1") | {"control_model.time_embed.0.weight": (1,)}, "ControlNet"),
        (lambda: changed("sd1", "time_embed.cond_proj.weight", (320, 256)), "latent consistency"),
        (lambda: {f"{PREFIX}joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "Stable Diffusion 3"),
        (lambda: {"clip_txt_mapper.weight": (2048, 1280)}, "Cascade"),
        (lambda: {"down_blocks.0.resnets.0.norm1.weight": (320,)}, "config.json"),
        (lambda: {"unknown": (1,)}, "no UNet"),
        (lambda: {k: v for k, v in shapes("sd1").items() if "input_blocks.4.0.out" not in k}, "unknown layers"),
    ],
)
def test_other_models_are_refused_by_name(given: Any, word: str) -> None:
    with pytest.raises((WeightsError, SettingsError), match=word) as caught:
        configs_of(given())
    assert str(PATH) in str(caught.value) and len(str(caught.value)) < 300
    assert is_known(given()) == (word != "no UNet")


def test_the_refiner_is_refused() -> None:
    given = changed("sdxl", "label_emb.0.0.weight", (1280, 2560))
    given = {key: (*shape[:1], 1280) if "attn2.to_k" in key else shape for key, shape in given.items()}
    with pytest.raises(SettingsError, match="refiner"):
        configs_of(given)


def test_flux_and_adapters_are_not_recognized() -> None:
    assert is_known({f"state_dict.{key}": shape for key, shape in shapes("sd1").items()})
    assert not is_known({"double_blocks.0.img_mod.lin.weight", "single_blocks.0.linear1.weight"})
    assert not is_known({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "first_stage_model.decoder.x"})


def test_missing_parts_are_named_together_and_averages_are_noted(tmp_path: Path) -> None:
    configs = small_configs("sdxl")
    tensors = from_mlx(dict(tree_flatten(UNet(small_unet("sdxl")).parameters())), keys.original_unet(configs.unet))
    averaged = {f"model_ema.{index}": mx.zeros(1) for index in range(101)}
    whole = {f"{PREFIX}{key}": value for key, value in tensors.items()} | averaged
    for file, given in ((tmp_path / "a.safetensors", whole), (tmp_path / "b.safetensors", tensors)):
        write_safetensors(file, given)
        found = open_single_file(file, configs=configs)
        assert len(found.read("unet")) == len(tensors)
        assert len(found.notes) == (given is whole)
        with pytest.raises(WeightsError, match=r"text_encoder and no text_encoder_2 and no vae"):
            found.read("text_encoder")


def test_a_pipeline_saves_itself_as_one_file(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path / "parts", "sdxl")
    assert isinstance(pipeline, SupportsSingleFile)
    pipeline.save_single_file(tmp_path / "a.safetensors")
    file = open_single_file(tmp_path / "a.safetensors", configs=pipeline.configs)
    assert not file.missing and file.read("text_encoder_2")["text_projection.weight"].dtype == mx.float16
