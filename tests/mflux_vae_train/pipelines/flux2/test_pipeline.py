"""The FLUX.2 klein pipeline at a small size: its contract, its files, its guidance, its dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train import lora
from mflux_vae_train.lora.layers import bases
from mflux_vae_train.lora.linear import LoRALinear
from mflux_vae_train.pipelines import flux1, registry
from mflux_vae_train.pipelines.flux2 import keys, naming
from mflux_vae_train.pipelines.flux2.configs import BASE_4B, DISTILLED_4B, PUBLISHED, REPOSITORIES
from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline
from mflux_vae_train.pipelines.flux2.transformer import DoubleBlock, SingleBlock
from mflux_vae_train.pipelines.footprint import Workload
from tests.contracts.pipeline_contract import PipelineContract
from tests.contracts.pipeline_contract import keys as sample_keys
from tests.mflux_vae_train.pipelines.flux2.small_klein import (
    RECOMMENDED,
    TEXT_TOKENS,
    SmallKlein,
    small_config,
    small_pipeline,
)

PROMPTS = ["a photo of a red star", "a blue dog"]
STEM = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Flux2KleinPipeline:
    return small_pipeline(tmp_path_factory.mktemp("klein"), recommended=RECOMMENDED)


@pytest.fixture
def folder(klein: Flux2KleinPipeline, tmp_path: Path) -> Path:
    klein.save_pretrained(tmp_path / "saved", "float32")
    return tmp_path / "saved"


def picture(pipeline: Flux2KleinPipeline, **options) -> np.ndarray:
    pipeline.prompt_limit = TEXT_TOKENS
    settings = {"size": (32, 48), "steps": 2, "guidance": 2.0, "key": sample_keys(0, 1)} | options
    return np.array(pipeline.sample(pipeline.encode_prompts(PROMPTS), **settings))


class TestContract(PipelineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def pipeline(cls, tmp_path_factory: pytest.TempPathFactory) -> Flux2KleinPipeline:
        return small_pipeline(tmp_path_factory.mktemp("contract"), recommended=RECOMMENDED)


def test_saved_pipeline_is_equal(klein: Flux2KleinPipeline, folder: Path) -> None:
    opened = SmallKlein.from_pretrained(folder)
    assert (opened.recommended, opened.schedule, opened.configs.is_distilled) == (RECOMMENDED, klein.schedule, False)
    np.testing.assert_array_equal(picture(opened), picture(klein))


@pytest.mark.parametrize("naming", ["bfl", "comfyui", "diffusers"])
def test_transformer_file_is_opened_as_flux2(klein, folder: Path, tmp_path: Path, naming: str, monkeypatch) -> None:
    monkeypatch.setattr("mflux_vae_train.pipelines.flux2.family.Flux2TransformerConfig", small_config)
    text_encoder = replace(klein.configs.text_encoder, num_hidden_layers=28)
    for repository in (BASE_4B, DISTILLED_4B):
        small = replace(PUBLISHED[repository], text_encoder=text_encoder, vae=klein.configs.vae)
        monkeypatch.setitem(PUBLISHED, repository, small)
    tensors = mx.load(str(folder / "transformer" / STEM))
    if naming != "diffusers":
        tensors = keys.to_bfl(tensors)
    if naming == "comfyui":
        tensors = {f"model.diffusion_model.{name}": value for name, value in tensors.items()}
    for name, distilled in (("mine", False), ("flux-2-klein-4b", True), ("flux-2-klein-base-4b", False)):
        file = tmp_path / f"{name}.safetensors"
        mx.save_safetensors(str(file), tensors)
        assert not flux1.opens(file)
        opened = registry.open_pipeline(str(file))
        assert isinstance(opened, Flux2KleinPipeline) and opened.configs.is_distilled == distilled
        before = mx.load(str(folder / "transformer" / STEM))
        after = dict(tree_flatten(opened.denoiser.parameters()))
        assert all(mx.array_equal(before[key], after[key]) for key in before)
    assert opened.footprint(Workload(resolution=32, trained=1)).download > 0


def test_transformer_file_narrower_than_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="width"):
        registry.open_pipeline(str(folder / "transformer" / STEM))


def test_single_file_in_a_folder_replaces_the_transformer(folder: Path, monkeypatch) -> None:
    expected = picture(SmallKlein.from_pretrained(folder))
    file = folder / "transformer" / STEM
    mx.save_safetensors(str(folder / "flux-2-klein-base-4b.safetensors"), keys.to_bfl(mx.load(str(file))))
    file.unlink()
    np.testing.assert_array_equal(picture(SmallKlein.from_pretrained(folder)), expected)


def test_flux2_dev_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    with pytest.raises(SettingsError, match="dev"):
        registry.open_pipeline(str(tmp_path))
    names = ["guidance_in.in_layer", "single_stream_modulation.lin", "double_blocks.0.img_attn.proj"]
    mx.save_safetensors(str(tmp_path / "dev.safetensors"), {f"{name}.weight": mx.zeros((2, 2)) for name in names})
    with pytest.raises((SettingsError, WeightsError), match="dev"):
        registry.open_pipeline(str(tmp_path / "dev.safetensors"))


@pytest.mark.parametrize("name", [*REPOSITORIES, DISTILLED_4B])
def test_published_models_open_without_the_hub(name: str) -> None:
    pipeline = registry.open_pipeline(name)
    distilled = pipeline.configs.is_distilled
    assert (pipeline.recommended.steps, pipeline.recommended.guidance) == ((4, 1.0) if distilled else (50, 4.0))
    assert (pipeline.recommended.train_instead is not None) == distilled
    assert pipeline.base_model in PUBLISHED


@pytest.mark.parametrize(("name", "per_rank"), [("flux2-klein-4b", 1_044_480), ("flux2-klein-9b", 1_736_704)])
def test_default_adapter_has_the_layers_of_diffusers_script(name: str, per_rank: int) -> None:
    pipeline = registry.open_pipeline(name)
    assert sum(lora.matching(pipeline.skeleton(), pipeline.lora_targets()).values()) == per_rank
    more = lora.matching(pipeline.skeleton(), naming.PRESETS["attention+mlp"])
    assert set(more) == {path for path in bases(pipeline.skeleton()) if "transformer_blocks." in path}


def test_distilled_model_draws_without_guidance(tmp_path: Path) -> None:
    pipeline = small_pipeline(tmp_path, distilled=True)
    np.testing.assert_array_equal(picture(pipeline, guidance=1.0), picture(pipeline, guidance=4.0))
    pipeline.save_pretrained(tmp_path / "saved", "float32")
    assert SmallKlein.from_pretrained(tmp_path / "saved").configs.is_distilled


@pytest.mark.usefixtures("gpu_branch")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gpu_keeps_bfloat16_throughout(folder: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of blocks and outputs of adapters; sigma and latents are float32."""
    mx.disable_compile()
    pipeline = SmallKlein.from_pretrained(folder)
    lora.add_lora(pipeline.denoiser, naming.PRESETS["attention+mlp"], rank=2)
    pipeline.set_gradient_checkpointing(checkpointing)
    seen: list[mx.Dtype] = []

    def watch(kind: type[nn.Module], *, results: bool) -> None:
        call = kind.__call__

        def watched(self, *arrays: mx.array, **rest):
            result = call(self, *arrays, **rest)
            seen.extend(array.dtype for array in ([result] if results else arrays))
            return result

        monkeypatch.setattr(kind, "__call__", watched)

    watch(DoubleBlock, results=False)
    watch(SingleBlock, results=False)
    watch(LoRALinear, results=True)
    try:
        latents = mx.random.normal((1, 2, 3, 16))
        conditioning = pipeline.encode_prompts(PROMPTS[:1])

        def loss(_: nn.Module) -> mx.array:
            return pipeline.loss(latents, conditioning, key=sample_keys(0), guidance=1.0).sum()

        value, gradients = nn.value_and_grad(pipeline.denoiser, loss)(pipeline.denoiser)
    finally:
        mx.enable_compile()
    assert set(seen) == {mx.bfloat16} and value.dtype == mx.float32
    assert {gradient.dtype for _, gradient in tree_flatten(gradients)} == {mx.float32}


def test_step_is_traceable_and_checkpointing_changes_nothing(klein: Flux2KleinPipeline) -> None:
    latents = mx.random.normal((2, 2, 3, 16), key=mx.random.key(0))
    conditioning = klein.encode_prompts(PROMPTS)
    network = klein.denoiser

    def step(parameters: dict, latents: mx.array, key: mx.array) -> tuple[mx.array, dict]:
        def loss(parameters: dict) -> mx.array:
            network.update(parameters)
            return klein.loss(latents, conditioning, key=key, guidance=1.0).mean()

        return mx.value_and_grad(loss)(parameters)

    weights, key = network.trainable_parameters(), sample_keys(0, 1)
    try:
        value, gradients = step(weights, latents, key)
        traced = mx.compile(step)(weights, latents, key)  # not evaluated: compilation for a CPU takes a minute
        assert len(tree_flatten(traced[1])) == len(tree_flatten(weights))
        klein.set_gradient_checkpointing(True)
        again, checkpointed = step(weights, latents, key)
    finally:
        klein.set_gradient_checkpointing(False)
        network.update(weights)
    assert again.item() == value.item()
    for (name, gradient), (_, expected) in zip(tree_flatten(checkpointed), tree_flatten(gradients), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_gradients_equal_eager_ones(folder: Path) -> None:
    pipeline = SmallKlein.from_pretrained(folder)
    network = pipeline.denoiser
    lora.add_lora(network, ["*.to_q", "*.to_qkv_mlp_proj"], rank=2)
    for layer in lora.layers(network).values():
        layer.lora_b = mx.full(layer.lora_b.shape, 0.1)
    latents = mx.random.normal((2, 2, 3, 16), key=mx.random.key(0))
    conditioning, parameters = pipeline.encode_prompts(PROMPTS), network.trainable_parameters()

    def loss(parameters: dict, key: mx.array) -> mx.array:
        network.update(parameters)
        return pipeline.loss(latents, conditioning, key=key, guidance=1.0).mean()

    for on in (False, True):
        pipeline.set_gradient_checkpointing(on)
        plain = mx.grad(loss)
        compiled = mx.compile(lambda parameters, key, plain=plain: plain(parameters, key))
        for key in (sample_keys(0, 1), sample_keys(2, 3)):
            expected, found = (dict(tree_flatten(run(parameters, key))) for run in (plain, compiled))
            network.update(parameters)
            assert all(mx.abs(gradient).max().item() > 0 for gradient in expected.values())
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)
