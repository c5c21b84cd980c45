"""mflux as host: train inside one of its model objects.

    flux = Flux1(model_config=ModelConfig.schnell(), quantize=4)
    DreamBooth(flux).train(DreamBooth.Settings(model="schnell", ...))
    flux.generate_image(seed=0, prompt="a photo of sks dog on a beach")

The networks here hold the arrays of the object, quantized ones included. Copies exist only of small quantized
embeddings, and of weights of the autoencoder that are not float32, while it is in use. The object changes only when
the training has succeeded: then its layers carry the adapter, or it has the trained weights. To train another subject,
build the object anew. mflux is imported for its layer with an adapter alone, and need not be installed.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mflux_vae.errors import PluginError

logger = logging.getLogger(__name__)

TESTED = "0.24"
"""Release of mflux that the tests run with."""

SUPPORTED = {"Flux1": "flux1", "Flux2Klein": "flux2", "ZImage": "z_image"}
"""Classes of mflux, and the modules here that open them."""


def as_pipeline(model: Any) -> Any:
    """A pipeline that shares the arrays of a model object of mflux; any other object as it is.

    Raises:
        PluginError: another class of mflux.
        SettingsError: the object carries an adapter, or was built with parts that cannot be trained with.
        WeightsError: its weights do not fit the network of this package.
    """
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.partition(".")[0] == "mflux"]
    if not kinds:
        return model
    name = next((kind for kind in kinds if kind in SUPPORTED), None)
    if name is None:
        raise PluginError(f"mflux's {type(model).__name__} cannot be trained; {', '.join(SUPPORTED)} can")
    try:
        installed = version("mflux")
    except PackageNotFoundError:
        installed = "of an unknown version"
    if not installed.startswith(f"{TESTED}."):
        logger.warning("mflux %s: tests run with %s; weights may have other names", installed, TESTED)
    return import_module(f"{__name__}.{SUPPORTED[name]}").wrap(model)
