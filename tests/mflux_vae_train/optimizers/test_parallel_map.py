"""The parallel map equals `tree_map`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae_train.optimizers import parallel_map
from mflux_vae_train.optimizers.parallel_map import parallel_tree_map


def tree() -> dict[str, Any]:
    same = mx.arange(5.0)
    return {"a": [mx.arange(3.0), {"b": mx.ones((2, 2))}], "c": same, "d": same, "e": mx.zeros((0,))}


def equal(one: Any, other: Any) -> bool:
    pairs = zip(tree_flatten(one), tree_flatten(other), strict=True)
    return all(name == again and mx.array_equal(x, y) for (name, x), (again, y) in pairs)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("at_once", [1, 24, 1 << 20])
def test_results_equal_those_of_tree_map(at_once: int, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_map, "_CHUNK_BYTES", at_once)
    given, others = tree(), tree_map(lambda x: x + 1, tree())
    states: Any = tree_map(lambda _: {}, given)

    def product(x: mx.array, y: mx.array, state: dict[str, mx.array]) -> mx.array:
        state["seen"] = x - y
        return x * y

    expected = tree_map(lambda x, y: x * y, tree(), others)
    assert equal(parallel_tree_map(product, given, others, states, donate=donate), expected)
    assert all((seen == -1).all() for _, seen in tree_flatten(states))
    assert donate or equal(given, tree())
    assert parallel_tree_map(product, {}, {}, {}) == {}


def test_donated_arrays_give_their_memory() -> None:
    given = {name: mx.random.normal((1 << 20,)) for name in "abcdef"}
    mx.eval(given)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    parallel_tree_map(lambda x: x * 2, given, donate=True)
    assert mx.get_peak_memory() - before < 2 * 4 << 20


def test_it_can_be_traced() -> None:
    twice = mx.compile(lambda x: parallel_tree_map(lambda x: x * 2, {"x": x})["x"])
    assert twice(mx.ones(3)).tolist() == [2, 2, 2]
    assert mx.grad(lambda x: parallel_tree_map(mx.square, {"x": x})["x"].sum())(mx.ones(3)).tolist() == [2, 2, 2]
