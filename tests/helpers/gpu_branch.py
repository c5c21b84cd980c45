"""Run the code for Metal and CUDA on the CPU, for one test or for a session (`pytest --as-gpu`)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae.runtime import device

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}
MEMORY_BYTES = 12 << 30

HELP = """run the chosen share of the suite with the code for Metal and CUDA: is_cpu() is False everywhere, the default
dtype is the given one (bfloat16 without a value; before a path write --as-gpu=bfloat16), the step of a training is
compiled, and the device has 12 GB. MLX's CPU operations compute all of it, so this finds errors of this project's
code, not of MLX's GPU kernels. Programs that a test starts run as usual."""

SHARE = (
    *(f"mflux_vae/kernels/test_{name}.py" for name in ("conv", "gpu_attention", "gpu_conv", "kernels", "quantized")),
    "mflux_vae/networks/test_half_precision.py",
    "mflux_vae/networks/test_networks.py",
    "mflux_vae/networks/test_video.py",
    "mflux_vae/tiling/test_tiling.py",
    "mflux_vae_train/training",
    *(f"mflux_vae_train/lora/test_{name}.py" for name in ("conv", "gpu_layers", "lora")),
    *(f"mflux_vae_train/optimizers/test_{name}.py" for name in ("adam8bit", "optimizers", "prodigy")),
    "mflux_vae_train/pipelines/flux1/test_gpu_branch.py",
    "mflux_vae_train/pipelines/flux1/test_transformer.py",
    "mflux_vae_train/pipelines/stable_diffusion/test_unet.py",
    "mflux_vae_train/pipelines/text/test_text.py",
)
"""Test files and folders that hold on every device."""

ALONE = "test_as_gpu.py"
"""Name of test files that run in such a session only."""


def force(patch: pytest.MonkeyPatch, *, cpu: bool = False, dtype: mx.Dtype = mx.bfloat16) -> None:
    """Let `is_cpu` answer `cpu` in every thread; without one, compute in `dtype` and have `MEMORY_BYTES`."""
    patch.setattr(device._assumed, "cpu", cpu)  # before the class, whose value it hides in this thread
    patch.setattr(device._Assumed, "cpu", cpu)
    if not cpu:
        patch.setattr(device, "GPU_DTYPE", dtype)
        info = {**mx.device_info(), "max_recommended_working_set_size": MEMORY_BYTES, "memory_size": MEMORY_BYTES}
        patch.setattr(mx, "device_info", lambda *_: info)


def in_share(path: Path) -> bool:
    """Whether a test file runs in a session with `--as-gpu`."""
    root = Path(__file__).parents[1]
    return path.name == ALONE or any(path.is_relative_to(root / part) for part in SHARE)
