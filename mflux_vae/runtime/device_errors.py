"""Errors of MLX's devices as one line with a cure. MLX raises RuntimeError for all; their texts tell them apart.

The texts are those of MLX's sources: its allocators and command buffers of Metal and CUDA, and the names of CUDA's
libraries. MLX's allocator for CPUs raises nothing: the system ends a process that has no memory left.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mflux_vae.errors import DeviceError, MfluxVaeError
from mflux_vae.utils.formatting import shortened

_LONGEST = 200
"""Characters of MLX's text in a message."""


@dataclass(frozen=True)
class _Kind:
    """
    Attributes:
        texts: regular expression for MLX's texts.
        cure: may have groups of the expression, and `kernels`, the folder of compiled kernels.
    """

    texts: str
    problem: str
    cure: str
    memory: bool = False


_KINDS = (
    _Kind(
        r"(failed|error): out of memory|(CUDA|backend) out of memory|OutOfMemory|Insufficient Memory|bad_alloc"
        r"|\[malloc\w*\] Unable to allocate|ALLOC(ATION)?_FAILED|maximum (allowed|Metal) buffer size"
        r"|\[metal::malloc\] Resource limit|\bcublas\w*\(.*\) failed with code: 3\b",  # CUBLAS_STATUS_ALLOC_FAILED
        "out of memory",
        "compute less at a time (smaller images or batches, or tiling), or close other programs",
        memory=True,
    ),
    _Kind(
        r"Cache thrashing .*variable (?P<variable>\w+) .* than (?P<size>\d+)",
        "MLX's cache of compiled work is full",
        "set the environment variable {variable}={size}0 and run the command again",
    ),
    _Kind(
        r"Failed to load compiled .*kernel|kernel image is invalid|named symbol not found",
        "a compiled kernel is broken",
        "delete the folder {kernels} and run the command again",
    ),
    _Kind(
        r"no kernel image|unsupported toolchain|Failed to compile kernel|locations of CUDA headers",
        "MLX has no kernel for this GPU",
        "install the MLX that fits the GPU and its driver, or set CUDA_HOME to the folder of a CUDA toolkit",
    ),
    _Kind(r"driver version is insufficient", "the GPU's driver is too old for MLX", "update the driver"),
    _Kind(
        r"No Metal device|no CUDA-capable device|devices are busy or unavailable|\[gpu::\w+\] GPU backend is not",
        "no GPU is available",
        "log in at the machine itself, end other programs that use the GPU, or use a CPU",
    ),
    _Kind(
        r"CUDNN_|\bcudnn\w*\(.*\) failed|\bgraph(\.|->)\w+\(.*\) failed",
        "cuDNN failed",
        "set the environment variable MLX_CUDA_USE_CUDNN_SDPA=0, or update the driver",
    ),
    _Kind(
        r"\[METAL\].*(Timeout|Hang|Interactivity)",
        "macOS stopped the GPU's work",
        "close programs that draw much, or compute less at a time, and run the command again",
    ),
    _Kind(
        r"\[METAL\].*(Permission|NotPermitted)",
        "macOS does not let this program use the GPU",
        "run the command in the session of a user who is logged in",
    ),
    _Kind(
        r"\[METAL\] Command buffer",
        "the GPU failed",
        "run the command again, after a restart of the machine if this happens twice",
    ),
    _Kind(r"\[metal::|metallib|Metal::", "MLX's Metal back end failed", "install MLX again, or another version of it"),
    _Kind(
        r"\b(cu(da|blas)?[A-Z]|nv(rtc|ml))\w*\(.*\) failed|illegal memory access|device-side assert|\bECC error",
        "the GPU failed",
        "look at it with nvidia-smi and run the command again",
    ),
)
"""The first one that fits counts."""


def device_error(error: BaseException) -> DeviceError | None:
    """The translation of an error, if it is one of MLX's device or of missing memory, or was raised because of one.

    Other errors of this project have a message of their own, and stay.
    """
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, MfluxVaeError):
            return one if isinstance(one, DeviceError) else None
        if isinstance(one, RuntimeError | MemoryError) and (found := _translated(one)) is not None:
            return found
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return None


def _translated(error: RuntimeError | MemoryError) -> DeviceError | None:
    text = " ".join(str(error).split()) or type(error).__name__
    for kind in _KINDS:
        match = re.search("" if kind.memory and isinstance(error, MemoryError) else kind.texts, text)
        if match is not None:
            cure = kind.cure.format(**match.groupdict(), kernels=_kernels())
            shown = shortened(text.rstrip("."), _LONGEST)
            return DeviceError(f"{kind.problem} ({shown})", cure=cure, memory=kind.memory)
    return None


@contextmanager
def device_errors(cure: str | Callable[[], str] = "") -> Iterator[None]:
    """Translate errors of MLX's device in the block.

    Args:
        cure: what to do when memory runs out; of nested blocks the innermost one that has a cure counts.

    Raises:
        DeviceError: in place of MLX's RuntimeError, of MemoryError, or of an error that one of them caused.
    """
    try:
        yield
    except Exception as error:
        found = device_error(error)
        if found is None:
            raise
        general = found.memory and found.parts["cure"] == _KINDS[0].cure
        better = (cure if isinstance(cure, str) else cure()) if general else ""
        if found is error and not better:
            raise
        raise (found.but(cure=better) if better else found) from error


def _kernels() -> Path:
    """Where MLX keeps compiled CUDA kernels."""
    return Path(os.environ.get("MLX_PTX_CACHE_DIR") or Path(tempfile.gettempdir()) / "mlx")
