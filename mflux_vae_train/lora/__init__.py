"""Low-rank adapters: trainable layers, and their files."""

from mflux_vae_train.lora.assistant import assisted, read_assistant, without_assistant
from mflux_vae_train.lora.files import (
    adapter_metadata,
    adapter_tensors,
    check_adapter_fits,
    load_adapter,
    save_adapter,
)
from mflux_vae_train.lora.from_checkpoint import ALPHAS
from mflux_vae_train.lora.kohya import check_kohya, kohya_tensors
from mflux_vae_train.lora.layers import add_lora, disabled, dropout_keys, fuse, layers, scaled, transplanted
from mflux_vae_train.lora.location import adapter_file, fetch_adapter
from mflux_vae_train.lora.metadata import METADATA_KEY
from mflux_vae_train.lora.reading import Adapter, Names, Networks, read_adapter
from mflux_vae_train.lora.targets import ALL_LAYERS, matches, matching, patterns_of

__all__ = [
    "ALL_LAYERS",
    "ALPHAS",
    "METADATA_KEY",
    "Adapter",
    "Names",
    "Networks",
    "adapter_file",
    "adapter_metadata",
    "adapter_tensors",
    "add_lora",
    "assisted",
    "check_adapter_fits",
    "check_kohya",
    "disabled",
    "dropout_keys",
    "fetch_adapter",
    "fuse",
    "kohya_tensors",
    "layers",
    "load_adapter",
    "matches",
    "matching",
    "patterns_of",
    "read_adapter",
    "read_assistant",
    "save_adapter",
    "scaled",
    "transplanted",
    "without_assistant",
]
