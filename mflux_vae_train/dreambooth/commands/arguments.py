"""Flags of commands that draw with the adapters of a run."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.paths import expand

if TYPE_CHECKING:
    from mflux_vae_train.dreambooth.drawing.source import Source

_OPENING = ("revision", "variant", "vae", "prediction_type")
_DRAWING = ("steps", "guidance", "size", "quantize")


def add_source(parser: ArgumentParser) -> None:
    """Add the flags that `source_of` reads."""
    parser.add_argument(
        "source",
        metavar="RUN_OR_ADAPTER",
        type=expand,
        help="output folder of a run or a checkpoint-N of it; or the file or folder of an adapter, or owner/name/FILE"
        " on the Hub, with --model",
    )
    add = parser.add_argument_group("model (default: that of the run's previews)").add_argument
    add("--model", type=expand, help="pipeline, folder, file, or owner/name on the Hub, as for mflux-train-dreambooth")
    add("--revision", metavar="TEXT", help="branch, tag or commit of a model on the Hub")
    add("--variant", metavar="TEXT", help="variant of the weight files, such as fp16")
    add("--vae", type=expand, help="another autoencoder")
    add("--prediction_type", choices=("epsilon", "v_prediction"), help="of a file that does not state it")
    add("--quantize", choices=("4", "8", "none"), help="bits of the model's weights")
    add = parser.add_argument_group("drawing (default: as for the run's previews)").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--guidance", type=float, metavar="X", help="guidance scale")
    add("--size", type=int, nargs="+", metavar="N", help="side of the pictures in pixels, or height and width")


def source_of(values: dict[str, Any]) -> Source:
    """The source that the flags of `add_source` describe; removes them from `values`.

    Raises:
        InputError: see `drawing.source.read_source`; or a value is out of range.
    """
    from mflux_vae_train.dreambooth.drawing.source import read_source

    path, model = values.pop("source"), values.pop("model")
    given = {name: value for name in (*_OPENING, *_DRAWING) if (value := values.pop(name)) is not None}
    if given.get("steps", 1) < 1:
        raise SettingsError(f"--steps is {given['steps']}; give 1 or more")
    if not 0 <= given.get("guidance", 0) < float("inf"):
        raise SettingsError(f"--guidance is {given['guidance']:g}; give 0 or more")
    if "size" in given:
        size = given["size"]
        if len(size) > 2 or min(size) < 1:
            raise SettingsError(f"--size {' '.join(map(str, size))}: give a side in pixels, or height and width")
        given["size"] = (size[0], size[-1])
    if "quantize" in given:
        given["quantize"] = None if given["quantize"] == "none" else int(given["quantize"])
    source = read_source(path, model)
    if source.untrained is not None and (named := [f"--{name}" for name in _OPENING if name in given]):
        raise SettingsError(f"{', '.join(named)}: {path} trained all weights, so that its result is the model")
    return source.changed(**given)


def check_scales(scales: Sequence[float]) -> None:
    """
    Raises:
        SettingsError: a scale is not finite.
    """
    if wrong := [scale for scale in scales if not math.isfinite(scale)]:
        raise SettingsError(f"--scale is {wrong[0]}; give numbers such as 0.8")


def check_text(text: str, flag: str) -> None:
    """
    Raises:
        SettingsError: the text of a flag is blank, or has bytes that are not UTF-8.
    """
    if not text.strip():
        raise SettingsError(f"{flag} is empty")
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise SettingsError(f"{flag} {shortened(ascii(text), 100)} is not UTF-8; write it in a terminal for UTF-8")
