"""Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mflux_vae_train.pipelines.flow.entry import Entry

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline

_entry: Entry[ZImagePipeline] = Entry(__name__)
load, opens, knows = _entry.load, _entry.opens, _entry.knows
