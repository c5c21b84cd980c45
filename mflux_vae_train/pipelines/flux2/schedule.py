"""Noise schedule of FLUX.2: in sampling, the shift depends on the number of image tokens and of steps."""

from __future__ import annotations

from dataclasses import dataclass

from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule

_LARGE = 4300
"""Image tokens above which the number of steps has no effect."""


@dataclass(frozen=True, kw_only=True)
class Flux2Schedule(FlowMatchSchedule):
    """`FlowMatchSchedule` with FLUX.2's shift in sampling. Training shifts as FLUX.1's (scheme ``flux_shift``)."""

    shift: float = 3.0
    use_dynamic_shifting: bool = True

    def sampling_mu(self, image_tokens: int, steps: int) -> float:
        """Black Forest Labs' fit: linear in the tokens at 200 and at 10 steps, and linear in the steps between."""
        at_200 = 0.00016927 * image_tokens + 0.45666666
        if image_tokens > _LARGE:
            return at_200
        at_10 = 8.73809524e-05 * image_tokens + 1.89833333
        slope = (at_200 - at_10) / 190
        return slope * steps + (at_200 - 200 * slope)
