"""Whether a run learns anything: otherwise hours would be spent on nothing."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import TrainingError
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.trained import as_one
from mflux_vae_train.hooks import Record
from mflux_vae_train.step import Arrays, Loss

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


def check_adapter(networks: lora.Networks, path: Path, loss: Loss, arrays: Arrays) -> float:
    """Reads a saved adapter back into the networks that it was trained on, and compares with the base model.

    Args:
        loss, arrays: what is computed with it and without it.

    Returns:
        the loss without the adapter minus the loss with it.

    Raises:
        TrainingError: what was saved is no other than the base model, or gives a loss that is not finite.
    """
    lora.load_adapter(networks, path)
    if not any(map(_differs, networks.values())):
        raise TrainingError(f"{path}: read back, every adapter's B is zero: it is the base model")
    together = as_one(networks)
    adapted = float(loss(together, arrays)[0])
    with lora.disabled(together):
        base = float(loss(together, arrays)[0])
    if not math.isfinite(adapted):
        raise TrainingError(
            f"{path}: read back, the adapter gives a loss of {adapted:g}; the base model gives {base:g}"
        )
    return base - adapted


def _differs(network: nn.Module) -> bool:
    """Whether an adapter does anything."""
    return any(bool(mx.any(layer.lora_b != 0)) for layer in lora.layers(network).values())
