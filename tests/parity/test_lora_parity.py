"""Adapters written here, read by diffusers, PEFT and mflux: DoRA, kohya's naming, files of FLUX.1's full size."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.lora.files import adapter_config
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.flux1 import naming
from mflux_vae_train.pipelines.flux1.configs import CLIP_L
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.text.clip import CLIPTextModel
from tests.mflux_vae_train.lora.test_lora import X, adapted, with_dora
from tests.mflux_vae_train.training.tiny_model import Net

pytestmark = pytest.mark.parity


def full_width(patterns: Any, **blocks: int) -> FluxTransformer:
    """A FLUX.1 transformer with an adapter of random numbers. Its own weights are never computed."""
    net = FluxTransformer(FluxTransformerConfig(**blocks))
    lora.add_lora(net, patterns, rank=3, alpha=6.0)
    keys = iter(mx.random.split(mx.random.key(0), 5000))
    net.update(tree_map(lambda x: mx.random.normal(x.shape, key=next(keys)), net.trainable_parameters()))
    return net


def deltas(net: nn.Module) -> dict[str, mx.array]:
    return {path: layer.scale * (layer.lora_a @ layer.lora_b).T for path, layer in lora.layers(net).items()}


def read_by_peft(path: Path) -> Any:
    """`Net` in torch, with a file's adapter as diffusers' loader has PEFT attach it."""
    torch = pytest.importorskip("torch")
    PeftAdapterMixin = pytest.importorskip("diffusers.loaders").PeftAdapterMixin
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata
    from safetensors.torch import load_file

    class Theirs(torch.nn.Module, PeftAdapterMixin):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)])
            self.out = torch.nn.Linear(4, 3, bias=False)

        def forward(self, x):  # type: ignore[no-untyped-def]
            h = torch.tanh(self.blocks[0](x)) + 0.1
            return self.out(torch.tanh(self.blocks[1](h)))

    theirs = Theirs()
    theirs.load_state_dict({key: torch.tensor(np.array(value)) for key, value in tree_flatten(Net().parameters())})
    metadata = _load_sft_state_dict_metadata(str(path))
    theirs.load_lora_adapter(load_file(path), prefix="transformer", metadata=metadata)
    return theirs


def test_a_scale_by_the_root_of_the_rank_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    saved, path = adapted(alpha=4.0), tmp_path / "pytorch_lora_weights.safetensors"
    config = {**adapter_config(saved, "transformer"), "transformer.use_rslora": True}
    write_safetensors(path, lora.adapter_tensors(saved, "transformer"), {lora.METADATA_KEY: json.dumps(config)})
    ours = Net()
    lora.load_adapter({"transformer": ours}, path)
    np.testing.assert_allclose(read_by_peft(path)(torch.tensor(np.array(X))).detach(), ours(X), rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours(X), saved(X), rtol=1e-2)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_computes_the_same_and_learns_the_same(dora: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    ours = with_dora() if dora else adapted(alpha=4.0)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora.save_adapter({"transformer": ours}, path)
    theirs = read_by_peft(path)
    config = theirs.peft_config["default_0"]
    assert (config.r, config.lora_alpha, config.use_dora) == (2, 4, dora)

    outputs = theirs(torch.tensor(np.array(X)))
    np.testing.assert_allclose(outputs.detach().numpy(), ours(X), rtol=1e-5, atol=1e-6)
    trained = [(name, one) for name, one in theirs.named_parameters() if "lora_" in name]
    for _, parameter in trained:
        parameter.requires_grad_(True)
    (theirs(torch.tensor(np.array(X))) ** 2).mean().backward()
    gradients = nn.value_and_grad(ours, lambda net: mx.square(net(X)).mean())(ours)[1]
    own = dict(tree_flatten(gradients))
    names = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
    assert len(trained) == len(own) == (6 if dora else 4)
    for name, parameter in trained:
        path_of, kind = name.split(".lora_")[0], next(key for key in names if key in name)
        np.testing.assert_allclose(parameter.grad.numpy().T, own[f"{path_of}.{names[kind]}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "patterns",
    [
        [*naming.PRESETS["attention+mlp"], "*.norm*.linear"],
        ["*.to_q", "*.to_v", "*.add_k_proj", "*.proj_mlp"],  # some of the layers that were one
    ],
)
def test_diffusers_converts_kohyas_naming_back(patterns: list[str]) -> None:
    torch = pytest.importorskip("torch")
    utilities = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    net = full_width(patterns, num_layers=1, num_single_layers=1)
    expected = deltas(net)
    modules = naming.kohya_naming(net.config, CLIP_L).modules["transformer"]
    tensors = lora.kohya_tensors(net, modules)
    given = {key: torch.tensor(np.array(value)) for key, value in tensors.items()}
    back = utilities._convert_kohya_flux_lora_to_diffusers(copy.copy(given))
    found = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in back if "lora_A" in key}
    assert found >= expected.keys()
    for path in found:
        a, b = (mx.array(back[f"transformer.{path}.lora_{x}.weight"].numpy()) for x in "AB")
        theirs = b @ a
        if path in expected:
            assert mx.abs(theirs - expected[path]).max() < 1e-4, path  # numpy's comparison takes a minute for all
        else:  # a part of a fused layer that has no adapter here
            assert not mx.any(theirs)


def test_diffusers_finds_what_clip_has_learnt_in_kohyas_naming() -> None:
    torch = pytest.importorskip("torch")
    utilities = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    net = full_width(["*.to_out.0"], num_layers=1, num_single_layers=0, num_attention_heads=1)
    clip = CLIPTextModel(replace(CLIP_L, num_hidden_layers=2, vocab_size=9, hidden_size=48))
    lora.add_lora(clip, naming.CLIP_ATTENTION, rank=3, alpha=6.0)
    clip.update(tree_map(lambda x: x + mx.sin(mx.arange(x.size)).reshape(x.shape), clip.trainable_parameters()))
    names = naming.kohya_naming(net.config, clip.config).modules
    tensors = lora.kohya_tensors(net, names["transformer"]) | lora.kohya_tensors(clip, names["text_encoder"])
    given = {key: torch.tensor(np.array(value)) for key, value in tensors.items()}
    back = utilities._convert_kohya_flux_lora_to_diffusers(given)
    for path, expected in deltas(clip).items():
        # diffusers' own name for it, older than PEFT's
        layer = f"text_encoder.{path.removesuffix('_proj').replace('self_attn.', 'self_attn.to_')}_lora"
        a, b = (back[f"{layer}.{kind}.weight"].numpy() for kind in ("down", "up"))
        np.testing.assert_allclose(b @ a, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_trained_by_kohyas_scripts_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    utilities = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    net = FluxTransformer(FluxTransformerConfig(num_layers=1, num_single_layers=1))
    shapes = {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * 3072, 3072),
        "lora_unet_double_blocks_0_txt_mlp_0": (4 * 3072, 3072),
        "lora_unet_single_blocks_0_linear1": (7 * 3072, 3072),
    }
    tensors, draws = {}, np.random.default_rng(0)
    for name, (outputs, inputs) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = mx.array(draws.standard_normal((4, inputs), np.float32))
        tensors[f"{name}.lora_up.weight"] = mx.array(draws.standard_normal((outputs, 4), np.float32))
        tensors[f"{name}.alpha"] = mx.array(2.0)
    given = {key: torch.tensor(np.array(value)) for key, value in tensors.items()}
    theirs = utilities._convert_kohya_flux_lora_to_diffusers(given)
    write_safetensors(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "4"})
    names = {"transformer": naming.kohya_naming(net.config, CLIP_L).modules["transformer"]}
    found = lora.load_adapter({"transformer": net}, tmp_path / "a.safetensors", names)
    assert len(found["transformer"]) == 3 + 1 + 4
    for path, layer in lora.layers(net).items():
        a, b = (theirs[f"transformer.{path}.lora_{kind}.weight"].numpy() for kind in "AB")
        x = draws.standard_normal((2, a.shape[1]), np.float32)
        found = layer.scale * (x @ np.array(layer.lora_a)) @ np.array(layer.lora_b)
        np.testing.assert_allclose(found, x @ a.T @ b.T, rtol=1e-3, atol=1e-2)  # of numbers near a hundred


def test_pefts_adapter_on_all_linear_layers_is_where_training_begins(tmp_path: Path) -> None:
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(tiny.WEIGHTS / "transformer")
    theirs.add_adapter(peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian"))
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    given = tmp_path / "pytorch_lora_weights.safetensors"
    settings = DreamBoothSettings(
        model="tiny",
        instance_data_dir=str(tiny.WEIGHTS.parent / "example"),
        instance_prompt="a photo of xyz star",
        output_dir=str(tmp_path / "out"),
        lora_weights=str(given),
        resolution=32,
        prior_preservation="none",
        num_validation_images=0,
        max_train_steps=2,
    )
    DreamBooth(tiny.load()).train(settings)
    before, after = (mx.load(str(folder / given.name)) for folder in (tmp_path, tmp_path / "out"))
    assert before.keys() == after.keys() and "transformer.x_embedder.lora_A.weight" in before


@pytest.fixture(scope="module")
def whole() -> FluxTransformer:
    return full_width(naming.PRESETS["attention+mlp"])


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_mflux_maps_every_key_of_a_file_of_full_size(kind: str, whole: FluxTransformer, tmp_path: Path) -> None:
    pytest.importorskip("mflux")
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.lora.mapping.lora_loader import LoRALoader
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.weights.flux_lora_mapping import FluxLoRAMapping

    path, printed = tmp_path / "adapter.safetensors", []
    if kind == "peft":
        lora.save_adapter({"transformer": whole}, path)
    else:
        write_safetensors(
            path, lora.kohya_tensors(whole, naming.kohya_naming(whole.config, CLIP_L).modules["transformer"]), {}
        )
    theirs = Transformer(ModelConfig.schnell())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        LoRALoader.load_and_apply_lora(FluxLoRAMapping.get_mapping(), theirs, [str(path)], [1.0], bake_lora=False)
    keys = len(mx.load(str(path)))
    said = "\n".join(printed)
    assert f"Applied to {19 * 12 + 38 * 5} layers ({keys}/{keys} keys matched)" in said and "unmatched" not in said
    modules = dict(theirs.named_modules())
    for name, layer in lora.layers(whole).items():
        if ".7." not in name:
            continue
        # mflux's first feed-forward layer is called by its place, as the file of kohya's scripts has it
        other: Any = modules.get(name) or modules[_in_mflux(name)]
        expected = layer.scale * (layer.lora_a @ layer.lora_b)
        np.testing.assert_allclose(other.scale * (other.lora_A @ other.lora_B), expected, rtol=1e-4, atol=1e-4)


def _in_mflux(name: str) -> str:
    for ours, theirs in (
        (".net.0.proj", ".linear1"),
        (".net.2", ".linear2"),
    ):
        name = name.replace(ours, theirs)
    return name
