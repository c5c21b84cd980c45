"""Large modules are loaded, changed, saved and resumed one layer at a time: peaks of memory of stacks of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from mflux_vae.runtime import device
from mflux_vae.weights.formats.files import convert_safetensors, read_safetensors
from mflux_vae.weights.keymaps.rules import load_strict
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.pipelines.quantization import QuantizedLinear, quantize
from mflux_vae_train.training.step import Step
from tests.helpers.peak_memory import peak_of

WIDTH, LAYERS = 512, 12
LAYER = 4 * WIDTH**2
"""Bytes of a layer in float32."""

ALL = LAYERS * LAYER
SLACK = 2 * LAYER


class Stack(nn.Module):
    """Linear layers without biases, in a list within a list."""

    def __init__(self) -> None:
        super().__init__()
        self.halves = [[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS // 2)] for _ in range(2)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in [*self.halves[0], *self.halves[1]]:
            x = layer(x)
        return x


def held(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def computed() -> Stack:
    stack = Stack()
    device.eval_each(stack.parameters())
    return stack


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[], Stack]:
    """Opens a stack whose weights lie in a file of half their size, unread."""
    file = tmp_path / "stack.safetensors"
    mx.save_safetensors(str(file), {name: a.astype(mx.bfloat16) for name, a in tree_flatten(Stack().parameters())})

    def opened() -> Stack:
        stack = Stack()
        load_strict(stack, read_safetensors(file)[0], where=str(file), dtype=mx.float32)
        return stack

    return opened


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stored_module_is_quantised_layer_by_layer(stored: Callable[[], Stack], bits: int) -> None:
    opened = []

    def quantised() -> dict:
        opened.append(stored())
        quantize(opened[0], bits, lambda path: True)
        return opened[0].parameters()

    peak = peak_of(quantised)
    assert all(type(layer) is QuantizedLinear for layer in opened[0].halves[1])
    assert peak < held(opened[0]) + SLACK < ALL


def test_quantising_frees_the_old_layers() -> None:
    stack = computed()
    before = mx.get_active_memory()
    peak = peak_of(lambda: quantize(stack, 4, lambda path: True) or [])
    assert peak < SLACK
    assert mx.get_active_memory() - before < held(stack) + LAYER - ALL


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_are_added_and_fused_layer_by_layer(dora: bool, bits: int | None) -> None:
    stack = computed()
    if bits:
        quantize(stack, bits, lambda path: True)
    weights = held(stack)
    peak = peak_of(lambda: lora.add_lora(stack, ["*"], rank=4, dora=dora) and [])
    adapters = held(stack) - weights
    assert peak < adapters + SLACK, "adding"
    peak = peak_of(lambda: lora.fuse(stack) or [])
    assert held(stack) == weights
    assert peak < 3 * SLACK <= ALL / 2, "fusing"


@pytest.mark.parametrize("dora", [False, True])
def test_quantised_weights_are_in_full_width_one_layer_at_a_time(dora: bool) -> None:
    stack = computed()
    quantize(stack, 4, lambda path: True)
    lora.add_lora(stack, ["*"], rank=4, dora=dora)
    slopes = nn.value_and_grad(stack, lambda model: mx.square(model(mx.ones((4, WIDTH)))).mean())
    peak = peak_of(lambda: slopes(stack))
    assert peak < 3 * SLACK <= ALL / 2


def test_weights_are_converted_one_by_one(stored: Callable[[], Stack]) -> None:
    def loss(model: nn.Module, arrays: dict) -> tuple[mx.array, dict]:
        return mx.square(model(arrays["x"])).mean(), {}

    opened = []

    def prepared() -> list:
        opened.append(stored())
        lora.add_lora(opened[0], ["*"], rank=1)
        Step(opened[0], optim.SGD(0.1), loss)
        return []

    assert peak_of(prepared) < ALL + SLACK


def test_weights_are_saved_in_another_precision_one_by_one(stored: Callable[[], Stack], tmp_path: Path) -> None:
    file, expected = tmp_path / "halves.safetensors", dict(tree_flatten(stored().parameters()))

    def saved() -> list:
        convert_safetensors(file, dict(tree_flatten(stored().parameters())), mx.float16)
        return []

    assert peak_of(saved) < 2 * SLACK < ALL
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], np.array(array.astype(mx.float16)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_what_is_saved_in_another_precision_is_what_mlx_saves(tmp_path: Path, dtype: mx.Dtype) -> None:
    tensors = {
        "b": mx.random.normal((3, 5)).T,
        "a": mx.array(1.5, mx.bfloat16),
        "packed": mx.array([7, 2**31], mx.uint32),
        "c": mx.random.normal((7,)).astype(mx.float16),
    }
    wanted = {name: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for name, a in tensors.items()}
    convert_safetensors(tmp_path / "x.safetensors", dict(tensors), dtype)
    found, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"} and found.keys() == wanted.keys()
    assert all(found[name].dtype == a.dtype and mx.array_equal(found[name], a) for name, a in wanted.items())
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_checkpoints_are_saved_without_a_copy_and_replace_what_was_there(tmp_path: Path) -> None:
    stack = computed()
    objects = {"network": state.parameters(stack)}
    assert peak_of(lambda: checkpoint.save(tmp_path, 1, objects) and []) < SLACK
    wanted = {name: mx.array(array) for name, array in tree_flatten(stack.parameters())}
    mx.eval(wanted)
    stack.update(computed().parameters())
    assert peak_of(lambda: checkpoint.load(tmp_path / "checkpoint-1", objects) and []) < SLACK
    found = dict(tree_flatten(stack.parameters()))
    assert all(mx.array_equal(found[name], array) for name, array in wanted.items())
