"""Compile element-wise formulas into one pass over memory, for the CPU.

`mx.compile` writes C++ for a formula, and g++ compiles it at run time. The formulas of this package follow three rules
so that g++ vectorizes them:

- MLX fuses at most eleven levels of operations; deeper formulas need several passes. Polynomials are therefore summed
  as a tree (Estrin). `shapeless` is off, because with it every constant costs a level.
- g++ cannot vectorize the NaN checks of `mx.maximum`, `mx.minimum` and `mx.clip`, but it can vectorize `mx.where` with
  one comparison. `mx.sqrt`, `mx.exp` and similar functions are scalar calls.
- Arguments of different shapes are read with strides, one element at a time. Formulas of more than a few operations
  broadcast with MLX's own subtraction or product first.

User CPU time relative to unfused operations, on two cores of an AMD EPYC (AVX2, MLX 0.32.4): SiLU 0.25, softmax 0.5,
AdamW 0.6, encoder of Stable Diffusion's autoencoder 0.8, DreamBooth update on `tiny` 0.86. MLX compiles for baseline
x86-64; AVX2 code makes SiLU another 1.3 times as fast, but does not measurably speed up training.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

logger = logging.getLogger(__name__)

Formula: TypeAlias = Callable[..., Any]


def fused(formula: Formula) -> Formula:
    """Compile `formula` if this machine can (see `compiles`), else return it unfused.

    Args:
        formula: element-wise function of arrays, with broadcasting, to one or several arrays.
    """
    compiled: Formula = mx.compile(formula)

    @wraps(formula)
    def call(*args: mx.array) -> Any:
        return (compiled if compiles() else formula)(*args)

    return call


@cache
def compiles() -> bool:
    """Whether `mx.compile` works on this machine's CPU: g++ exists, and MLX can compile with it.

    MLX works without a compiler, but an evaluation fails if the compiler is broken or its files cannot be written.
    Compilation is then disabled for the whole process.
    """
    if shutil.which("g++") is None:
        return False
    problem = _tools_problem() or _folder_problem(_cache_folder()) or _compiler_problem()
    if problem:
        mx.disable_compile()
        logger.info("formulas are not compiled, activations take four times as long: %s", problem)
    return not problem


_TEMP_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
_PROBE = bytes(1 << 16)
"""About the size of a compiled formula."""


def _cache_folder() -> Path:
    """Folder of MLX's compiled formulas, below C++'s `std::filesystem::temp_directory_path()`."""
    root = next((os.environ[name] for name in _TEMP_VARIABLES if name in os.environ), "/tmp")
    return Path(root or os.devnull, "mlx", mx.__version__, "cpu")  # type: ignore[attr-defined]


def _folder_problem(folder: Path) -> str | None:
    """Error message if MLX cannot use this folder, else None.

    MLX loads libraries from the folder, so it must not belong to another user.
    """
    root = folder.parents[2]
    fix = f"set {_TEMP_VARIABLES[0]} to a folder that you own"
    try:
        if not root.is_dir():
            return f"{root} is not a folder; {fix}"
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, *folder.parents[:2]):
            if place.stat().st_uid not in (0, os.geteuid()):
                return f"{place} belongs to another user; {fix}"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(_PROBE)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}); {fix}"
    return None


def _tools_problem() -> str | None:
    """Error message on a Mac whose `g++` would open a dialog, as its compiler is not installed; else None."""
    if sys.platform != "darwin":
        return None
    with suppress(OSError):
        if not subprocess.run(["xcode-select", "-p"], capture_output=True).returncode:
            return None
    return "the command line tools are missing; xcode-select --install"


def _compiler_problem() -> str | None:
    """Error message if MLX cannot compile a formula, else None."""
    try:
        mx.eval(
            mx.compile(lambda x, y: x * y + 1)(mx.zeros((2,)), mx.zeros((2,)))
        )  # MLX compiles formulas of two or more operations
    except RuntimeError as error:
        return " ".join(str(error).split())[:300]
    return None
