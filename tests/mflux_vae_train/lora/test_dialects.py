"""Adapter files of other programs: the same weight changes as from PEFT's file, or refused by name in a short line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import open_weights, write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.lora.dialects import check_kind
from mflux_vae_train.lora.kohya import split
from mflux_vae_train.pipelines.flux1 import naming
from mflux_vae_train.pipelines.flux1.configs import CLIP_L
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from tests.mflux_vae_train.pipelines.flux1.small_flux import small_config
from tests.mflux_vae_train.training.tiny_model import Net

CONFIG = small_config()
WIDTH = CONFIG.width
KOHYA = naming.kohya_naming(CONFIG, CLIP_L)
NAMES = {"transformer": {**KOHYA.read_only["transformer"], **KOHYA.modules["transformer"]}}
RANK, ALPHA = 4, 16.0

Tensors = Mapping[str, mx.array]


def pair(rank: int, inputs: int, outputs: int, seed: int = 0) -> tuple[mx.array, mx.array]:
    draws = np.random.default_rng([seed, rank, inputs, outputs])
    return tuple(mx.array(draws.standard_normal(shape), mx.float32) for shape in ((rank, inputs), (outputs, rank)))


Q, K, V, MLP, OUT = ("to_q", "to_k", "to_v", "proj_mlp", "proj_out")
SINGLE, DOUBLE = "single_transformer_blocks.1", "transformer_blocks.0"
QKV = pair(RANK, WIDTH, 3 * WIDTH)
LINEAR1 = pair(RANK, WIDTH, 7 * WIDTH)
FF = pair(RANK, WIDTH, 4 * WIDTH)
FUSED = {"double_blocks.0.img_attn.qkv": QKV, "single_blocks.1.linear1": LINEAR1, "double_blocks.0.img_mlp.0": FF}
PLAIN = {
    **{f"{DOUBLE}.attn.{q}": (QKV[0], rows) for q, rows in zip((Q, K, V), mx.split(QKV[1], 3), strict=True)},
    **{f"{SINGLE}.attn.{q}": (LINEAR1[0], LINEAR1[1][i * WIDTH :][:WIDTH]) for i, q in enumerate((Q, K, V))},
    f"{SINGLE}.{MLP}": (LINEAR1[0], LINEAR1[1][3 * WIDTH :]),
    f"{DOUBLE}.ff.net.0.proj": FF,
}
"""The same adapter by original and by diffusers' names: (A, B) of each layer."""

METADATA = {"lora_alpha": str(ALPHA), "r": str(RANK)}


def spelled(
    layers: Mapping[str, tuple[mx.array, mx.array]], pattern: str, ends: tuple[str, str], alpha: bool = False
) -> dict:
    """Tensors with `pattern` around the names of layers; `_` replaces their dots if the pattern ends so."""
    tensors = {}
    for name, matrices in layers.items():
        name = name.replace(".", "_") if pattern.endswith("_") else name
        for end, matrix in zip(ends, matrices, strict=True):
            tensors[f"{pattern}{name}.{end}"] = matrix.T if end in ("lora_a", "lora_b") else matrix
        if alpha:
            tensors[f"{pattern}{name}.alpha"] = mx.array(16)
    return tensors


PEFT, KOHYA_ENDS = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
MLX = {name.replace("img_mlp.", "img_mlp.layers."): matrices for name, matrices in FUSED.items()}
OF_MFLUX = {name.replace("net.0.proj", "linear1"): matrices for name, matrices in PLAIN.items()}

DIALECTS = {
    "PEFT in diffusers": spelled(PLAIN, "transformer.", PEFT),
    "PEFT's model": spelled(PLAIN, "transformer.base_model.model.", PEFT),
    "PEFT alone": spelled(PLAIN, "base_model.model.", PEFT),
    "PEFT, not saved by PEFT": spelled(PLAIN, "", ("lora_A.default.weight", "lora_B.default.weight")),
    "compiled": spelled(PLAIN, "_orig_mod.", PEFT),
    "no prefix": spelled(PLAIN, "", PEFT),
    "ComfyUI": spelled(PLAIN, "diffusion_model.", PEFT),
    "ComfyUI, original names": spelled(FUSED, "diffusion_model.", PEFT),
    "whole model": spelled(FUSED, "model.diffusion_model.", KOHYA_ENDS),
    "original names": spelled(FUSED, "", PEFT),
    "OneTrainer": spelled(PLAIN, "lora_transformer_", KOHYA_ENDS, alpha=True),
    "kohya": spelled(FUSED, "lora_unet_", KOHYA_ENDS, alpha=True),
    "kohya, diffusers' names": spelled(PLAIN, "lora_unet_", KOHYA_ENDS, alpha=True),
    "dots": spelled(PLAIN, "transformer.", KOHYA_ENDS, alpha=True),
    "diffusers before PEFT": spelled(PLAIN, "transformer.", ("lora.down.weight", "lora.up.weight")),
    "mlx-examples": spelled(MLX, "", ("lora_a", "lora_b")),
    "mlx-lm": spelled(PLAIN, "", ("lora_a", "lora_b")),
    "mflux": spelled(OF_MFLUX, "transformer.", PEFT),
    "1x1 kernels": {key: value[..., None, None] for key, value in spelled(PLAIN, "lora_unet_", KOHYA_ENDS).items()},
}


def deltas(tensors: Tensors, metadata: Mapping[str, str], path: Path) -> dict[str, np.ndarray]:
    """Weight change of each layer of the small transformer."""
    write_safetensors(path, dict(tensors), dict(metadata))
    net = FluxTransformer(CONFIG)
    lora.load_adapter({"transformer": net}, path, NAMES)
    return {name: np.array(layer.scale * (layer.lora_a @ layer.lora_b).T) for name, layer in lora.layers(net).items()}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_other_spellings_are_the_same_adapter(dialect: str, tmp_path: Path) -> None:
    found = deltas(DIALECTS[dialect], METADATA, tmp_path / "a.safetensors")
    assert found.keys() == PLAIN.keys()
    for name, (a, b) in PLAIN.items():
        np.testing.assert_allclose(found[name], ALPHA / RANK * np.array(b @ a), rtol=1e-4, atol=1e-4)


def test_layers_outside_the_blocks_by_original_names(tmp_path: Path) -> None:
    layers = {"img_in": pair(RANK, CONFIG.in_channels, WIDTH), "time_in.out_layer": pair(RANK, WIDTH, WIDTH)}
    found = deltas(spelled(layers, "diffusion_model.", PEFT), METADATA, tmp_path / "a.safetensors")
    assert found.keys() == {"x_embedder", "time_text_embed.timestep_embedder.linear_2"}
    layers = {"final_layer.adaLN_modulation.1": pair(RANK, WIDTH, 2 * WIDTH)}
    with pytest.raises(WeightsError, match="adaLN_modulation"):
        deltas(spelled(layers, "", PEFT), METADATA, tmp_path / "a.safetensors")


LAYER = "transformer.transformer_blocks.0.attn.to_q"
REFUSED = {
    "double_blocks.0.processor.qkv_lora1.down.weight": "XLabs",
    "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": "LoKr",
    "lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": "LoHa",
    "lora_unet_double_blocks_0_img_attn_proj.dora_scale": "DoRA",
    "lora_unet_double_blocks_0_img_attn_proj.oft_blocks": "OFT",
    f"{LAYER}.ia3_l": "(IA)3",
    f"{LAYER}.lora_E": "AdaLoRA",
    f"{LAYER}.lora_B.bias": "biases",
    f"{LAYER}.lora_mid.weight": "third matrix",
    "transformer.proj_out.modules_to_save.weight": "modules_to_save",
    "lora_unet_img_in.diff": "differences",
    "bundle_emb.sks.t5": "embeddings",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": "text_encoder",
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": "text_encoder_2",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": "text_encoder",
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "text_encoder",
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_kinds_are_refused_by_name_and_key(key: str, tmp_path: Path) -> None:
    tensors = {**DIALECTS["PEFT in diffusers"], key: mx.ones((RANK, WIDTH))}
    with pytest.raises(WeightsError) as caught:
        deltas(tensors, METADATA, tmp_path / "a.safetensors")
    message = str(caught.value).removeprefix(str(tmp_path))
    assert REFUSED[key] in message and key in message and len(message) <= 300


@pytest.mark.parametrize("pattern", ["transformer.", "lora_transformer_", "diffusion_model."])
def test_an_adapter_of_another_model_is_described_shortly(pattern: str, tmp_path: Path) -> None:
    blocks = {f"transformer_blocks.{i}": 19 for i in range(19)} | {
        f"single_transformer_blocks.{i}": 38 for i in range(38)
    }
    a, b = mx.zeros((1, 3072)), mx.zeros((3072, 1))
    layers = {f"{block}.attn.{name}": (a, b) for block in blocks for name in (Q, K, V)}
    with pytest.raises(WeightsError) as caught:
        deltas(spelled(layers, pattern, PEFT), METADATA, tmp_path / "a.safetensors")
    message = str(caught.value).removeprefix(str(tmp_path))
    assert f"width 3072 with 19 + 38 blocks; this model has {WIDTH} and 1 + 2" in message and len(message) <= 300


def test_the_original_names_of_another_model_and_a_unet_are_described(tmp_path: Path) -> None:
    layers = {f"double_blocks.{i}.img_attn.proj": pair(1, 64, 64) for i in range(3)}
    layers |= {f"single_blocks.{i}.linear2": pair(1, 64, 64) for i in range(5)}
    for pattern in ("lora_unet_", "diffusion_model."):
        with pytest.raises(WeightsError, match=r"width 64 with 3 \+ 5 blocks"):
            deltas(spelled(layers, pattern, KOHYA_ENDS), {}, tmp_path / "a.safetensors")
    layers = {f"down_blocks.{i}.attentions.0.to_q": pair(1, 320, 320) for i in range(3)}
    with pytest.raises(WeightsError, match="made for a unet of width 320"):
        deltas(spelled(layers, "unet.", PEFT), {}, tmp_path / "a.safetensors")


@given(
    st.lists(st.text(st.characters(blacklist_categories=["Cs"]), max_size=400), max_size=40, unique=True),
    st.integers(0, 2000),
    st.sampled_from(["", ".lora_A.weight", ".lora_up.weight", ".alpha", ".x"]),
)
@settings(deadline=None, max_examples=15)
def test_errors_do_not_grow_with_the_file(tmp_path_factory, names: list[str], count: int, end: str) -> None:
    path = tmp_path_factory.mktemp("long") / "a.safetensors"
    one = mx.ones((1, 1))
    tensors = {f"{name}{end}": one for name in names} | {f"layer.{'x' * (i % 300)}{i}{end}": one for i in range(count)}
    tensors.pop("", None), tensors.pop("__metadata__", None)
    write_safetensors(path, {"transformer.blocks.0.lora_A.weight": one, **tensors}, {})
    with pytest.raises(WeightsError) as caught:
        lora.load_adapter({"transformer": Net()}, path)
    assert len(str(caught.value).removeprefix(str(path))) <= 300


# alpha and rank


def scales(tensors: Tensors, metadata: Mapping[str, str], folder: Path, name: str = "a.safetensors") -> set[float]:
    write_safetensors(folder / name, dict(tensors), dict(metadata))
    net = Net()
    lora.load_adapter({"transformer": net}, folder / name)
    return {layer.scale for layer in lora.layers(net).values()}


TWO = {"blocks.0": pair(4, 4, 8), "out": pair(4, 4, 3)}
FILE = spelled(TWO, "transformer.", PEFT)
KEY = lora.METADATA_KEY


@pytest.mark.parametrize(
    "metadata",
    [
        {"transformer.lora_alpha": "16", "transformer.r": "4"},
        {"lora_alpha": "16"},
        {"lora_alpha": "16.0", "rank": "4"},
        {"ss_network_alpha": "16", "ss_network_dim": "4"},
        {"network_alpha": "16", "ss_network_dim": "Dynamic"},
        {KEY: json.dumps({"lora_alpha": 16, "r": 4})},
        {KEY: json.dumps({"transformer.lora_alpha": 16, "text_encoder.lora_alpha": 3})},
        {KEY: json.dumps({"transformer": {"lora_alpha": 16}})},
        {KEY: json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})},
        {KEY: json.dumps({"lora_alpha": 1, "alpha_pattern": {"blocks.0": 16, "^out$": 16}})},
        {"transformer.lora_alpha": "8", "transformer.use_rslora": "True", "transformer.bias": "none"},
    ],
)
def test_alpha_is_read_from_every_form_of_metadata(metadata: dict, tmp_path: Path) -> None:
    assert scales(FILE, metadata, tmp_path) == {4.0}


def test_alpha_tensors_beside_any_matrices(tmp_path: Path) -> None:
    alphas = {"transformer.blocks.0.alpha": mx.array(8), "transformer.out.alpha": mx.array([2.0], mx.float16)}
    assert scales(FILE | alphas, {}, tmp_path) == {2.0, 0.5}
    assert scales(FILE | alphas, {"lora_alpha": "8"}, tmp_path) == {2.0, 0.5}
    with pytest.raises(WeightsError, match="alpha 16"):
        scales(FILE | alphas, {"lora_alpha": "16"}, tmp_path)


@pytest.mark.parametrize(
    ("metadata", "word"),
    [
        ({"lora_alpha": "0"}, "lora_alpha is 0"),
        ({"lora_alpha": "-4"}, "-4"),
        ({"lora_alpha": "nan"}, "nan"),
        ({"ss_network_alpha": "inf"}, "ss_network_alpha"),
        ({"lora_alpha": "sixteen"}, "sixteen"),
        ({KEY: '{"lora_alpha": NaN}'}, "lora_alpha"),
        ({KEY: '{"lora_alpha": [16]}'}, "lora_alpha"),
        ({KEY: '{"lora_alpha": true}'}, "lora_alpha"),
        ({KEY: '{"lora_alpha": 4, "alpha_pattern": {"out": 0}}'}, "alpha_pattern"),
        ({KEY: '{"lora_alpha": 8}', "lora_alpha": "16"}, "8 and .* 16"),
        ({"lora_alpha": "16", "r": "8"}, "rank 8"),
        ({"ss_network_dim": "8", "ss_network_alpha": "8"}, "rank 8"),
        ({KEY: '{"r": 4, "rank_pattern": {"out": 2}}'}, "rank 2"),
        ({"r": "4.5"}, "whole"),
        ({KEY: '{"use_dora": true}'}, "use_dora"),
        ({KEY: '{"peft_type": "LOHA"}'}, "LOHA"),
        ({KEY: '{"transformer.bias": "all"}'}, "bias"),
        ({KEY: '{"modules_to_save": ["proj_out"]}'}, "modules_to_save"),
        ({KEY: '{"init_lora_weights": "pissa_niter_4"}'}, "pissa"),
    ],
)
def test_what_metadata_cannot_state_is_refused_with_the_file(metadata: dict, word: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"a\.safetensors: .*{word}") as caught:
        scales(FILE, metadata, tmp_path)
    assert len(str(caught.value).removeprefix(str(tmp_path))) <= 300


def test_alpha_that_nothing_states_is_counted(tmp_path: Path) -> None:
    alphas = {"transformer.out.alpha": mx.array(8.0)}
    for tensors, unstated in ((FILE, 2), (FILE | alphas, 1)):
        assert scales(tensors, {}, tmp_path) == ({1.0} if unstated == 2 else {1.0, 2.0})
        assert lora.read_adapter(tmp_path / "a.safetensors", {"transformer": Net()})["transformer"].unstated == unstated


PEFT_FOLDER = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "bias": "none", "modules_to_save": None}


def test_a_folder_of_peft(tmp_path: Path) -> None:
    tensors = spelled(TWO, "base_model.model.", PEFT)
    for changes, scale in (({}, 4.0), ({"use_rslora": True}, 16 / math.sqrt(4))):
        (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_FOLDER | changes))
        assert scales(tensors, {"format": "pt"}, tmp_path, "adapter_model.safetensors") == {scale}
    for changes in ({"fan_in_fan_out": True}, {"bias": "lora_only"}, {"modules_to_save": ["out"]}, {"use_dora": True}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_FOLDER | changes))
        with pytest.raises(WeightsError, match=next(iter(changes))):
            scales(tensors, {}, tmp_path, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 20.0}}))
    tensors = spelled(TWO, "", ("lora_a", "lora_b"))
    assert scales(tensors, {}, tmp_path, "adapters.safetensors") == {20.0}


def test_magnitudes_as_peft_keeps_them_in_memory(tmp_path: Path) -> None:
    for end in ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"):
        magnitudes = {f"transformer.blocks.0.{end}": mx.ones(8), f"transformer.out.{end}": mx.ones(3)}
        write_safetensors(tmp_path / "a.safetensors", FILE | magnitudes, {"use_dora": "True"})
        net = Net()
        lora.load_adapter({"transformer": net}, tmp_path / "a.safetensors")
        assert all(layer.m.size in (8, 3) for layer in lora.layers(net).values())
    write_safetensors(tmp_path / "a.safetensors", FILE | {f"transformer.out.{end}": mx.ones(3)}, {})
    with pytest.raises(WeightsError, match=r"missing .*blocks\.0"):
        lora.load_adapter({"transformer": Net()}, tmp_path / "a.safetensors")


# ranks that differ


def test_ranks_and_alphas_of_single_layers_are_kept_and_written(tmp_path: Path) -> None:
    layers = {"blocks.0": pair(2, 4, 8), "blocks.1": pair(3, 8, 4), "out": pair(2, 4, 3)}
    alphas = {"blocks.0": 2.0, "blocks.1": 12.0, "out": 1.0}
    tensors = spelled(layers, "lora_unet_", KOHYA_ENDS)
    tensors |= {f"lora_unet_{name.replace('.', '_')}.alpha": mx.array(alpha) for name, alpha in alphas.items()}
    write_safetensors(tmp_path / "a.safetensors", tensors, {})
    net, again = Net(), Net()
    lora.load_adapter({"transformer": net}, tmp_path / "a.safetensors")
    file = lora.read_adapter(tmp_path / "a.safetensors", {"transformer": Net()})["transformer"]
    assert (file.rank, file.ranks["blocks.1"]) == (2, 3) and file.alphas == alphas
    lora.save_adapter({"transformer": net}, tmp_path / "b.safetensors")
    lora.load_adapter({"transformer": again}, tmp_path / "b.safetensors")
    x = mx.ones((2, 4))
    assert mx.array_equal(net(x), again(x)) and not mx.allclose(net(x), Net()(x))
    for name, layer in lora.layers(again).items():
        assert layer.scale == alphas[name] / layers[name][0].shape[0]


def test_parts_of_different_ranks_come_back_from_kohyas_form(tmp_path: Path) -> None:
    down = mx.concatenate([pair(2, 4, 1)[0], pair(3, 4, 1)[0]])
    up = mx.concatenate([mx.pad(pair(2, 1, 8)[1], [(0, 0), (0, 3)]), mx.pad(pair(3, 1, 6)[1], [(0, 0), (2, 0)])])
    (a, b), (c, d) = split(down, up, [8, 6], 2)
    assert (a.shape[0], c.shape[0]) == (2, 3)
    np.testing.assert_allclose(mx.concatenate([b @ a, d @ c]), up @ down, rtol=1e-5)


def test_numbers_that_are_no_adapter(tmp_path: Path) -> None:
    key = "transformer.out.lora_A.weight"
    for value, word in ((FILE[key].astype(mx.uint8), "uint8"), (FILE[key] * math.nan, "NaN")):
        with pytest.raises(WeightsError, match=rf"out\.lora_A\.weight .*{word}"):
            scales(FILE | {key: value}, {"lora_alpha": "4"}, tmp_path)


@pytest.mark.parametrize(("key", "word"), [("transformer.x.lora_a.weight", "keys are not known"), (None, "no tensors")])
def test_adapters_of_unknown_naming_and_empty_files(tmp_path, key, word):
    path = tmp_path / "a.safetensors"
    mx.save_safetensors(str(path), {key: mx.zeros((2, 2))} if key else {})
    with pytest.raises(WeightsError, match=word):
        check_kind(open_weights(path)[0], str(path))
