"""Dropout as a function of random keys, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.nn as nn

from mflux_vae_train.lora.dropout import DropoutKeys, KeyedDropout


def use_keyed_dropout(network: nn.Module) -> DropoutKeys:
    """Replace each `nn.Dropout` in an attribute `dropout` by a `KeyedDropout`.

    Returns:
        holder of the keys (B, 2), one per sample; without keys dropout is the identity.
    """
    keys = DropoutKeys()
    holders = [module for _, module in network.named_modules() if isinstance(module.get("dropout"), nn.Dropout)]
    for salt, module in enumerate(holders, 1):
        module.dropout = KeyedDropout(1 - module.dropout._p_1, salt, keys)
    return keys


def capture_keys(block: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Context with the current keys, for a block that is recomputed later."""
    layers = (module.get("dropout") for _, module in block.named_modules())
    return next((dropout.capture_keys() for dropout in layers if isinstance(dropout, KeyedDropout)), nullcontext)
