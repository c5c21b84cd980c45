"""Trained, resumed, averaged, fused and quantised weights lie in MLX's memory order, as those that are read back do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae.weights.formats.files import read_safetensors, write_safetensors
from mflux_vae.weights.keymaps.rules import load_strict
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.optimizers.adafactor import Adafactor
from mflux_vae_train.optimizers.adam import Adam, AdamW
from mflux_vae_train.optimizers.adam8bit import AdamW8bit
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.optimizers.lion import Lion
from mflux_vae_train.optimizers.muon import Muon
from mflux_vae_train.optimizers.prodigy import Prodigy
from mflux_vae_train.pipelines.quantization import quantize
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.step import Step
from tests.helpers.memory_order import views
from tests.mflux_vae_train.training.tiny_model import Net, loss, window

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": Adam,
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "prodigy": Prodigy,
    "muon": lambda: Grouped([(Muon(), 1.0, lambda _, weight: weight.ndim > 1), (AdamW(), 0.25, None)]),
}


def with_views(module: Any) -> Any:
    """The same module with its matrices transposed in memory, as a host may hold them."""
    module.update(tree_map(lambda x: mx.contiguous(x.T).T if x.ndim == 2 else x, module.parameters()))
    assert views(module.parameters())
    return module


class Run:
    """A network that is trained, and what a checkpoint of it holds."""

    def __init__(self, kind: str, net: Net) -> None:
        self.net, self.ema = net, EMA(net.trainable_parameters(), decay=0.9)
        self.step = Step(net, OPTIMIZERS[kind](), loss, ema=self.ema)
        self.objects = {
            "net": state.parameters(net),
            "optimizer": state.tree_state(self.step.optimizer.state),
            "ema": state.tree_state(self.ema.state),
        }

    def update(self, *updates: int) -> None:
        for update in updates:
            self.step(update, window(update), 1e-2)

    def arrays(self) -> dict[str, mx.array]:
        return state.flatten(self.objects)[0]


def assert_same_bits(one: Any, other: Any) -> None:
    one, other = dict(tree_flatten(one)), dict(tree_flatten(other))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("start", [lambda net: net, with_views], ids=["fresh", "views"])
def test_training_and_resuming(kind: str, start: Callable[[Net], Net], tmp_path: Path) -> None:
    reference, run, resumed = Run(kind, Net()), Run(kind, start(Net())), Run(kind, start(Net(seed=1)))
    reference.update(0, 1, 2, 3)
    run.update(0, 1)
    assert not views(run.arrays())
    saved = checkpoint.save(tmp_path, 2, run.objects)
    run.update(2, 3)
    checkpoint.load(saved, resumed.objects)
    assert not views(resumed.arrays())
    resumed.update(2, 3)
    for one in (run, resumed):
        assert not views(one.arrays())
        assert_same_bits(one.arrays(), reference.arrays())


def test_a_moving_average_that_takes_the_weights_place(tmp_path: Path) -> None:
    run = Run("muon", with_views(Net()))
    run.update(0, 1)
    x = mx.ones((3, 4))
    with run.ema.swapped_in(run.net):
        assert not views(run.net.parameters())
        write_safetensors(tmp_path / "average.safetensors", dict(tree_flatten(run.net.parameters())))
        expected = run.net(x)
    again = Net(seed=1)
    load_strict(again, read_safetensors(tmp_path / "average.safetensors")[0], where="average")
    np.testing.assert_array_equal(again(x), expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", [lambda net: net, with_views], ids=["fresh", "views"])
def test_fused_adapters(start: Callable[[Net], Net], dora: bool) -> None:
    net = start(Net())
    lora.add_lora(net, ["blocks.*", "out"], rank=2, dora=dora)
    net.update(tree_map(lambda x: x + 0.1, net.trainable_parameters()))
    lora.fuse(net)
    assert not views(net.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_read_back(dora: bool, tmp_path: Path) -> None:
    networks = [Net(), Net()]
    lora.add_lora(networks[0], ["blocks.*"], rank=2, dora=dora)
    networks[0].update(tree_map(lambda x: x + 0.1, networks[0].trainable_parameters()))
    lora.save_adapter({"net": networks[0]}, tmp_path / "adapter.safetensors")
    lora.load_adapter({"net": networks[1]}, tmp_path / "adapter.safetensors")
    assert not views(networks[1].parameters())
    x = mx.ones((3, 4))
    np.testing.assert_array_equal(networks[0](x), networks[1](x))


@pytest.mark.parametrize("adapted", [False, True])
def test_quantised_weights(adapted: bool) -> None:
    layers = [nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)) for _ in range(2)]
    layers[1].update(layers[0].parameters())
    with_views(layers[1])
    for one in layers:
        quantize(one, 4, lambda _: True)
        if adapted:
            lora.add_lora(one, ["layers.*"], rank=2)
        assert not views(one.parameters())
    assert_same_bits(*(one.parameters() for one in layers))
