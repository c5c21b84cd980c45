"""Key table of TAESD's files: one per half (`taesd_encoder.pth`, `taesd_decoder.pth`), or both in one.

The halves are numbered lists of layers; that of the decoder starts with a clamp without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx

_LAYER = re.compile(r"(?:taesd_)?(?:encoder|decoder)\.(?:layers\.)?(\d+)\..*")


def taesd(keys: Iterable[str]) -> tuple[Rule, ...]:
    """Table for a network with these keys (of the file or ours), which give the number of layers."""
    layers = 1 + max((int(found[1]) for key in keys if (found := _LAYER.fullmatch(key))), default=-1)
    rules = []
    for half, clamp in (("encoder", 0), ("decoder", 1)):
        for prefix in ("", "taesd_"):  # "taesd_" in ComfyUI
            for layer in range(layers):
                theirs, ours = f"{prefix}{half}.{layer + clamp}.{{rest}}", f"{half}.layers.{layer}.{{rest}}"
                rules.append(Rule(theirs, ours, conv_to_mlx, conv_from_mlx, reads_only=bool(prefix)))
    return (*rules, Rule("{path}", "{path}", conv_to_mlx, conv_from_mlx))
