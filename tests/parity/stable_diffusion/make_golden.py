"""Write diffusers' predictions of small UNets, which the suite compares with where diffusers is absent.

    python -m tests.parity.stable_diffusion.make_golden

By name of `small_unet.SMALL`: `prediction` and `gradient`, that of the mean square with respect to the latents; NHWC.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.stable_diffusion.small_unet import GOLDEN, SIZES, SMALL, inputs
from tests.parity.stable_diffusion.test_unet_parity import call_theirs, nchw, theirs_of


def main() -> None:
    """Write the file anew."""
    tensors = {}
    for name, config in SMALL.items():
        theirs = theirs_of(drawn(UNet(config), 11))
        first, *_ = given = inputs(config, SIZES[name])
        latents = nchw(first).requires_grad_()
        prediction = call_theirs(theirs, given, latents)
        prediction.square().mean().backward()
        tensors[f"{name}.prediction"] = mx.array(prediction.detach().numpy().astype(np.float32))
        tensors[f"{name}.gradient"] = mx.array(latents.grad.permute(0, 2, 3, 1).numpy().astype(np.float32))
    mx.save_safetensors(str(GOLDEN), tensors)


if __name__ == "__main__":
    main()
