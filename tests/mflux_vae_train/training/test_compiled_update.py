"""Compiled updates, those of a CPU and those of a GPU on a CPU, equal plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.checkpointing import state
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.adam8bit import AdamW8bit
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.optimizers.prodigy import Prodigy
from mflux_vae_train.training import step
from mflux_vae_train.training.ema import EMA
from tests.helpers import gpu_branch
from tests.mflux_vae_train.training.tiny_model import Net, batch, loss

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "prodigy": Prodigy,
    "grouped": lambda: Grouped([(AdamW(), 0.5, lambda path, _: path.startswith("blocks")), (AdamW(), 1.0, None)]),
}


class Run:
    def __init__(self, kind: str, dtype: mx.Dtype = mx.float32, compile: bool = True) -> None:
        self.net = Net()
        self.net.apply(lambda weights: weights.astype(dtype))
        optimizer, ema = OPTIMIZERS[kind](), EMA(self.net.trainable_parameters(), 0.9)
        self.step = step.Step(self.net, optimizer, loss, ema=ema, max_grad_norm=0.3, compile=compile)
        self.objects = {
            "network": state.parameters(self.net),
            "optimizer": state.tree_state(optimizer.state),
            "ema": state.tree_state(ema.state),
        }

    def updates(self, *numbers: int) -> dict[str, np.ndarray]:
        """Everything that a checkpoint keeps, after these."""
        for number in numbers:
            self.step(number, [batch([0, 1], number), batch([2], number)], 1e-2 / (1 + number))
        arrays, _ = state.flatten(self.objects)
        return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch() -> None:
        gpu_branch.force(monkeypatch)

    return switch


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("gpu", [False, True])
def test_the_compiled_update_equals_the_plain_one(
    gpu: bool, kind: str, dtype: mx.Dtype, as_on_a_gpu: Callable[[], None]
) -> None:
    plain = Run(kind, dtype, compile=False).updates(0, 1, 2)
    if gpu:
        as_on_a_gpu()
    compiled = Run(kind, dtype).updates(0, 1, 2)
    assert compiled.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_allclose(compiled[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("gpu", [False, True])
def test_the_compiled_update_resumes_bit_for_bit(gpu: bool, kind: str, as_on_a_gpu: Callable[[], None]) -> None:
    if gpu:
        as_on_a_gpu()
    whole = Run(kind)
    whole.updates(0, 1)
    arrays, values = state.flatten(whole.objects)
    arrays = {name: mx.array(array) for name, array in arrays.items()}
    mx.eval(arrays)
    again = Run(kind)
    again.updates(7)  # so that all of it is compiled, around other numbers
    state.restore(again.objects, arrays, values, where="here")
    expected, found = whole.updates(2, 3), again.updates(2, 3)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
