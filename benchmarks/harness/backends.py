"""Shared by scripts: devices, dtypes, and waiting for the end of a repetition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness.rows import Work


def torch_device(gpu: bool) -> str:
    """`cpu`, `cuda` or `mps`. TF32 is enabled on CUDA, as MLX uses it.

    Raises:
        RuntimeError: MLX has a GPU and torch has none.
    """
    import torch

    if not gpu:
        return "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    raise RuntimeError("MLX computes on a GPU that this torch does not know; install the torch that does")


def torch_work(run: Callable[[], Mapping[str, Any]], device: str) -> Work:
    """A repetition ends when its outputs are numpy arrays; CUDA has a counter of peak memory."""
    import torch

    def finished() -> dict[str, np.ndarray]:
        return {name: np.asarray(to_numpy(value)) for name, value in run().items()}

    if device != "cuda":
        return Work(run=finished)
    return Work(run=finished, peak=torch.cuda.max_memory_allocated, reset=torch.cuda.reset_peak_memory_stats)


def compiled_if(compiled: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a function, or the function."""
    import torch

    compiled_function: Callable[..., Any] = torch.compile(function) if compiled else function
    return compiled_function


def torch_update(parameters: Sequence[Any], rate: float) -> Callable[[Any], dict[str, Any]]:
    """loss -> what is compared, after backward pass, clipping and AdamW."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2, fused=True)

    def update(loss: Any) -> dict[str, Any]:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {"loss": loss, "grad_norm": norm}

    return update


def to_numpy(value: Any) -> Any:
    """Copy a tensor to the host; return numbers unchanged."""
    return value.detach().float().cpu().numpy() if hasattr(value, "detach") else value


def mlx_work(run: Callable[[], Mapping[str, Any]]) -> Work:
    """A repetition ends when its outputs are numpy arrays; on a GPU MLX counts peak memory."""
    import mlx.core as mx

    def finished() -> dict[str, np.ndarray]:
        outputs = run()
        mx.eval(outputs)
        arrays = {k: v.astype(mx.float32) if isinstance(v, mx.array) else v for k, v in outputs.items()}
        return {name: np.asarray(array) for name, array in arrays.items()}

    if mx.default_device().type == mx.DeviceType.cpu:
        return Work(run=finished)
    return Work(run=finished, peak=mx.get_peak_memory, reset=mx.reset_peak_memory)


def nhwc(tensor: Any) -> Any:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return tensor.permute(0, 2, 3, 1)


def training(step: Callable[[], Mapping[str, Any]]) -> Callable[[], Mapping[str, Any]]:
    """Wrap a training step; two steps run first, so that the optimizer's state exists.

    Returns the loss and gradient norm of the first step and the loss of the current one for comparison. Later norms
    would differ: Adam's first updates turn rounding errors into whole steps.
    """
    first = {f"first {name}": to_numpy(value) for name, value in step().items()}
    step()
    return lambda: {**first, "loss": step()["loss"]}
