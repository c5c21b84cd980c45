"""Z-Image keeps the contract of pipelines; its folders, files and names are read and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import WeightsError
from mflux_vae_train import lora
from mflux_vae_train.pipelines import registry
from mflux_vae_train.pipelines.flow.files import read_configs
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.z_image import keys, naming
from mflux_vae_train.pipelines.z_image.configs import OF_BASE, OF_TURBO, PUBLISHED, TURBO
from mflux_vae_train.pipelines.z_image.family import FAMILY
from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline
from tests.contracts.pipeline_contract import PROMPTS, PipelineContract
from tests.contracts.pipeline_contract import keys as sample_keys
from tests.mflux_vae_train.pipelines.z_image.small_z_image import small_config, small_pipeline


class TestContract(PipelineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def pipeline(cls, tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
        return small_pipeline(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("z")
    small_pipeline(place / "parts").save_pretrained(place / "saved", "float32")
    return place / "saved"


def weights_of(pipeline: ZImagePipeline) -> dict[str, mx.array]:
    return dict(tree_flatten(pipeline.denoiser.parameters()))


def test_published_models_open_without_the_hub() -> None:
    for name, configs in (("z-image", OF_BASE), ("Tongyi-MAI/Z-Image-Turbo", OF_TURBO)):
        pipeline = registry.open_pipeline(name)
        assert (pipeline.configs, pipeline.recommended) == (configs, configs.recommended)
        weights = [value.size for _, value in tree_flatten(pipeline.skeleton().parameters())]
        adapted = lora.matching(pipeline.skeleton(), pipeline.lora_targets())
        assert (sum(weights), len(adapted), sum(adapted.values())) == (6_154_908_736, 4 * 34, 1_044_480)


@pytest.mark.parametrize("turbo", [False, True])
def test_saved_pipeline_is_bitwise_equal(tmp_path: Path, turbo: bool) -> None:
    first = small_pipeline(tmp_path / "parts", turbo=turbo)
    first.save_pretrained(tmp_path / "saved", "float32")
    opened = registry.open_pipeline(str(tmp_path / "saved"))
    assert (opened.schedule, opened.recommended) == (first.schedule, first.recommended)
    (tmp_path / "saved" / "recommended.json").unlink()  # as in folders of diffusers
    again = registry.open_pipeline(str(tmp_path / "saved"))
    assert again.recommended == (OF_TURBO if turbo else OF_BASE).recommended
    options = {"size": (32, 48), "steps": 2, "guidance": 0.0 if turbo else 3.0, "key": sample_keys(1, 2, 3)}
    images = [p.sample(p.encode_prompts(PROMPTS), **options) for p in (first, opened)]
    assert mx.array_equal(*images)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_opens(saved: Path, tmp_path: Path, prefix: str, monkeypatch) -> None:
    ours = weights_of(ZImagePipeline.from_pretrained(saved))
    stored = keys.to_single_file(ours)
    assert "layers.0.attention.qkv.weight" in stored and "x_embedder.weight" in stored
    names = {f"{prefix}{name}": value for name, value in stored.items()} | {f"{prefix}norm_final.weight": mx.ones(32)}
    file = tmp_path / "z_image_turbo_bf16.safetensors"
    mx.save_safetensors(str(file), names)
    with pytest.raises(WeightsError, match="misshapen"):  # its size is not the published one
        registry.open_pipeline(str(file))
    published = replace(read_configs(FAMILY, saved), recommended=OF_TURBO.recommended)
    monkeypatch.setitem(PUBLISHED, TURBO, published)
    monkeypatch.setattr("mflux_vae_train.pipelines.z_image.family.ZImageTransformerConfig", small_config)
    opened = registry.open_pipeline(str(file))
    assert opened.recommended == OF_TURBO.recommended and opened.configs.transformer.n_layers == 2
    assert mx.array_equal(opened.denoiser.cap_pad_token, ours["cap_pad_token"])
    found = keys.our_names(mx.load(str(file)))
    assert found.keys() == ours.keys() and all(mx.array_equal(found[name], ours[name]) for name in ours)


def test_no_guidance_is_zero_and_levels_are_shifted_in_training(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path)
    assert pipeline._guidance_scale(0.0) is None and pipeline._guidance_scale(3.0) == 4.0
    key, sampling = sample_keys(*range(2000)), NoiseSampling(scheme=pipeline.recommended.weighting_scheme)
    for configs, mean in ((OF_BASE, 0.770), (OF_TURBO, 0.676)):
        sigma = configs.schedule.training_sigmas(key, sampling, image_tokens=1024)
        assert float(sigma.mean()) == pytest.approx(mean, abs=0.015)


DIALECTS = {
    "peft": ("transformer.{path}", (".lora_A.weight", ".lora_B.weight")),
    "bare": ("{path}", (".lora_A.weight", ".lora_B.weight")),
    "comfyui": ("diffusion_model.{path}", (".lora_A.weight", ".lora_B.weight")),
    "kohya": ("lora_unet_{flat}", (".lora_down.weight", ".lora_up.weight")),
}


@pytest.mark.parametrize(("name", "ends"), DIALECTS.values(), ids=DIALECTS.keys())
def test_adapters_of_other_programs_are_read(tmp_path: Path, name: str, ends: tuple[str, str]) -> None:
    pipeline = small_pipeline(tmp_path)
    tensors = {}
    for path, outputs in (
        ("layers.0.attention.qkv", 96),
        ("layers.1.attention.out", 32),
        ("layers.1.attention.to_q", 32),
    ):
        key = name.format(path=path, flat=path.replace(".", "_"))
        tensors[key + ends[0]], tensors[key + ends[1]] = mx.ones((2, 32)), mx.ones((outputs, 2))
        tensors[f"{key}.alpha"] = mx.array(1.0)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    names = pipeline.kohya_naming()
    read_from = {"transformer": {**names.read_only["transformer"], **names.modules["transformer"]}}
    found = lora.read_adapter(tmp_path / "a.safetensors", {"transformer": pipeline.denoiser}, read_from)["transformer"]
    expected = {f"layers.0.attention.to_{part}": 1.0 for part in "qkv"}
    assert found.alphas == expected | {"layers.1.attention.to_out.0": 1.0, "layers.1.attention.to_q": 1.0}


def test_kohyas_names_return_to_the_same_adapter(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path)
    network, names = pipeline.denoiser, pipeline.kohya_naming().modules
    lora.add_lora(network, naming.PRESETS["attention+mlp"], rank=2)
    for index, layer in enumerate(lora.layers(network).values()):
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(index))
    tensors = lora.kohya_tensors(network, names["transformer"])
    assert "lora_unet_noise_refiner_0_attention_qkv.lora_down.weight" in tensors
    mx.save_safetensors(str(tmp_path / "k.safetensors"), tensors)
    found = lora.read_adapter(tmp_path / "k.safetensors", {"transformer": network}, names)["transformer"]
    for path, layer in lora.layers(network).items():
        np.testing.assert_allclose(found.tensors[f"{path}.lora_B.weight"], layer.lora_b.T, rtol=1e-6)
