"""Whether a run learns anything: otherwise hours would be spent on nothing."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import TrainingError
from mflux_vae_train import lora
from mflux_vae_train.training.hooks import Record

PATIENCE = 3
"""Updates in succession without any gradient that end a run; one alone may have seen a mask's black places."""


class Learning:
    """A hook that ends a run which learns nothing. (A loss or a gradient that is not finite ends it in the step.)

    Looked at is, after every update, whether there was a gradient, and after the first one of this process that had
    one whether it changed what trains.

    Args:
        networks: those that train.

    Raises (when called):
        TrainingError: nothing is learnt; it says what is probably the reason.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self._networks, self._first, self._without = networks, True, 0

    def __call__(self, record: Record) -> None:
        if record.metrics["grad_norm"] == 0:
            self._without += 1
            if self._without == PATIENCE or record.total == self._without:
                raise TrainingError(
                    f"the updates up to {record.update} changed nothing, all gradients are zero: the loss does not"
                    " reach what is trained (a guidance or prompt that the pipeline ignores, adapted layers that it"
                    " does not use, black masks)"
                )
            return
        self._without = 0
        if not self._first:
            return
        self._first = False
        if record.metrics["learning_rate"] > 0 and record.metrics["update_size"] == 0:
            raise TrainingError(
                "the first update changed nothing: its steps are smaller than what the weights' type can hold;"
                " raise --learning_rate, or train an adapter"
            )
        if any(lora.layers(network) and not _differs(network) for network in self._networks):
            raise TrainingError("the first update changed nothing: every adapter's B is still zero")


def check_adapter(networks: lora.Networks, path: Path) -> None:
    """Read a saved adapter back and compare it, bit for bit, with the one that was trained.

    No forward pass: what the file holds is what the last update left in the networks.

    Raises:
        TrainingError: the file holds other numbers, some that are not finite, or no more than the base model.
    """
    files = lora.read_adapter(path, networks)
    for prefix, network in networks.items():
        for name, trained in lora.adapter_tensors(network, prefix).items():
            saved = files[prefix].tensors.get(name.removeprefix(f"{prefix}."))
            if saved is None or not mx.array_equal(saved, trained, equal_nan=True):
                raise TrainingError(f"{path}: read back, {name} differs from what was trained; save it again")
            if not mx.all(mx.isfinite(trained)):
                raise TrainingError(f"{path}: {name} has numbers that are not finite; lower --learning_rate")
    if not any(map(_differs, networks.values())):
        raise TrainingError(f"{path}: read back, every adapter's B is zero: it is the base model")


def _differs(network: nn.Module) -> bool:
    """Whether an adapter does anything."""
    return any(bool(mx.any(layer.lora_b != 0)) for layer in lora.layers(network).values())
