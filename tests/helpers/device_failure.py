"""Let MLX's device fail in one update of a training, as Metal and CUDA do: `mx.eval` raises RuntimeError."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mflux_vae_train.training.step import Step

METAL = (
    "[METAL] Command buffer execution failed: Insufficient Memory"
    " (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
CUDA = "cudaMallocAsync(&data, size, stream) failed: out of memory"

PASSES, REPLACING = "_accumulate", "_change"
"""Where in an update: in its forward and backward passes, or while it replaces parameters and optimizer state."""


def fail_update(patch: pytest.MonkeyPatch, update: int, text: str = METAL, *, when: str = PASSES) -> None:
    """Let update `update` (from 1) fail with this text, after all of its arrays were computed or donated."""
    call, part, evaluate = Step.__call__, getattr(Step, when), mx.eval
    current = 0

    def counted(self: Step, index: int, *rest: Any) -> Any:
        nonlocal current
        current = index + 1
        return call(self, index, *rest)

    def failing(self: Step, *arguments: Any) -> Any:
        if current != update:
            return part(self, *arguments)

        def raises(*trees: Any) -> None:
            evaluate(*trees)
            raise RuntimeError(text)

        with pytest.MonkeyPatch.context() as within:
            if when == PASSES:
                within.setattr(mx, "eval", raises)
                return part(self, *arguments)
            apply = self._apply

            def applied(*given: Any) -> Any:
                result = apply(*given)
                within.setattr(mx, "eval", raises)
                return result

            within.setattr(self, "_apply", applied)
            return part(self, *arguments)

    patch.setattr(Step, "__call__", counted)
    patch.setattr(Step, when, failing)
