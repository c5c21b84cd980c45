"""A model object as mflux builds it, of small networks. mflux itself is not needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.pipelines.flux1.family import FAMILY
from mflux_vae_train.pipelines.mflux import host
from mflux_vae_train.pipelines.mflux.families import shared_parts
from mflux_vae_train.pipelines.mflux.flux1 import HostedFlux1
from tests.mflux_vae_train.pipelines.flux1.small_flux import small_pipeline


class LoRALinear(nn.Module):
    """mflux's layer with an adapter."""

    @staticmethod
    def from_linear(linear: nn.Module, r: int, scale: float) -> LoRALinear:
        layer = LoRALinear()
        layer.linear, layer.scale = linear, scale
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self.scale * ((x @ self.lora_A) @ self.lora_B)


class FeedForward(nn.Module):
    """mflux's names of the two layers."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.linear1, self.linear2, self._activation = ours.net[0].proj, ours.net[2], nn.gelu_approx

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear2(self._activation(self.linear1(x)))


@dataclass
class Host:
    """The object, and a pipeline that shares its arrays."""

    model: nn.Module
    pipeline: HostedFlux1

    def state(self) -> tuple[list[Any], list[Any]]:
        """The object's arrays and modules, by identity."""
        arrays = [(name, id(array)) for name, array in tree_flatten(self.model.parameters())]
        return arrays, [(name, id(module), sorted(module._no_grad)) for name, module in self.model.named_modules()]


def fake_host(folder: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None = None) -> Host:
    small = small_pipeline(folder)
    configs, networks = small.configs, small.parts.networks
    monkeypatch.setattr(host, "adapter_kind", lambda: LoRALinear)
    model: Any = nn.Module()
    model.transformer, model.clip, model.t5 = (networks[name].get() for name in networks)
    for block in model.transformer.transformer_blocks:
        block.ff, block.ff_context = FeedForward(block.ff), FeedForward(block.ff_context)
    if bits:
        nn.quantize(model, 32, bits, class_predicate=lambda _, layer: _can_be_quantized(layer))
    model.prompt_cache = {"a prompt": "its encoding"}
    mx.eval(model.parameters())
    modules = {"transformer": model.transformer, "text_encoder": model.clip, "text_encoder_2": model.t5}
    shared = shared_parts(FAMILY, configs, modules, small.parts.vae, {})
    parts = replace(shared, tokenizers=small.parts.tokenizers)
    return Host(model, HostedFlux1(parts, configs, name="host").host_in(model))


def _can_be_quantized(layer: Any) -> bool:
    return hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 32 == 0
