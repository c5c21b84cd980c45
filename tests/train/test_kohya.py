"""Adapters in kohya's naming: the same deltas, where layers here are parts of one there."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mflux_vae.errors import SettingsError
from mflux_vae_train import lora
from tests.train.test_lora import adapted, with_dora
from tests.train.tiny import Net

MODULES = {"lora_first": ["blocks.0", "blocks.1"], "lora_last": ["out"]}


def test_kohyas_names_hold_the_same_deltas_side_by_side() -> None:
    net = Net()
    # two layers of equal inputs, as queries and keys have them, of which one original layer made both
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


def test_kohyas_names_leave_rows_of_layers_without_adapter_at_zero() -> None:
    net = Net()
    net.blocks = [nn.Linear(4, 8), nn.Linear(4, 6)]
    lora.add_lora(net, ["blocks.1"], rank=2)
    net.update(tree_map(lambda x: x + 1.0, net.trainable_parameters()))
    tensors = lora.kohya_tensors(net, MODULES)
    assert set(tensors) == {f"lora_first.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    up = tensors["lora_first.lora_up.weight"]
    assert up.shape == (14, 2) and not mx.any(up[:8]) and mx.all(up[8:] != 0)


def test_what_kohyas_names_cannot_say_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"no names for blocks\.0, blocks\.1"):
        lora.kohya_tensors(adapted(), {"lora_last": ["out"]})
    with pytest.raises(SettingsError, match="use_dora"):
        lora.kohya_tensors(with_dora(), MODULES)
