"""The layers of a model, for adapters: their paths, shapes and names in other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mflux_vae_train.lora.reading import Names, Networks


@dataclass(frozen=True, kw_only=True)
class Model:
    """
    Attributes:
        name: for messages.
        networks: by prefix, the denoiser first; only paths and shapes of layers are used.
        names: all names that files give the layers.
        kohya: names in kohya's scripts; empty if the model has none.
        metadata: of files in kohya's naming, as far as the model determines it.
    """

    name: str
    networks: Networks
    names: Names
    kohya: Names
    metadata: Mapping[str, str]
