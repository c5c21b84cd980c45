"""Adapters in kohya's naming: equal weight changes, where one layer there is several here."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora
from tests.mflux_vae_train.lora.test_lora import adapted, with_dora
from tests.mflux_vae_train.training.tiny_model import Net

MODULES = {"lora_first": ["blocks.0", "blocks.1"], "lora_last": ["out"]}


def test_a_kohya_file_has_the_same_weight_changes_in_stacked_layers() -> None:
    net = Net()
    # two layers with equal inputs, such as queries and keys, which one original layer computes
    net.blocks = [nn.Linear(4, 8), nn.Linear(4, 6)]
    lora.add_lora(net, ["blocks.*", "out"], rank=2, alpha=6.0)
    net.update(tree_map(lambda x: x + mx.sin(mx.arange(x.size)).reshape(x.shape), net.trainable_parameters()))
    tensors = lora.kohya_tensors(net, MODULES)
    adapted = lora.layers(net)
    delta = {path: layer.scale * (layer.lora_a @ layer.lora_b).T for path, layer in adapted.items()}
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for name, members in MODULES.items():
        down, up, alpha = (tensors[f"{name}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert down.shape[0] == up.shape[1] == alpha.item() == 2 * len(members)
        whole = mx.concatenate([delta[path] for path in members])
        np.testing.assert_allclose(up @ down, whole, rtol=1e-5, atol=1e-5)


def test_rows_of_parts_without_an_adapter_are_zero() -> None:
    net = Net()
    net.blocks = [nn.Linear(4, 8), nn.Linear(4, 6)]
    lora.add_lora(net, ["blocks.1"], rank=2)
    net.update(tree_map(lambda x: x + 1.0, net.trainable_parameters()))
    tensors = lora.kohya_tensors(net, MODULES)
    assert set(tensors) == {f"lora_first.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    up = tensors["lora_first.lora_up.weight"]
    assert up.shape == (14, 2) and not mx.any(up[:8]) and mx.all(up[8:] != 0)


def file_of(tmp_path, tensors, metadata=None):
    write_safetensors(tmp_path / "kohya.safetensors", tensors, metadata or {})
    return tmp_path / "kohya.safetensors"


def fused_net() -> nn.Module:
    """Two layers that are one layer in the original network, and one layer that is one layer there, too."""
    net = Net()
    net.blocks = [nn.Linear(4, 8), nn.Linear(4, 6)]
    return net


@pytest.mark.parametrize("patterns", [["blocks.*", "out"], ["blocks.1", "out"], ["blocks.0"]])
def test_a_kohya_file_is_read_back(patterns, tmp_path) -> None:
    net = fused_net()
    lora.add_lora(net, patterns, rank=2, alpha=6.0)
    net.update(tree_map(lambda x: x + mx.sin(mx.arange(x.size) + 1).reshape(x.shape), net.trainable_parameters()))
    path = file_of(tmp_path, lora.kohya_tensors(net, MODULES), {"ss_network_dim": "2"})
    again = fused_net()
    found = lora.load_adapter({"transformer": again}, path, {"transformer": MODULES})
    was, now = lora.layers(net), lora.layers(again)
    assert found["transformer"] == sorted(now) and was.keys() <= now.keys()
    for name, layer in now.items():
        assert layer.lora_a.shape[1] == 2, "each part has its rank again"
        delta = layer.scale * (layer.lora_a @ layer.lora_b)
        expected = was[name].scale * (was[name].lora_a @ was[name].lora_b) if name in was else mx.zeros_like(delta)
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_layer_share_its_adapter(tmp_path) -> None:
    """As kohya's scripts train it, with an alpha that is not the rank."""
    down, up = mx.random.normal((3, 4), key=mx.random.key(0)), mx.random.normal((14, 3), key=mx.random.key(1))
    tensors = {"lora_first.lora_down.weight": down, "lora_first.lora_up.weight": up, "lora_first.alpha": mx.array(1.5)}
    net = fused_net()
    lora.load_adapter({"t": net}, file_of(tmp_path, tensors), {"t": MODULES})
    layers = lora.layers(net)
    found = mx.concatenate([layer.scale * (layer.lora_a @ layer.lora_b).T for layer in layers.values()])
    np.testing.assert_allclose(found, 0.5 * up @ down, rtol=1e-5, atol=1e-6)
    assert {layer.scale for layer in layers.values()} == {0.5}


DOWN, UP = "lora_first.lora_down.weight", "lora_first.lora_up.weight"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lora_nowhere.lora_down.weight": mx.ones((2, 4))}, "lora_nowhere"),
        ({"lora_first.dora_scale": mx.ones((14, 1))}, "dora_scale"),
        ({UP: None}, "lora_up"),
        ({UP: mx.ones((13, 2))}, "13 rows"),
        ({DOWN: mx.ones((2, 5))}, r"is \(2, 5\), expected \(2, 4\)"),
        ({DOWN: mx.ones((0, 4)), UP: mx.ones((14, 0))}, "shapes"),
        ({"lora_first.alpha": mx.ones(3)}, r"\.alpha is \(3,\)"),
        ({"lora_first.alpha": mx.array(float("nan"))}, "alpha"),
        ({"lora_first.alpha": mx.array(0.0)}, "alpha is 0"),
        ({"lora_first.alpha": mx.array(-1.0)}, "alpha is -1"),
    ],
)
def test_faults_of_a_kohya_file_are_named(changes, word, tmp_path) -> None:
    tensors = {
        DOWN: mx.ones((2, 4)),
        UP: mx.ones((14, 2)),
        "lora_last.lora_down.weight": mx.ones((2, 4)),
        "lora_last.lora_up.weight": mx.ones((3, 2)),
    }
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    with pytest.raises(WeightsError, match=word):
        lora.load_adapter({"t": fused_net()}, file_of(tmp_path, tensors), {"t": MODULES})


def test_adapters_that_the_format_cannot_store_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"blocks\.0, blocks\.1"):
        lora.kohya_tensors(adapted(), {"lora_last": ["out"]})
    with pytest.raises(SettingsError, match="use_dora"):
        lora.kohya_tensors(with_dora(), MODULES)
