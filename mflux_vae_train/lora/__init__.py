"""Low-rank adapters: layers that are trained, and the files they come from and go to."""

from mflux_vae_train.lora.files import (
    METADATA_KEY,
    adapter_metadata,
    adapter_tensors,
    load_adapter,
    read_adapter,
    save_adapter,
)
from mflux_vae_train.lora.layers import add_lora, disabled, dropout_keys, fuse, layers
from mflux_vae_train.lora.targets import matching, patterns_of

__all__ = [
    "METADATA_KEY",
    "adapter_metadata",
    "adapter_tensors",
    "add_lora",
    "disabled",
    "dropout_keys",
    "fuse",
    "layers",
    "load_adapter",
    "matching",
    "patterns_of",
    "read_adapter",
    "save_adapter",
]
