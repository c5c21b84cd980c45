"""A fast BLAS whichever package is imported first, one warning where there is none, float32 on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import kernels
from mflux_vae.runtime import device, process

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not device.is_cpu(), reason="a BLAS is opened for MLX on a Linux CPU only"
)
with_blas = pytest.mark.skipif(device.blas is None, reason="neither MKL nor OpenBLAS is installed")


def answer(code: str, **environment: str) -> Any:
    """What a fresh Python prints as JSON; whatever it says on stderr fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


BINDINGS = """
import {first}
import ctypes, json
import mflux_vae, mlx.core as mx
from mflux_vae.runtime import device, elf, process
a = mx.arange(12.0).reshape(3, 4)
product = (a @ a.T).tolist()
blas = ctypes.CDLL(device.blas)
everywhere = ctypes.CDLL(None)
print(json.dumps({{
    "product": product,
    "global": elf.address_of(everywhere, "cblas_sgemm") == elf.address_of(blas, "cblas_sgemm"),
    "bound": {{
        name: ctypes.c_uint64.from_address(slot).value == elf.address_of(blas, name)
        for name, slot in elf.slots(process.libmlx(mx), "cblas_")
    }},
    "cache": mx.set_cache_limit(0),
}}))
"""


@with_blas
@pytest.mark.parametrize("first", ["mflux_vae", "mlx.core"])
def test_matrix_products_go_to_the_fast_blas(first: str) -> None:
    found = answer(BINDINGS.format(first=first))
    assert found["global"]
    assert found["bound"]["cblas_sgemm"] and all(found["bound"].values())
    a = np.arange(12.0).reshape(3, 4)
    assert found["product"] == (a @ a.T).tolist()
    assert found["cache"] > 64 * 2**20


WARNINGS = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mflux_vae, mflux_vae.runtime.device
    import mlx.core as mx
vae = mflux_vae.VAE(network=mflux_vae.PlainAutoencoder(mflux_vae.PlainConfig(channels=(2, 2, 2, 2))))
shape = vae.decode(vae.encode(mx.zeros((1, 3, 16, 8)))).shape
print(json.dumps([[[w.category.__name__, str(w.message)] for w in caught], mflux_vae.runtime.device.blas, shape]))
"""


@pytest.mark.parametrize("choice", ["none", "/no/such/library.so"])
def test_without_a_blas_one_warning_names_the_cure_and_all_works(choice: str) -> None:
    caught, blas, shape = answer(WARNINGS, **{process.BLAS_VARIABLE: choice})
    assert blas is None and shape == [1, 3, 16, 8]
    ((category, message),) = caught
    assert category == "RuntimeWarning"
    assert f"cure: unset {process.BLAS_VARIABLE}" in message and " install " in message


@with_blas
def test_a_library_can_be_chosen_by_path() -> None:
    code = "import json, mflux_vae; print(json.dumps(mflux_vae.runtime.device.blas))"
    assert answer(code, **{process.BLAS_VARIABLE: str(device.blas)}) == device.blas


ACTIVATIONS = """
import json
import mflux_vae, mlx.core as mx
from mflux_vae import kernels
x = mx.linspace(-9, 9, 41)
print(json.dumps([kernels.silu(x).tolist(), mx.grad(lambda x: kernels.tanh(x).sum())(x).tolist()]))
"""


@pytest.mark.parametrize("compiler", ["absent", "broken", "nowhere to write"])
def test_without_a_working_compiler_results_are_the_same(compiler: str, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sh").symlink_to("/bin/sh")
    if compiler != "absent":
        # answers when asked for its version, and fails at anything else
        (programs / "g++").write_text('#!/bin/sh\n[ "$1" = --version ]\n')
        (programs / "g++").chmod(0o755)
    temporary = tmp_path / "tmp"
    if compiler == "nowhere to write":
        temporary.write_text("not a folder")
    else:
        temporary.mkdir()
    silu, slope = answer(ACTIVATIONS, PATH=str(programs), TMPDIR=str(temporary))
    x = mx.linspace(-9, 9, 41)
    np.testing.assert_allclose(silu, kernels.silu(x), atol=1e-6)
    np.testing.assert_allclose(slope, mx.grad(lambda x: kernels.tanh(x).sum())(x), atol=1e-6)


def test_a_cpu_computes_in_float32_and_others_in_what_is_asked_for(request: pytest.FixtureRequest) -> None:
    assert device.compute_dtype() == device.compute_dtype(mx.float16) == mx.float32
    request.getfixturevalue("gpu_branch")
    assert device.compute_dtype() == mx.bfloat16
    assert device.compute_dtype(mx.float16) == mx.float16


def test_memory_is_what_the_machine_or_its_container_has() -> None:
    assert 2**28 < process.memory_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
