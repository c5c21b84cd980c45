"""All optimizers by name. To add one, write a subclass of `Optimizer` and an entry here; both commands then offer it.

This module imports no optimizer until `build`, so that ``--help`` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mflux_vae_train.optimizers.base import Optimizer
    from mflux_vae_train.optimizers.grouped import Grouped


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer.

    Attributes:
        factory: "module:name" of a class or function that takes `options` as keyword arguments.
        help: a few words for ``--help``.
        options: names of the options that it reads.
        rate_scale: learning rate for the effect that 1 has with AdamW; None if there is no such factor.
        finds_rate: estimates one rate for all parameters; the learning rate is a factor near 1.
    """

    factory: str
    help: str
    options: tuple[str, ...]
    rate_scale: float | None = 1.0
    finds_rate: bool = False


_HERE = __package__
_ADAM = ("beta1", "beta2", "epsilon", "weight_decay")
_PRODIGY = (*_ADAM, "beta3", "decouple", "use_bias_correction", "safeguard_warmup")

OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(factory=f"{_HERE}.adam:AdamW", help="decoupled weight decay", options=_ADAM),
    "adamw8bit": Entry(factory=f"{_HERE}.adam8bit:AdamW8bit", help="AdamW with moments in 8 bits", options=_ADAM),
    "adam": Entry(factory=f"{_HERE}.adam:Adam", help="weight decay as part of the gradient", options=_ADAM),
    "adafactor": Entry(
        factory=f"{_HERE}.adafactor:Adafactor", help="factored second moments", options=("weight_decay",)
    ),
    # a tenth of AdamW's rate is the lower end of what Lion's authors found (a tenth to a third)
    "lion": Entry(
        factory=f"{_HERE}.lion:Lion",
        help="sign of a momentum, at a tenth of AdamW's learning rate",
        options=("beta1", "beta2", "weight_decay"),
        rate_scale=0.1,
    ),
    "muon": Entry(
        factory=f"{_HERE}.muon:muon_with_adamw",
        help="orthogonalized momentum for matrices and kernels, AdamW at a quarter of the learning rate for the rest",
        options=_ADAM,
        rate_scale=None,
    ),
    "prodigy": Entry(
        factory=f"{_HERE}.prodigy:Prodigy", help="estimates the learning rate", options=_PRODIGY, finds_rate=True
    ),
}


def build(name: str, **options: Any) -> Optimizer | Grouped:
    """The optimizer of this name. Options that it does not read are dropped; None keeps the optimizer's default."""
    entry = OPTIMIZERS[name]
    module, _, attribute = entry.factory.partition(":")
    read = {option: value for option, value in options.items() if option in entry.options and value is not None}
    optimizer: Optimizer | Grouped = getattr(import_module(module), attribute)(**read)
    return optimizer


def with_default_rate() -> tuple[str, ...]:
    """Names of the optimizers whose learning rate follows from AdamW's, or that find their own."""
    return tuple(name for name, entry in OPTIMIZERS.items() if entry.finds_rate or entry.rate_scale is not None)


def with_given_rate() -> tuple[str, ...]:
    """Names of the optimizers that train at the learning rate that they are given."""
    return tuple(name for name, entry in OPTIMIZERS.items() if not entry.finds_rate)


def help_text(names: tuple[str, ...]) -> str:
    """Help for a flag with these choices."""
    return "; ".join(f"{name}: {OPTIMIZERS[name].help}" for name in names)


def used_by(flags: Mapping[str, str], names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """For each flag, which of `names` read it.

    Args:
        flags: the option that each flag sets.
    """
    return {flag: tuple(name for name in names if option in OPTIMIZERS[name].options) for flag, option in flags.items()}
