"""Checks that a run learns something, so that no hours are spent on nothing."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import TrainingError
from mflux_vae_train import lora
from mflux_vae_train.training.hooks import Record

PATIENCE = 3
"""Updates in a row that end a run if their gradient is zero, or if they are the first and leave one network unchanged.

Single ones do not: black areas of a mask have no gradient, and dropped captions may have none in the text encoder.
"""


class LearningCheck:
    """Hook that ends a run which learns nothing. (`Step` ends a run whose loss or gradient is not finite.)

    Checks the gradient after every update. After the first updates with a gradient, checks that the weights changed.

    Args:
        networks: the networks that train.

    Raises (when called):
        TrainingError: nothing is learned; the message names likely reasons.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self._networks, self._zero_gradients = networks, 0
        self._first = 0  # first updates that were checked; -1 once all networks have changed

    def __call__(self, record: Record) -> None:
        if record.metrics["grad_norm"] == 0:
            self._zero_gradients += 1
            if self._zero_gradients == PATIENCE or record.total == self._zero_gradients:
                raise TrainingError(
                    f"update {record.update}: all gradients since the last change are zero, so the loss does not"
                    " reach the trained weights; check for a guidance or prompt that the pipeline ignores, adapted"
                    " layers that it does not use, and black masks"
                )
            return
        self._zero_gradients = 0
        if self._first < 0 or record.metrics["learning_rate"] == 0:
            return
        self._first += 1
        if record.metrics["update_size"] == 0:
            raise TrainingError(
                "the first update changed no weight: its steps are below the precision of the weights;"
                " raise --learning_rate, or train an adapter"
            )
        idle = [network for network in self._networks if lora.layers(network) and not _has_effect(network)]
        if not idle:
            self._first = -1
        elif len(idle) == len(self._networks) or self._first == PATIENCE:
            updates = "the first update" if self._first == 1 else f"the first {self._first} updates"
            raise TrainingError(
                f"{updates} changed nothing in one network: lora_b of all its adapters is still zero; raise its"
                " learning rate (--learning_rate or --text_encoder_lr)"
            )


def check_adapter(networks: lora.Networks, path: Path) -> None:
    """Read a saved adapter back and compare it, bit for bit, with the trained one. Runs no forward pass.

    Raises:
        TrainingError: the file differs from the trained adapter, holds numbers that are not finite, or has no effect.
    """
    files = lora.read_adapter(path, networks)
    for prefix, network in networks.items():
        for name, trained in lora.adapter_tensors(network, prefix).items():
            saved = files[prefix].tensors.get(name.removeprefix(f"{prefix}."))
            if saved is None or not mx.array_equal(saved, trained, equal_nan=True):
                raise TrainingError(f"{path}: {name} in the file differs from the trained array; save it again")
            if not mx.all(mx.isfinite(trained)):
                raise TrainingError(f"{path}: {name} has values that are not finite; lower --learning_rate")
    if not any(map(_has_effect, networks.values())):
        raise TrainingError(f"{path}: lora_b of every adapter is zero, so it equals the base model")


def _has_effect(network: nn.Module) -> bool:
    return any(bool(mx.any(layer.lora_b != 0)) for layer in lora.layers(network).values())
