"""Dropout inside a network as a function of keys: a resumed run drops what an uninterrupted one does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.nn as nn

from mflux_vae_train.lora.dropout import DropoutKeys, KeyedDropout


def by_keys(network: nn.Module) -> DropoutKeys:
    """Puts a dropout that keys draw in the place of each `nn.Dropout` that a module calls `dropout`.

    Returns:
        what holds the keys, (B, 2), one per sample; without them nothing is dropped.
    """
    keys = DropoutKeys()
    holders = [module for _, module in network.named_modules() if isinstance(module.get("dropout"), nn.Dropout)]
    for salt, module in enumerate(holders, 1):
        module.dropout = KeyedDropout(1 - module.dropout._p_1, salt, keys)
    return keys


def capture_keys(block: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context with the keys that are set now, for a block that computes itself again later."""
    held = (module.get("dropout") for _, module in block.named_modules())
    return next((dropout.capture_keys() for dropout in held if isinstance(dropout, KeyedDropout)), nullcontext)
