"""Data sets that packages register through entry points.

    [project.entry-points."mflux_vae_train.data"]
    mine = "my_package:images"

The function takes the keyword arguments `size`, `channels`, `seed` and `count` and returns a `batches.Source`.
`count` is the number of images of a generated data set. A package is imported only when its data set is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from mflux_vae.errors import MfluxVaeError, PluginError

GROUP = "mflux_vae_train.data"


def registered_names() -> list[str]:
    """Names of all registered data sets."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def open_registered(name: str, **settings: Any) -> Any:
    """Open a data set; for `settings` see above.

    Raises:
        PluginError: the package cannot be imported, or its function does not return a source of uint8 images.
    """
    (entry, *_) = sorted(entry_points(group=GROUP, name=name), key=lambda entry: entry.value)
    try:
        function: Callable[..., Any] = entry.load()
        source = function(**settings)
    except MfluxVaeError:
        raise
    except Exception as error:  # any error of a plugin
        raise PluginError(f"data set {name!r}: {entry.value} failed ({type(error).__name__}: {error})") from error
    missing = [member for member in ("size", "channels", "starts", "item", "__len__") if not hasattr(source, member)]
    if missing:
        raise PluginError(f"data set {name!r}: {entry.value} returned a {type(source).__name__} without {missing[0]}")
    _check_item(source, f"data set {name!r}: item() of the {type(source).__name__} from {entry.value}")
    return source


def _check_item(source: Any, subject: str) -> None:
    """Read the first image, as those of another kind would be converted silently."""
    if not len(source):
        return
    image, shape = source.item(0), (source.size, source.size, source.channels)
    if not isinstance(image, np.ndarray) or (image.dtype, image.shape) != (np.uint8, shape):
        array = isinstance(image, np.ndarray)
        found = f"an array {image.shape} of {image.dtype}" if array else f"a {type(image).__name__}"
        raise PluginError(f"{subject} returned {found}; expected an array {shape} of uint8")
