"""Adapters: which layers are adapted, that they start as the base model, that files are complete."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.randomness import Stream, sample_keys
from tests.mflux_vae_train.training.tiny_model import Net

X = mx.array(np.linspace(-1, 1, 12).reshape(3, 4), mx.float32)


def adapted(*, trained: bool = True, dropout: float = 0.0, alpha: float | None = 4.0, seed: int = 0) -> Net:
    net = Net()
    lora.add_lora(net, ["blocks.*"], rank=2, alpha=alpha, dropout=dropout, seed=seed)
    if trained:
        net.update(tree_map(lambda x: x + 0.1, net.trainable_parameters()))
    return net


def test_matching_layers_are_adapted_and_nothing_else_is_trainable() -> None:
    net = Net()
    assert lora.add_lora(net, ["blocks.*"], rank=2) == ["blocks.0", "blocks.1"]
    paths = sorted(path for path, _ in tree_flatten(net.trainable_parameters()))
    assert paths == [f"blocks.{i}.lora_{x}" for i in (0, 1) for x in "ab"]
    with pytest.raises(ValueError, match="already"):
        lora.add_lora(net, ["out"], rank=2)


def test_an_error_without_a_match_names_layers() -> None:
    with pytest.raises(SettingsError, match=r"to_q.*blocks\.0"):
        lora.add_lora(Net(), ["*.to_q"], rank=2)


def test_untrained_and_disabled_adapters_equal_the_base() -> None:
    base = Net()(X)
    assert mx.array_equal(adapted(trained=False)(X), base)
    net = adapted()
    with_adapter = net(X)
    assert not mx.allclose(with_adapter, base)
    with lora.disabled(net):
        assert mx.array_equal(net(X), base)
    assert mx.array_equal(net(X), with_adapter)


def test_initial_weights_are_a_function_of_seed_and_path() -> None:
    one, same, other = (lora.layers(adapted(seed=seed)) for seed in (1, 1, 2))
    assert mx.array_equal(one["blocks.0"].lora_a, same["blocks.0"].lora_a)
    assert not mx.array_equal(one["blocks.0"].lora_a, other["blocks.0"].lora_a)
    fewer = Net()
    lora.add_lora(fewer, ["blocks.1"], rank=2, seed=1)
    alone = lora.layers(fewer)["blocks.1"].lora_a
    assert mx.array_equal(alone + 0.1, one["blocks.1"].lora_a)


def test_fused_equals_adapted() -> None:
    net = adapted()
    expected = net(X)
    lora.fuse(net)
    assert not lora.layers(net)
    assert mx.allclose(net(X), expected, rtol=1e-5, atol=1e-6)


def test_dropout_of_a_sample_depends_only_on_its_key() -> None:
    net = adapted(dropout=0.5)
    keys = sample_keys(0, Stream.LORA_DROPOUT, 0, [0, 1, 2])
    whole = net(X)
    with lora.dropout_keys(net, keys):
        together = net(X)
        again = net(X)
    rows = []
    for i in range(3):
        with lora.dropout_keys(net, keys[i : i + 1]):
            rows.append(net(X[i : i + 1]))
    assert mx.array_equal(together, again)
    assert mx.allclose(together, mx.concatenate(rows), rtol=1e-6, atol=1e-6)
    assert not mx.allclose(together, whole)
    assert mx.array_equal(net(X), whole)  # off outside the block


def test_dropout_keeps_the_mean() -> None:
    drop = lora.layers(adapted(dropout=0.25))["blocks.0"].dropout
    drop._keys.rows = sample_keys(0, Stream.LORA_DROPOUT, 0, range(64))
    out = drop(mx.ones((64, 100)))
    assert set(np.unique(np.array(out)).round(4)) == {0.0, np.float32(4 / 3).round(4)}
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_file_round_trip_keeps_weights_and_alpha(tmp_path: Path) -> None:
    net = adapted(alpha=4.0)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora.save_adapter({"transformer": net}, path)
    tensors, metadata = read_safetensors(path)
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "transformer.blocks.0.lora_A.weight": (2, 4),
        "transformer.blocks.0.lora_B.weight": (8, 2),
        "transformer.blocks.1.lora_A.weight": (2, 8),
        "transformer.blocks.1.lora_B.weight": (4, 2),
    }
    config = json.loads(metadata[lora.METADATA_KEY])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (2, 4.0)
    assert config["transformer.target_modules"] == ["blocks.0", "blocks.1"]
    for fresh in (Net(), adapted(alpha=1.0, seed=9)):
        assert lora.load_adapter({"transformer": fresh}, path) == {"transformer": ["blocks.0", "blocks.1"]}
        assert mx.array_equal(fresh(X), net(X))


def test_without_metadata_alpha_is_the_rank(tmp_path: Path) -> None:
    net = adapted(alpha=None)
    write_safetensors(tmp_path / "a.safetensors", lora.adapter_tensors(net, "unet"), {})
    fresh = Net()
    lora.load_adapter({"unet": fresh}, tmp_path / "a.safetensors")
    assert mx.array_equal(fresh(X), net(X))


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(tmp_path: Path) -> None:
    net, path = adapted(alpha=4.0), tmp_path / "a.safetensors"
    config = {"transformer.lora_alpha": 4, "transformer.use_rslora": True}
    write_safetensors(path, lora.adapter_tensors(net, "transformer"), {lora.METADATA_KEY: json.dumps(config)})
    other = Net()
    lora.load_adapter({"transformer": other}, path)
    for layer in lora.layers(other).values():
        assert layer.scale == pytest.approx(4 / math.sqrt(2))


def test_a_file_that_does_not_fit_is_refused_with_all_faults(tmp_path: Path) -> None:
    net = adapted()
    tensors = lora.adapter_tensors(net, "transformer")
    del tensors["transformer.blocks.0.lora_B.weight"]
    tensors["transformer.nowhere.lora_A.weight"] = mx.zeros((2, 4))
    tensors["transformer.blocks.1.lora_A.weight"] = mx.zeros((2, 5))
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors, lora.adapter_metadata({"transformer": net}))
    fresh = Net()
    with pytest.raises(WeightsError) as caught:
        lora.load_adapter({"transformer": fresh}, path)
    for fault in (
        "missing transformer.blocks.0.lora_B.weight",
        "unknown transformer.nowhere.lora_A.weight",
        "transformer.blocks.1.lora_A.weight is (2, 5), expected (2, 8)",
    ):
        assert fault in str(caught.value)
    assert not lora.layers(fresh)


def test_a_file_for_another_network_or_with_broken_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lora.save_adapter({"unet": adapted()}, path)
    with pytest.raises(WeightsError, match="transformer"):
        lora.load_adapter({"transformer": Net()}, path)
    write_safetensors(path, lora.adapter_tensors(adapted(), "unet"), {lora.METADATA_KEY: "{"})
    with pytest.raises(WeightsError, match="lora_adapter_metadata"):
        lora.load_adapter({"unet": Net()}, path)


def with_dora(*, trained: bool = True) -> Net:
    net = Net()
    lora.add_lora(net, ["blocks.*"], rank=2, alpha=4.0, dora=True)
    if trained:
        net.update(tree_map(lambda x: x + 0.1, net.trainable_parameters()))
    return net


def test_dora_scales_every_row_to_its_magnitude(tmp_path: Path) -> None:
    assert mx.allclose(with_dora(trained=False)(X), Net()(X), rtol=1e-5, atol=1e-6)
    net = with_dora()
    assert {path.rpartition(".")[2] for path, _ in tree_flatten(net.trainable_parameters())} == {
        "lora_a",
        "lora_b",
        "m",
    }
    expected = net(X)
    lora.save_adapter({"transformer": net}, tmp_path / "a.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert tensors["transformer.blocks.0.lora_magnitude_vector"].shape == (8,)
    assert json.loads(metadata[lora.METADATA_KEY])["transformer.use_dora"] is True
    for fresh in (Net(), with_dora(trained=False)):
        lora.load_adapter({"transformer": fresh}, tmp_path / "a.safetensors")
        assert mx.array_equal(fresh(X), expected)
    with pytest.raises(WeightsError, match=r"unknown transformer\.blocks\.0\.lora_magnitude_vector"):
        lora.load_adapter({"transformer": adapted()}, tmp_path / "a.safetensors")
    magnitudes = [layer.m for layer in lora.layers(net).values()]
    lora.fuse(net)
    assert mx.allclose(net(X), expected, rtol=1e-4, atol=1e-5)
    for block, m in zip(net.blocks, magnitudes, strict=True):
        assert mx.allclose(mx.linalg.norm(block.weight, axis=1), m, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_quantized_layer_is_adapted_and_unchanged(bits: int, dora: bool, tmp_path: Path) -> None:
    def net() -> nn.Module:
        module = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
        module.update(tree_map(lambda x: mx.sin(mx.arange(x.size).reshape(x.shape) * 0.7), module.parameters()))
        nn.quantize(module, group_size=32, bits=bits)
        return module

    x = mx.cos(mx.arange(3 * 64).reshape(3, 64) * 0.3)
    module = net()
    base = module(x)
    lora.add_lora(module, ["layers.*"], rank=4, dora=dora)
    assert mx.allclose(module(x), base, rtol=1e-4, atol=1e-4)
    assert all(a.dtype == mx.float32 for _, a in tree_flatten(module.trainable_parameters()))
    optimizer = AdamW(learning_rate=1e-2)
    for _ in range(3):
        gradients = nn.value_and_grad(module, lambda m: mx.square(m(x) - 1).mean())(module)[1]
        optimizer.update(module, gradients)
    assert mx.square(module(x) - 1).mean() < mx.square(base - 1).mean()
    with lora.disabled(module):
        assert mx.array_equal(module(x), base)
    lora.save_adapter({"t": module}, tmp_path / "a.safetensors")
    again = net()
    lora.load_adapter({"t": again}, tmp_path / "a.safetensors")
    assert mx.array_equal(again(x), module(x))


@pytest.mark.parametrize("bias", [False, True])
def test_dora_over_quantised_weights_computes_what_mlx_lm_does(bias: bool) -> None:
    from mlx_lm.tuner import dora

    module = nn.Sequential(nn.QuantizedLinear.from_linear(nn.Linear(64, 32, bias=bias), 32, 8))
    lora.add_lora(module, ["*"], rank=4, alpha=8.0, dora=True)
    (layer,) = module.layers
    layer.lora_b, layer.m = mx.random.normal((4, 32), key=mx.random.key(1)), layer.m * 1.5
    x = mx.random.normal((3, 64), key=mx.random.key(2))

    def results(call: Callable[[mx.array], mx.array]) -> list[mx.array]:
        def loss(parameters: dict, x: mx.array) -> mx.array:
            layer.update(parameters)
            return mx.square(call(x) - 1).sum()

        trained = layer.trainable_parameters()
        slopes = mx.grad(loss, argnums=(0, 1))(trained, x)
        layer.update(trained)
        return [call(x), *(array for _, array in tree_flatten(list(slopes)))]

    expected = results(lambda x: dora.DoRALinear.__call__(layer, x))
    for one, other in zip(results(layer), expected, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_fused_weight_keeps_its_dtype() -> None:
    for dora in (False, True):
        net = Net()
        net.set_dtype(mx.bfloat16)
        lora.add_lora(net, ["blocks.*"], rank=2, dora=dora)
        lora.fuse(net)
        assert {array.dtype for _, array in tree_flatten(net.parameters())} == {mx.bfloat16}


def test_layers_are_named_as_in_peft_by_pattern_or_by_preset() -> None:
    paths = ["a.attn.to_q", "a.attn.to_k", "b.to_qk", "to_q"]

    def chosen(choice: str) -> list[str]:
        patterns = lora.patterns_of(choice, {"attention": ["*.attn.*"]})
        return [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]

    assert chosen("to_q") == ["a.attn.to_q", "to_q"]
    assert chosen("attn.to_q, to_qk") == ["a.attn.to_q", "b.to_qk"]
    assert chosen("*.to_q*") == ["a.attn.to_q", "b.to_qk"]
    assert chosen("attention") == ["a.attn.to_q", "a.attn.to_k"]
    assert chosen("all") == paths
    with pytest.raises(SettingsError, match="lora_layers"):
        lora.patterns_of(" , ", {"attention": []})
