"""Data sets that packages give a name, by entry points.

    [project.entry-points."mflux_vae_train.data"]
    mine = "my_package:pictures"

Such a function takes `size`, `channels`, `seed` and `count` by name, and gives a `data.Source`: of `count` pictures
where they are made there, of as many as there are otherwise. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from mflux_vae.errors import MfluxVaeError, PluginError

GROUP = "mflux_vae_train.data"


def names() -> list[str]:
    """Of all that are registered."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def open_registered(name: str, **settings: Any) -> Any:
    """The source of that name; see above for its settings.

    Raises:
        PluginError: the package cannot be imported, or what it registered gives no source.
    """
    (entry, *_) = sorted(entry_points(group=GROUP, name=name), key=lambda entry: entry.value)
    try:
        function: Callable[..., Any] = entry.load()
        source = function(**settings)
    except MfluxVaeError:
        raise
    except Exception as error:  # whatever a foreign module raises
        raise PluginError(f"data set {name!r} is broken ({entry.value}: {type(error).__name__}: {error})") from error
    missing = [member for member in ("size", "channels", "starts", "item", "__len__") if not hasattr(source, member)]
    if missing:
        raise PluginError(f"data set {name!r}: {entry.value} gave a {type(source).__name__} without {missing[0]}")
    return source
