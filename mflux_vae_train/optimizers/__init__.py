"""Optimizers behind one interface, MLX's: learning rates are arrays in the state, set for each update by the step.

All compute in float32. Of a parameter in half precision they keep a float32 master copy in their state.
"""

from mflux_vae_train.optimizers.adafactor import Adafactor
from mflux_vae_train.optimizers.adam import Adam, AdamW
from mflux_vae_train.optimizers.adam8bit import AdamW8bit
from mflux_vae_train.optimizers.grouped import Filter, Grouped
from mflux_vae_train.optimizers.lion import Lion
from mflux_vae_train.optimizers.muon import Muon, orthogonalize
from mflux_vae_train.optimizers.prodigy import Prodigy

__all__ = [
    "Adafactor",
    "Adam",
    "AdamW",
    "AdamW8bit",
    "Filter",
    "Grouped",
    "Lion",
    "Muon",
    "Prodigy",
    "orthogonalize",
]
