"""Each optimizer against its published formula, and properties of all of them."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.checkpointing import state
from mflux_vae_train.optimizers.adafactor import Adafactor
from mflux_vae_train.optimizers.adam import Adam, AdamW
from mflux_vae_train.optimizers.adam8bit import AdamW8bit
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.optimizers.lion import Lion
from mflux_vae_train.optimizers.muon import Muon, orthogonalize
from mflux_vae_train.optimizers.prodigy import Prodigy
from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.training.step import Step
from tests.mflux_vae_train.training.tiny_model import Net, loss, window


def run(optimizer: Any, start: np.ndarray, gradients: list[np.ndarray], rates: list[float]) -> np.ndarray:
    parameters: dict[str, Any] = {"w": mx.array(start, mx.float32)}
    optimizer.init(parameters)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.learning_rate = rate
        parameters = optimizer.apply_gradients({"w": mx.array(gradient, mx.float32)}, parameters)
    return np.array(parameters["w"])


def series(*shape: int, length: int = 6) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    draw = rng(1, Stream.EVALUATION)
    gradients = [draw.normal(size=shape) * 10.0**-i for i in range(length)]
    return draw.normal(size=shape), gradients, [1e-2 / (i + 1) for i in range(length)]


def test_adamw_equals_the_formula() -> None:
    start, gradients, rates = series(5, 3)
    w, m, v = start.copy(), 0.0, 0.0
    for n, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - rate * 0.1)
        w = w - rate * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
    ours = run(AdamW(weight_decay=0.1), start, gradients, rates)
    np.testing.assert_allclose(ours, w, rtol=2e-6, atol=2e-7)


def test_adam_decays_through_the_gradient() -> None:
    start, gradients, rates = series(5, 3, length=1)  # at the first update the step is the gradient's sign
    ours = run(Adam(weight_decay=0.1), start, gradients, rates)
    np.testing.assert_allclose(ours, start - rates[0] * np.sign(gradients[0] + 0.1 * start), rtol=1e-5, atol=1e-6)


def test_adamw_keeps_float32_moments_for_half_precision_parameters() -> None:
    parameters = {"w": mx.zeros((3,), mx.float16)}
    optimizer = AdamW(learning_rate=1e-2)
    optimizer.init(parameters)
    new = optimizer.apply_gradients({"w": mx.full((3,), 1e-4, mx.float16)}, parameters)
    assert new["w"].dtype == mx.float16
    assert optimizer.state["w"]["v"].dtype == mx.float32
    np.testing.assert_allclose(np.array(new["w"]), -1e-2, rtol=1e-2)


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_directions(
    shape: tuple[int, int],
) -> None:
    matrix = rng(0, Stream.EVALUATION, *shape).normal(size=shape)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    matrix = (u * np.linspace(0.2, 3.0, len(s))) @ vt
    out = np.array(orthogonalize(mx.array(matrix, mx.float32)))
    inner = u.T @ out @ vt.T
    assert np.all((np.diag(inner) > 0.6) & (np.diag(inner) < 1.3))
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-4)


def test_muon_flattens_convolutions_and_decays_decoupled() -> None:
    start, gradients, rates = series(16, 2, 2, 1, length=1)  # 16 rows, 4 columns: factor 2
    ours = run(Muon(weight_decay=0.1), start, gradients, rates)
    flat = np.array(orthogonalize(mx.array(gradients[0].reshape(16, 4), mx.float32))).reshape(start.shape)
    np.testing.assert_allclose(ours, start * (1 - rates[0] * 0.1) - rates[0] * 2 * flat, rtol=1e-4, atol=1e-6)


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="AdamW"):
        run(Muon(), np.zeros(3), [np.ones(3)], [1e-2])


def test_groups_split_the_parameters_and_all_learn() -> None:
    net = Net()
    optimizer = Grouped(
        [
            (Muon(), 1.0, lambda path, weight: weight.ndim >= 2 and not path.startswith("out.")),
            (AdamW(), 1.0, None),
        ]
    )
    step = Step(net, optimizer, loss)
    muons, adamws = ({path for path, _ in tree_flatten(state)} for state in optimizer.state["states"])
    assert {"blocks.0.weight.v", "blocks.1.weight.v"} <= muons
    assert {"blocks.0.bias.m", "blocks.1.bias.m", "out.weight.m"} <= adamws
    before = dict(tree_flatten(net.parameters()))
    losses = [step(update, window(0), 5e-3)["loss"] for update in range(30)]
    after = dict(tree_flatten(net.parameters()))
    assert all(not mx.array_equal(before[path], after[path]) for path in before)
    assert losses[-1] < 0.8 * losses[0]


def test_the_rate_of_a_group_is_a_factor_on_the_schedule() -> None:
    optimizer = Grouped([(Muon(), 0.5, lambda _, weight: weight.ndim >= 2), (AdamW(), 2.0, None)])
    optimizer.learning_rate = 0.2
    assert [one.learning_rate.item() for one in optimizer.optimizers] == pytest.approx([0.1, 0.4])
    assert optimizer.learning_rate.item() == pytest.approx(0.2)


def test_lion_moves_by_the_sign_of_its_momentum() -> None:
    start, gradients, rates = series(5, 3)
    w, m = start.copy(), np.zeros_like(start)
    for g, rate in zip(gradients, rates, strict=True):
        w = w - rate * (np.sign(0.9 * m + 0.1 * g) + 0.1 * w)
        m = 0.99 * m + 0.01 * g
    np.testing.assert_allclose(run(Lion(weight_decay=0.1), start, gradients, rates), w, rtol=2e-6, atol=2e-7)


def test_adafactor_keeps_row_and_column_means_of_the_squares() -> None:
    start, gradients, rates = series(4, 2, 3, 5)
    w, rows, columns = start.reshape(4, 30), 0.0, 0.0
    for n, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g, share = g.reshape(4, 30), n**-0.8
        rows = (1 - share) * rows + share * np.mean(g**2, axis=1, keepdims=True)
        columns = (1 - share) * columns + share * np.mean(g**2, axis=0, keepdims=True)
        direction = g / np.sqrt(rows * columns / rows.mean())
        w = w - rate * direction / max(1.0, np.sqrt(np.mean(direction**2)))
    optimizer = Adafactor()
    np.testing.assert_allclose(run(optimizer, start, gradients, rates).reshape(4, 30), w, rtol=1e-5, atol=1e-6)
    assert optimizer.state_bytes(mx.zeros((4, 2, 3, 5))) == 4 * (4 + 30)


def test_adafactor_does_not_move_weights_without_a_gradient() -> None:
    start = np.ones((3, 4))
    gradient = np.zeros((3, 4))
    gradient[0] = 1e-9  # moves at the full rate, however small
    moved = run(Adafactor(), start, [gradient], [1e-2]) - start
    assert np.array_equal(moved[1:], np.zeros((2, 4)))
    np.testing.assert_allclose(moved[0], -1e-2, rtol=0.1)


EVERY = {
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adafactor": Adafactor,
    "lion": Lion,
    "muon": Muon,
    "prodigy": Prodigy,
}


@pytest.mark.parametrize("name", EVERY)
def test_small_updates_of_half_precision_weights_are_not_lost(name: str) -> None:
    """Each is less than half of bfloat16's spacing below 1, 0.004; without master weights none would have an effect."""
    shape = (64, 80)
    gradient = mx.array(np.random.default_rng(0).normal(size=shape) + 1.0).astype(mx.bfloat16)
    options = {"d0": 1e-4} if name == "prodigy" else {}
    optimizers = EVERY[name](**options), EVERY[name](**options)
    exact, half = ({"w": mx.ones(shape, dtype)} for dtype in (mx.float32, mx.bfloat16))
    for optimizer, parameters in zip(optimizers, (exact, half), strict=True):
        optimizer.init(parameters)
        for _ in range(20):
            optimizer.learning_rate = 1.0 if name == "prodigy" else 1e-3
            before = parameters["w"].astype(mx.float32)
            parameters |= optimizer.apply_gradients({"w": gradient.astype(parameters["w"].dtype)}, parameters)
            mx.eval(parameters, optimizer.state)
            if parameters is exact and name != "prodigy":  # whose steps grow
                assert float(mx.median(mx.abs(exact["w"] - before))) < 0.5 * 2**-8
    kept = optimizers[1].state["w"]["master"]
    assert kept.dtype == mx.float32 and mx.array_equal(half["w"], kept.astype(mx.bfloat16))
    np.testing.assert_allclose(kept, exact["w"], rtol=1e-5, atol=1e-6)
    assert float(mx.abs(half["w"].astype(mx.float32) - 1).mean()) > 0.0005
    assert "master" not in optimizers[0].state["w"], "float32 weights need no copy"


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"muon"}))
def test_each_trains_with_accumulation_and_resumes_bit_for_bit(name: str) -> None:
    rate = {"prodigy": 1.0, "lion": 1e-3}.get(name, 1e-2)

    def fresh() -> tuple[Net, Step, dict[str, state.Stateful]]:
        net = Net()
        net.blocks[0].freeze()
        optimizer = EVERY[name]()
        step = Step(net, optimizer, loss)
        return net, step, {"net": state.parameters(net), "optimizer": state.tree_state(optimizer.state)}

    net, step, objects = fresh()
    assert not any("blocks.0" in path for path, _ in tree_flatten(step.optimizer.state)), "state for frozen parameters"
    losses = [step(update, window(0), rate)["loss"] for update in range(30)]
    assert losses[-1] < 0.9 * losses[0]
    arrays, values = (copy.copy(one) for one in state.flatten(objects))
    for update in range(30, 36):
        step(update, window(update), rate)
    other, again, others = fresh()
    state.restore(others, arrays, values, where="memory")
    for update in range(30, 36):
        again(update, window(update), rate)
    for (path, one), (_, two) in zip(tree_flatten(net.parameters()), tree_flatten(other.parameters()), strict=True):
        assert mx.array_equal(one, two), path


@pytest.mark.parametrize("name", EVERY)
def test_state_bytes_is_the_size_of_the_state(name: str) -> None:
    for parameter in (mx.zeros((70, 100)), mx.zeros((70, 100), mx.bfloat16)):
        optimizer = EVERY[name]()
        optimizer.init({"w": parameter})
        kept = sum(array.nbytes for array in dict(tree_flatten(optimizer.state["w"])).values())
        assert optimizer.state_bytes(parameter) == kept
        master = 4 if parameter.dtype == mx.bfloat16 else 0
        per_weight = {"adamw": 8, "adamw8bit": 2.03, "adafactor": 0.1, "lion": 4, "muon": 4, "prodigy": 16}[name]
        assert kept / parameter.size == pytest.approx(per_weight + master, rel=0.03)
