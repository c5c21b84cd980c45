"""A formula over arrays as one pass over memory, for the CPU.

`mx.compile` writes C++ for a formula, and g++ compiles it at run time. The formulas of this package are written so that
g++ turns them into vector code:

- MLX fuses at most eleven operations deep; what is deeper becomes several passes. Polynomials are therefore summed
  as a tree (Estrin), not one after the other, and shapes are not left open: with `shapeless` every constant costs a
  level.
- `mx.maximum`, `mx.minimum` and `mx.clip` look for NaN in a way that g++ cannot turn into vector code; `mx.where`
  with one comparison it can. `mx.sqrt`, `mx.exp` and the like are calls, one element at a time.
- Arguments of different shapes are read with strides, one element at a time: a formula of more than a few operations
  takes what is to be broadcast after MLX's own subtraction or product.

Measured on two cores of an AMD EPYC (AVX2, MLX 0.32.4), user CPU time against operation by operation: SiLU 0.25,
softmax 0.5, AdamW 0.6, the encoder of Stable Diffusion's autoencoder 0.8, a DreamBooth update on `tiny` 0.86. MLX has
g++ compile for the oldest x86-64; code for AVX2 makes SiLU another 1.3 times as fast, but no training measurably so.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

logger = logging.getLogger(__name__)

Formula: TypeAlias = Callable[..., Any]


def fused(formula: Formula) -> Formula:
    """`formula` in one pass where this machine compiles (see `compiles`), else as it is.

    Args:
        formula: element by element, with broadcasting; arrays in, an array out, or several.
    """
    compiled: Formula = mx.compile(formula)

    @wraps(formula)
    def call(*args: mx.array) -> Any:
        return (compiled if compiles() else formula)(*args)

    return call


@cache
def compiles() -> bool:
    """Whether `mx.compile` works on this machine's CPU: there is a g++, and MLX can compile with it.

    MLX does without a compiler, but an evaluation fails where the compiler is broken or where its files cannot be
    written. Compilation is then disabled for the whole process.
    """
    if shutil.which("g++") is None:
        return False
    problem = _folder_problem(_cache_folder()) or _compiler_problem()
    if problem:
        mx.disable_compile()
        logger.info("formulas are not compiled, so activations take four times as long: %s", problem)
    return not problem


_TEMP_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
_PROBE = bytes(1 << 16)
"""About as much as a compiled formula."""


def _cache_folder() -> Path:
    """Folder of MLX's compiled formulas: below C++'s `std::filesystem::temp_directory_path()`."""
    root = next((os.environ[name] for name in _TEMP_VARIABLES if name in os.environ), "/tmp")
    return Path(root or os.devnull, "mlx", mx.__version__, "cpu")  # type: ignore[attr-defined]


def _folder_problem(folder: Path) -> str | None:
    """Why MLX cannot use this folder, and what to do; None where it can.

    MLX loads libraries from there, so it must not belong to another user either.
    """
    root = folder.parents[2]
    fix = f"set {_TEMP_VARIABLES[0]} to a folder of your own"
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


def _compiler_problem() -> str | None:
    """What goes wrong when MLX compiles a formula; None where it succeeds."""
    try:
        mx.eval(
            mx.compile(lambda x, y: x * y + 1)(mx.zeros((2,)), mx.zeros((2,)))
        )  # MLX compiles from two operations on
    except RuntimeError as error:
        return " ".join(str(error).split())[:300]
    return None
