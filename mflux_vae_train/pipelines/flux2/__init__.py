"""FLUX.2 [klein], 4B and 9B."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from mflux_vae_train.pipelines.flow.entry import Entry

if TYPE_CHECKING:
    from mflux_vae_train.pipelines.flux2.pipeline import Flux2KleinPipeline

_entry: Entry[Flux2KleinPipeline] = Entry(__name__)
load, opens, knows = _entry.load, _entry.opens, _entry.knows


def refuse(model: str) -> NoReturn:
    """Refuse FLUX.2 [dev].

    Raises:
        SettingsError: in any case.
    """
    from mflux_vae.errors import SettingsError

    raise SettingsError(
        f"{model}: FLUX.2 [dev] with its text encoder Mistral is not supported; use --model flux2-klein-4b"
    )
