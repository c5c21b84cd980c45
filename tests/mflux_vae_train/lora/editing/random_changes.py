"""Adapters of random numbers for a network with convolutions."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mflux_vae_train import lora
from mflux_vae_train.lora.editing.adapter import AdapterFile, Changes, open_adapter
from mflux_vae_train.lora.editing.model import Model
from mflux_vae_train.lora.editing.writing import write_adapter
from mflux_vae_train.lora.layers import LayerChange
from tests.mflux_vae_train.lora.test_conv import KOHYA, Net

SHAPES = {"down": (6, 4, (3, 3)), "block.1": (5, 6, (1, 1)), "out": (3, 5, None)}
"""Outputs, inputs and kernel of the layers of `Net`."""

MODEL = Model(name="net", networks={"unet": Net()}, names={"unet": KOHYA}, kohya={"unet": KOHYA}, metadata={})


def change(layer: str, rank: int, *, scale: float = 1.0, seed: int = 0, dora: bool = False) -> LayerChange:
    outputs, inputs, kernel = SHAPES[layer]
    inputs *= kernel[0] * kernel[1] if kernel else 1
    draw = np.random.default_rng([seed, rank, outputs])
    a, b, m = (draw.standard_normal(shape, np.float32) for shape in ((rank, inputs), (outputs, rank), (outputs,)))
    return LayerChange(
        a=mx.array(a), b=mx.array(b), scale=scale, kernel=kernel, magnitudes=mx.array(m) if dora else None
    )


def saved(path: Path, changes: Changes, **options: object) -> AdapterFile:
    write_adapter(path, changes, **{"naming": "peft", "model": MODEL, **options})  # type: ignore[arg-type]
    return open_adapter(path, MODEL)


def deltas(changes: Changes) -> dict[str, np.ndarray]:
    """Scale B A of every layer, by path."""
    return {
        path: np.array(one.scale * (one.b.astype(mx.float32) @ one.a.astype(mx.float32)))
        for of_network in changes.values()
        for path, one in of_network.items()
    }


def assert_equal(found: Changes, expected: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    of_each = deltas(found)
    assert of_each.keys() == expected.keys()
    for path, delta in of_each.items():
        assert np.abs(delta - expected[path]).max() <= tolerance * np.abs(expected[path]).max(), path


def loaded(path: Path) -> Net:
    """`Net` with a file's adapter."""
    mx.random.seed(0)
    net = Net()
    lora.load_adapter({"unet": net}, path, {"unet": KOHYA})
    return net
