"""Optimizers against torch's and prodigyopt's, schedules against diffusers'."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")

from mflux_vae_train.optimizers.adafactor import Adafactor  # noqa: E402
from mflux_vae_train.optimizers.adam import AdamW  # noqa: E402
from mflux_vae_train.optimizers.prodigy import Prodigy  # noqa: E402
from mflux_vae_train.training.lr_schedule import POLYNOMIAL, RESTARTS, SHAPES, learning_rate  # noqa: E402
from tests.mflux_vae_train.optimizers.test_optimizers import run, series  # noqa: E402


def theirs(make: Any, start: np.ndarray, gradients: list[np.ndarray], rates: list[float]) -> np.ndarray:
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = make([parameter])
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    return parameter.detach().numpy()


def test_adamw_equals_torchs() -> None:
    start, gradients, rates = series(5, 3)
    other = theirs(
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1), start, gradients, rates
    )
    np.testing.assert_allclose(run(AdamW(weight_decay=0.1), start, gradients, rates), other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("shape", [(5, 3), (7,)])
def test_adafactor_is_torchs_where_weights_are_below_its_threshold_of_relative_steps(shape: tuple[int, ...]) -> None:
    start, gradients, rates = series(*shape, length=12)
    start = start / 10
    other = theirs(
        # with a second epsilon of 1, larger than any weight, the size of the weights has no say
        lambda p: torch.optim.Adafactor(p, weight_decay=0.1, eps=(1e-30, 1.0)),
        start,
        gradients,
        rates,
    )
    np.testing.assert_allclose(run(Adafactor(weight_decay=0.1), start, gradients, rates), other, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decouple": False},
        {"use_bias_correction": True, "safeguard_warmup": True, "beta3": 0.9},
    ],
)
def test_prodigy_is_that_of_its_authors(options: dict[str, Any]) -> None:
    prodigyopt = pytest.importorskip("prodigyopt")
    draws = np.random.default_rng(0)
    goal, updates = draws.normal(size=(5, 3)).astype(np.float32), 100
    noise = draws.normal(scale=0.1, size=(updates, 5, 3)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.zeros(5, 3))
    theirs, ours = prodigyopt.Prodigy([parameter], lr=1.0, **options), Prodigy(**options)
    parameters = {"w": mx.zeros((5, 3))}
    for n in range(updates):
        theirs.param_groups[0]["lr"] = ours.learning_rate = min(1.0, (n + 1) / 10)
        parameter.grad = parameter.detach() - torch.tensor(goal - noise[n])
        theirs.step()
        parameters = ours.apply_gradients({"w": parameters["w"] - mx.array(goal - noise[n])}, parameters)
        mx.eval(parameters, ours.state)
    assert ours.distance.item() == pytest.approx(theirs.param_groups[0]["d"], rel=1e-3) and ours.distance > 0.1
    np.testing.assert_allclose(parameters["w"], parameter.detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, RESTARTS, POLYNOMIAL])
def test_shapes_are_those_of_diffusers(shape: str) -> None:
    """Its warm-up begins at zero, where ours has its first update: one longer and one later, the two are the same."""
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("diffusers.optimization")
    total, warmup, cycles, power = 60, 5, 3, 1.7
    ours = learning_rate(peak=1e-2, total=total, warmup=warmup, shape=shape, cycles=cycles, power=power)

    def theirs(warmup: int, total: int) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
        scheduler = optimization.get_scheduler(
            shape if shape != "constant" else "constant_with_warmup",  # the plain one ignores a warm-up
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            num_cycles=cycles,
            power=power,
        )
        return [scheduler.lr_lambdas[0](update) * 1e-2 for update in range(total + 1)]

    assert [ours(update) for update in range(warmup, total)] == pytest.approx(theirs(warmup, total)[warmup:total])
    assert [ours(update) for update in range(warmup)] == pytest.approx(theirs(warmup + 1, total + 1)[1 : warmup + 1])
