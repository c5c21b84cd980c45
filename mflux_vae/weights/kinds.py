"""What a weights file holds, guessed from its keys, for messages about files of another kind."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SIGNS = {
    "an adapter": r"\.(lora_|lokr_|hada_)|^lora_",
    "a checkpoint of a training": r"^(denoiser|optimizer|discriminator)/",
    "a denoiser": r"(^|\.)(\w+_transformer_blocks|transformer_blocks|double_blocks|single_blocks|joint_blocks)\.\d"
    r"|(^|\.)(input_blocks|down_blocks\.\d+\.attentions|noise_refiner)\.",
    "a text encoder": r"(^|\.)(text_model|encoder\.block\.\d+|model\.layers\.\d+|resblocks)\.",
    "an autoencoder": r"(^|\.)(encoder|decoder)\.(conv_in|conv_out|layers|mid|down|up)",
}
"""Kinds, and patterns that one of the keys matches; the first kind counts."""


def kind_of(keys: Iterable[str]) -> str:
    """Kind of a file with these keys, such as "a denoiser"; empty if unknown."""
    names = list(keys)
    return next((kind for kind, sign in _SIGNS.items() if any(re.search(sign, name) for name in names)), "")
