"""AdamW against the published formula, Muon's properties, and both together."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.optimizers import Adam, AdamW, Grouped, Muon, orthogonalize
from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.step import Step
from tests.train.tiny import Net, loss, window


def run(optimizer: AdamW | Muon, start: np.ndarray, gradients: list[np.ndarray], rates: list[float]) -> np.ndarray:
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


def test_adamw_is_the_bias_corrected_decoupled_formula() -> None:
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


@pytest.mark.parity
def test_adamw_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    start, gradients, rates = series(5, 3)
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    theirs = torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for gradient, rate in zip(gradients, rates, strict=True):
        theirs.param_groups[0]["lr"] = rate
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        theirs.step()
    ours = run(AdamW(weight_decay=0.1), start, gradients, rates)
    np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=2e-6, atol=2e-7)


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
    with pytest.raises(ValueError, match="AdamW's"):
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


def test_a_group_s_rate_is_its_share_of_the_schedule() -> None:
    optimizer = Grouped([(Muon(), 0.5, lambda _, weight: weight.ndim >= 2), (AdamW(), 2.0, None)])
    optimizer.learning_rate = 0.2
    assert [one.learning_rate.item() for one in optimizer.optimizers] == pytest.approx([0.1, 0.4])
    assert optimizer.learning_rate.item() == pytest.approx(0.2)
