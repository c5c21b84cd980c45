"""One update: accumulation, averaging, clipping, and errors for losses that are not finite."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import TrainingError
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.prodigy import Prodigy
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.step import MicroBatch, Step, global_norm
from tests.mflux_vae_train.training.tiny_model import Net, batch, loss, window


def after(windows: list[list[MicroBatch]], **options: Any) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    net = Net()
    step = Step(net, AdamW(), loss, **options)
    metrics = [step(update, micro, 1e-2) for update, micro in enumerate(windows)]
    return {path: np.array(x) for path, x in tree_flatten(net.parameters())}, metrics


@pytest.mark.parametrize("cut", [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 1, 2], [3]]])
def test_accumulated_micro_batches_equal_one_batch(cut: list[list[int]]) -> None:
    whole, measured = after([[batch([0, 1, 2, 3], update)] for update in range(3)])
    parts, accumulated = after([[batch(samples, update) for samples in cut] for update in range(3)])
    for path in whole:
        np.testing.assert_allclose(parts[path], whole[path], rtol=1e-5, atol=1e-6)
    for one, other in zip(measured, accumulated, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_gradients_are_the_mean_over_the_window_clipped_by_global_norm() -> None:
    net = Net()
    samples = batch([0, 1, 2])
    gradient = nn.value_and_grad(net, lambda: loss(net, samples.arrays)[0])()[1]
    norm = global_norm(gradient).item()
    before = dict(tree_flatten(net.parameters()))
    step = Step(net, optim.SGD(learning_rate=0.0), loss, max_grad_norm=norm / 2)
    metrics = step(0, [batch([0, 1]), batch([2])], 0.5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["learning_rate"] == 0.5
    for path, slope in tree_flatten(gradient):
        moved = np.array(dict(tree_flatten(net.parameters()))[path])
        np.testing.assert_allclose(moved, np.array(before[path] - 0.5 * 0.5 * slope), rtol=1e-4, atol=1e-6)


def test_metrics_are_averaged_by_weight() -> None:
    def named(model: nn.Module, arrays: Any) -> tuple[mx.array, dict[str, mx.array]]:
        return loss(model, arrays)[0], {"first": arrays["x"][0, 0]}

    one, two = batch([0, 1]), batch([2])
    measured = Step(Net(), AdamW(), named)(0, [one, two], 1e-3)
    expected = (2 * one.arrays["x"][0, 0].item() + two.arrays["x"][0, 0].item()) / 3
    assert measured["first"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_changes_nothing(broken: float) -> None:
    net = Net()
    before = dict(tree_flatten(net.parameters()))
    bad = batch([2])
    bad = MicroBatch(arrays={**bad.arrays, "y": bad.arrays["y"] * broken}, weight=1)
    step = Step(net, AdamW(), loss)
    with pytest.raises(TrainingError, match="update 8"):
        step(7, [batch([0]), bad], 1e-2)
    for path, x in tree_flatten(net.parameters()):
        assert mx.array_equal(x, before[path])
    assert step.optimizer.state["step"].item() == 0


def test_weights_that_are_not_finite_are_named() -> None:
    net = Net()
    net.blocks[1].weight = net.blocks[1].weight * float("inf")
    with pytest.raises(TrainingError, match=r"blocks\.1\.weight"):
        Step(net, AdamW(), loss)(0, [batch([0])], 1e-2)


def test_frozen_parameters_stay_and_a_fully_frozen_model_is_refused() -> None:
    net = Net()
    net.freeze()
    with pytest.raises(TrainingError, match="train"):
        Step(net, AdamW(), loss)
    net.out.unfreeze()
    before = dict(tree_flatten(net.parameters()))
    Step(net, AdamW(), loss)(0, [batch([0])], 1e-2)
    changed = [path for path, x in tree_flatten(net.parameters()) if not mx.array_equal(x, before[path])]
    assert changed == ["out.weight"]


def test_the_model_is_usable_after_an_error_in_the_loss() -> None:
    def failing(model: nn.Module, arrays: Any) -> tuple[mx.array, dict[str, mx.array]]:
        loss(model, arrays)
        raise RuntimeError("in the middle")

    net = Net()
    step = Step(net, AdamW(), failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        step(0, [batch([0])], 1e-2)
    assert mx.isfinite(net(mx.ones((1, 4)))).all()


def test_no_global_random_state_is_used() -> None:
    mx.random.seed(1)
    one, _ = after([[batch([0, 1])]])
    mx.random.seed(2)
    other, _ = after([[batch([0, 1])]])
    for path in one:
        np.testing.assert_array_equal(one[path], other[path])


def test_compiled_equals_plain() -> None:
    def run(compile: bool) -> tuple[dict[str, Any], dict[str, float]]:
        net = nn.Linear(4, 3, bias=False)
        net.weight = mx.full((3, 4), 0.5)
        ema = EMA(net.trainable_parameters(), decay=0.5)
        step = Step(
            net, AdamW(), lambda model, arrays: (mx.square(model(arrays["x"])).mean(), {}), ema=ema, compile=compile
        )
        metrics = {}
        for update in range(3):
            arrays = [{"x": batch([i], update).arrays["x"]} for i in (0, 1)]
            metrics = step(update, [MicroBatch(arrays=each, weight=1) for each in arrays], 1e-2)
        state = [net.parameters(), step.optimizer.state, ema.state]
        return {path: np.array(x) for path, x in tree_flatten(state)}, metrics

    (plain, measured), (compiled, again) = run(False), run(True)
    assert plain.keys() == compiled.keys()
    for path in plain:
        np.testing.assert_allclose(compiled[path], plain[path], rtol=1e-5, atol=1e-7)
    assert measured == pytest.approx(again, rel=1e-5)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = Net(), nn.BatchNorm(3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.net(x))


@pytest.mark.parametrize("compile", [False, True])
def test_a_metric_may_equal_the_loss(compile: bool) -> None:
    def loss(model: Any, arrays: Any) -> tuple[mx.array, dict[str, mx.array]]:
        value = mx.square(model(arrays["x"])).mean()
        return value, {"only": value, "again": mx.square(model(arrays["x"])).mean()}

    net = nn.Linear(2, 2)
    step = Step(net, AdamW(), loss, compile=compile)
    told = step(0, [MicroBatch(arrays={"x": mx.ones((3, 2))}, weight=3)], 1e-3)
    assert told["only"] == told["again"] == pytest.approx(told["loss"], rel=1e-6)


@pytest.mark.parametrize("compile", [False, True])
def test_running_statistics_average_the_samples_of_an_update_and_skip_failed_ones(compile: bool) -> None:
    def normed(model: nn.Module, arrays: Any) -> tuple[mx.array, dict[str, mx.array]]:
        value = mx.square(model(arrays["x"]) - 1 + arrays["x"].sum()).mean()
        return value, {}

    model = Normed()
    model.net.blocks[0].freeze()
    step = Step(model, AdamW(), normed, buffers=True, compile=compile)
    micro = [batch([0, 1, 2]), batch([3, 4])]
    expected = 0.1 * mx.concatenate([model.net(part.arrays["x"]) for part in micro]).mean(axis=0)
    mx.eval(expected)
    step(0, micro, 1e-3)
    np.testing.assert_allclose(model.norm.running_mean, expected, rtol=1e-5, atol=1e-7)

    before = np.array(model.norm.running_mean)
    broken = MicroBatch(arrays={"x": mx.full(micro[0].arrays["x"].shape, mx.inf)}, weight=1)
    with pytest.raises(TrainingError, match="update 2"):
        step(1, [micro[0], broken], 1e-3)
    np.testing.assert_array_equal(model.norm.running_mean, before)


def test_an_optimizer_reports_the_rate_that_it_finds() -> None:
    step = Step(Net(), Prodigy(d0=1e-3), loss)
    told = [step(update, window(update), 0.5)["effective_rate"] for update in range(6)]
    assert told[-1] == pytest.approx(0.5 * step.optimizer.distance.item())
    assert told[0] >= 0.5e-3 and told == sorted(told) and told[-1] > told[0]
    assert "effective_rate" not in Step(Net(), AdamW(), loss)(0, window(0), 0.5)


def test_the_size_of_an_update_is_measured() -> None:
    net = Net()
    before = dict(tree_flatten(net.trainable_parameters()))
    size = Step(net, AdamW(), loss)(0, window(0), 1e-2)["update_size"]
    after = dict(tree_flatten(net.trainable_parameters()))
    change = sum(mx.square(after[name] - before[name]).sum().item() for name in before) ** 0.5
    norm = sum(mx.square(before[name]).sum().item() for name in before) ** 0.5
    assert size == pytest.approx(change / norm, rel=1e-5)


def test_the_size_of_an_update_is_measured_on_master_weights() -> None:
    """Changes below the resolution of half precision count, too."""
    sizes = {}
    for dtype in (mx.float32, mx.bfloat16):
        net = Net()
        net.set_dtype(dtype)
        before = dict(tree_flatten(tree_map(lambda x: x + 0, net.parameters())))
        sizes[dtype] = Step(net, AdamW(), loss)(0, window(0), 1e-6)["update_size"]
        changed = [path for path, now in tree_flatten(net.parameters()) if not mx.array_equal(now, before[path])]
        assert bool(changed) == (dtype == mx.float32)
    assert sizes[mx.bfloat16] == pytest.approx(sizes[mx.float32], rel=0.1) and sizes[mx.float32] > 1e-7


@pytest.mark.parametrize("optimizer", [AdamW, lambda: optim.SGD(learning_rate=0.0)], ids=["ours", "mlx"])
def test_gradients_of_half_precision_weights_are_summed_in_float32(optimizer: Any) -> None:
    """Of 64 micro-batches, each adds less than half a unit of the last place of the first one in bfloat16."""

    def linear(model: nn.Module, arrays: Any) -> tuple[mx.array, dict[str, mx.array]]:
        return (model.weight.astype(mx.float32) * arrays["slope"]).sum(), {}

    net = nn.Linear(2, 1, bias=False)
    net.set_dtype(mx.bfloat16)
    slopes = [256.0, *[0.5] * 63]
    batches = [MicroBatch(arrays={"slope": mx.full((1, 2), slope)}, weight=1) for slope in slopes]
    metrics = Step(net, optimizer(), linear, max_grad_norm=1e9)(0, batches, 1e-3)
    assert metrics["grad_norm"] == pytest.approx(2**0.5 * sum(slopes) / 64, rel=1e-6)
    assert net.weight.dtype == mx.bfloat16
