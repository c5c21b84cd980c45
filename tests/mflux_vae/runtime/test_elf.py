"""Reading and writing a loaded library's table of functions, where nothing can break."""

from __future__ import annotations

import ctypes
import sys

import mlx.core as mx
import pytest

from mflux_vae.runtime import device, process
from mflux_vae.runtime.elf import address_of, rebind, slots

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or device.blas is None, reason="needs Linux and a BLAS that was opened for MLX"
)


@pytest.fixture
def libmlx() -> ctypes.CDLL:
    return process.libmlx(mx)


@pytest.fixture
def blas() -> ctypes.CDLL:
    return ctypes.CDLL(str(device.blas))


def test_names_and_places_of_imported_functions(libmlx: ctypes.CDLL) -> None:
    found = dict(slots(libmlx, "cblas_"))
    assert "cblas_sgemm" in found and all(name.startswith("cblas_") for name in found)
    assert len(set(found.values())) == len(found)


def test_binding_again_to_the_same_library_changes_nothing(libmlx: ctypes.CDLL, blas: ctypes.CDLL) -> None:
    a = mx.arange(6.0).reshape(2, 3)
    before = (a @ a.T).tolist()
    assert rebind(libmlx, "cblas_", blas) == len(list(slots(libmlx, "cblas_"))) > 0
    for name, slot in slots(libmlx, "cblas_"):
        assert ctypes.c_uint64.from_address(slot).value == address_of(blas, name)
    assert (a @ a.T).tolist() == before


def test_nothing_is_bound_that_is_not_imported_or_not_offered(libmlx: ctypes.CDLL, blas: ctypes.CDLL) -> None:
    assert rebind(libmlx, "no_such_function_", blas) == 0

    class Empty:
        """A library without functions."""

    assert rebind(libmlx, "cblas_", Empty()) == 0  # type: ignore[arg-type]
