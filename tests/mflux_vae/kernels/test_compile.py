"""`kernels.cpu.compile` traces once for each shape, and changes nothing for functions that others compile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mflux_vae.kernels import native
from mflux_vae.kernels.cpu.compile import compile

pytestmark = pytest.mark.skipif(native() is None, reason="needs the native extension")


def formula(x: mx.array) -> mx.array:
    return mx.exp(x) * 2 + x


def is_fused(function: Callable[[mx.array], mx.array], folder: Path) -> bool:
    mx.export_to_dot(str(folder / "graph.dot"), function(mx.ones(3)))
    return "Compiled" in (folder / "graph.dot").read_text()


def traces(*shapes: int) -> int:
    """How often a function is traced that is called with arrays of these shapes."""
    count = 0

    def function(x: mx.array) -> mx.array:
        nonlocal count
        count += 1
        return formula(x)

    compiled = compile(function)
    for shape in shapes:
        mx.eval(compiled(mx.ones(shape)))
    return count


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles nothing without g++")
def test_each_shape_is_traced_once_and_not_fused(tmp_path: Path) -> None:
    assert traces(3, 3, 4, 3, 4) == 2
    assert not is_fused(compile(formula), tmp_path)


@pytest.mark.usefixtures("uncompiled")
def test_compilation_stays_disabled() -> None:
    assert traces(3, 3) == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles nothing without g++")
def test_compilation_that_is_disabled_later_stays_disabled(tmp_path: Path) -> None:
    ours = compile(formula)
    mx.eval(ours(mx.ones(3)))
    mx.disable_compile()
    try:
        mx.eval(ours(mx.ones(3)))
        assert not is_fused(mx.compile(formula), tmp_path)
    finally:
        mx.enable_compile()


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles nothing without g++")
def test_other_functions_are_still_fused(tmp_path: Path) -> None:
    def failing(_: mx.array) -> mx.array:
        raise RuntimeError("not traced")

    with pytest.raises(RuntimeError, match="traced"):
        compile(failing)(mx.ones(3))
    assert is_fused(mx.compile(formula), tmp_path)
