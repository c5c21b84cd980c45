"""Equal weights have equal hashes, other weights have others, at little cost."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae_train import fingerprint
from mflux_vae_train.fingerprint import weights_hash
from tests.mflux_vae_train.training.tiny_model import Net


def test_equal_weights_have_equal_hashes_in_any_dtype() -> None:
    one, other = Net(seed=1), Net(seed=1)
    halves = tree_map(lambda value: value.astype(mx.bfloat16), one.parameters())
    one.update(halves)
    other.update(tree_map(lambda value: value.astype(mx.float32), halves))
    assert weights_hash(one) == weights_hash(other)


@pytest.mark.parametrize("what", ["another training", "an adapter fused into one layer", "a shape", "a layer more"])
def test_other_weights_have_other_hashes(what: str) -> None:
    one, other = Net(seed=1), Net(seed=2 if what == "another training" else 1)
    if what == "an adapter fused into one layer":
        rows, columns = other.out.weight.shape
        other.out.weight = other.out.weight + 1e-3 * mx.outer(mx.arange(1.0, rows + 1), mx.ones((columns,)))
    elif what == "a shape":
        other.out.weight = other.out.weight.reshape(1, *other.out.weight.shape)
    elif what == "a layer more":
        other.more = nn.Linear(2, 2)
    assert weights_hash(one) != weights_hash(other)


def test_at_most_the_budget_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(seed=1)
    sizes = sorted(4 * value.size for _, value in tree_flatten(net.parameters()))
    monkeypatch.setattr(fingerprint, "MAX_HASHED_BYTES", sizes[-1])
    looked, own = [], np.array
    monkeypatch.setattr(fingerprint.np, "array", lambda values: looked.append(values.size) or own(values))
    weights_hash(net)
    assert 0 < len(looked) < len(sizes) and max(looked) <= fingerprint.SAMPLES_PER_TENSOR
