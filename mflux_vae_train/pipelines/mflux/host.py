"""What pipelines over mflux's model objects share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.pipelines.mflux.sharing import Shared, adapter_kind, nbytes

logger = logging.getLogger(__name__)


def check_precision(model: Any) -> None:
    """
    Raises:
        SettingsError: the object was built with `compute_precision`, so that its layers differ in precision.
    """
    if (dtype := getattr(getattr(model, "compute_precision", None), "dtype", None)) is not None:
        raise SettingsError(f"mflux's {type(model).__name__} has compute_precision {dtype}: build it without to train")


class Hosted:
    """First base class of a pipeline whose networks hold the arrays of a model object of mflux."""

    _model: Any
    _shared: Sequence[Shared[Any]]
    _adapter_kind: Any

    def host_in(self, model: Any) -> Any:
        """Remember the model object; returns the pipeline."""
        networks = self.parts.networks.values()  # type: ignore[attr-defined]
        self._model, self._adapter_kind = model, adapter_kind()
        self._shared = [network for network in networks if isinstance(network, Shared)]
        return self

    def footprint(self, work: Workload) -> Footprint:
        """Estimate what a run needs: the object stays in memory throughout."""
        estimate: Any = super().footprint  # type: ignore[misc]
        found: Footprint = estimate(work)
        untrained = replace(work, trained=0, assistant=0, text_encoder=False)
        networks = {one.name: one.weights for one in estimate(untrained).phases}
        resident = nbytes(self._model)
        phases = [
            Phase(one.name, one.weights - networks[one.name] + resident, one.work, one.operations)
            for one in found.phases
        ]
        return replace(found, phases=phases)

    # capabilities.SharesHostWeights

    def update_host(self) -> None:
        """Put adapters, or trained weights, into the model object."""
        changes = [shared.result(self._adapted) for shared in self._shared]
        for module, layers, arrays in changes:
            module.update_modules(layers)
            module.update(arrays)
        if cache := getattr(self._model, "prompt_cache", None):
            cache.clear()
        if any("m" in layer for shared in self._shared for layer in shared.module.modules()):
            logger.warning("mflux draws with DoRA now, but has no layer for it: it cannot save this model")

    def _adapted(self, original: nn.Module, ours: Any) -> nn.Module:
        if "m" in ours:
            return ours  # mflux has no layer for DoRA
        layer = self._adapter_kind.from_linear(original, r=ours.lora_a.shape[1], scale=ours.scale)
        layer.lora_A, layer.lora_B = ours.lora_a, ours.lora_b
        return layer
