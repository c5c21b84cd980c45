"""FLUX.1 [schnell] and [dev]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mflux_vae_train.pipelines.flow.entry import Entry

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline

_entry: Entry[FluxPipeline] = Entry(__name__)
load, opens, knows = _entry.load, _entry.opens, _entry.knows
