"""MLX for CUDA: variables before its first operation, and one sentence for each way in which it cannot work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae.errors import BackendError
from mflux_vae.runtime import cuda, device


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with the wheel for CUDA 13, and none of MLX's variables."""
    install(monkeypatch, "mlx-cuda-13")
    for name in (*cuda.VARIABLES, cuda.KERNELS_VARIABLE, "MLX_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that the test's changes are undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


def install(monkeypatch: pytest.MonkeyPatch, *wheels: str) -> None:
    def version(name: str) -> str:
        if name not in wheels:
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.4"

    monkeypatch.setattr(importlib.metadata, "version", version)


def core(major: int = 8, minor: int = 9, *, count: int = 1) -> Any:
    """`mlx.core` with this card."""
    info = {
        "device_name": "NVIDIA Card",
        "architecture": f"sm_{major}{minor}",
        "compute_capability_major": major,
        "compute_capability_minor": minor,
    }
    return SimpleNamespace(
        gpu=mx.gpu, device_count=lambda kind: count, device_info=lambda kind: info, __version__="0.32.4"
    )


def test_variables_are_set_before_the_first_operation_and_those_of_the_user_win(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_CUDA_CONV_CACHE_SIZE", "7")
    monkeypatch.setenv(cuda.KERNELS_VARIABLE, "/kernels")
    cuda.prepare(core(), tune=True)
    assert os.environ.pop(cuda.KERNELS_VARIABLE) == "/kernels" and not [*tmp_path.iterdir()]
    del os.environ["MLX_CUDA_GRAPH_CACHE_SIZE"]
    assert cuda.prepare(core(), tune=False) == []
    assert cuda.KERNELS_VARIABLE not in os.environ and "MLX_CUDA_GRAPH_CACHE_SIZE" not in os.environ
    assert cuda.prepare(core(), tune=True) == []
    assert os.environ["MLX_CUDA_CONV_CACHE_SIZE"] == "7"
    assert os.environ["MLX_ENABLE_CACHE_THRASHING_CHECK"] == "0"
    assert int(os.environ["MLX_CUDA_GRAPH_CACHE_SIZE"]) > 400
    assert Path(os.environ[cuda.KERNELS_VARIABLE]).is_relative_to(tmp_path)
    monkeypatch.delenv(cuda.KERNELS_VARIABLE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cuda.prepare(core(), tune=True) == []
    assert cuda.KERNELS_VARIABLE not in os.environ


def test_compiled_kernels_are_shared_by_nobody_who_cannot_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [cuda.kernels_folder("0.32.4", "sm_89"), cuda.kernels_folder("0.32.5", "sm_89")]
    folders.append(cuda.kernels_folder("0.32.4", "sm_90"))
    monkeypatch.setenv("MLX_RANK", "1")
    folders.append(cuda.kernels_folder("0.32.4", "sm_89"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/another")
    folders.append(cuda.kernels_folder("0.32.4", "sm_89"))
    assert len({*folders}) == 5 and folders[-1].is_relative_to("/home/another/.cache")


def test_several_back_ends_give_one_warning_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.conflict() is None
    install(monkeypatch, "mlx-cpu")
    assert cuda.conflict() is None
    for both in (("mlx-cpu", "mlx-cuda-12"), ("mlx-cuda-12", "mlx-cuda-13")):
        install(monkeypatch, *both)
        warning = cuda.conflict() or ""
        assert all(name in warning for name in both)
        assert f"uninstall -y {both[0]} &&" in warning and f"--no-deps {both[1]}==0.32.4" in warning


@pytest.mark.parametrize(
    ("error", "word"),
    [("libcuda.so.1: cannot open", "driver"), ("libmlx.so: cannot open", "--force-reinstall"), ("no mlx", None)],
)
def test_errors_of_the_import_name_the_cure(error: str, word: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cure = cuda.import_cure(error)
    assert cure is None if word is None else word in (cure or "") and "[cpu]" in (cure or "")
    install(monkeypatch, "mlx-cpu")
    assert cuda.import_cure(error) is None


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({}, "nvidia-smi"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES"),
        ({"CUDA_VISIBLE_DEVICES": "1", "MLX_RANK": "1"}, "mlx.launch"),
    ],
)
def test_without_a_gpu_the_error_says_why(
    variables: dict[str, str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=word):
        cuda.prepare(core(count=0), tune=True)


@pytest.mark.parametrize(
    ("card", "word"), [((7, 5), "bfloat16"), ((8, 0), None), ((9, 0), None), ((10, 3), "kernels"), ((12, 0), None)]
)
def test_cards_that_cannot_do_all_are_named(
    card: tuple[int, int], word: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings = cuda.prepare(core(*card), tune=False)
    assert [word in text and "NVIDIA Card" in text for text in warnings if word] == ([True] if word else [])
    install(monkeypatch)  # built from its source
    assert not cuda.prepare(core(*card), tune=False)


@pytest.mark.parametrize("card", [(7, 0), (6, 1)])
def test_cards_without_kernels_are_refused(card: tuple[int, int]) -> None:
    with pytest.raises(BackendError, match="kernels"):
        cuda.prepare(core(*card), tune=False)


def test_windows_subsystem_for_linux_gets_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    (warning,) = cuda.prepare(core(), tune=False)
    assert "WSL" in warning


@pytest.mark.usefixtures("gpu_branch")
def test_cards_without_bfloat16_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: core(7, 5).device_info(mx.gpu))
    assert device.compute_dtype() == mx.float32
    assert device.compute_dtype(mx.float16) == mx.float16
    monkeypatch.setattr(mx, "device_info", lambda: core(8, 6).device_info(mx.gpu))
    assert device.compute_dtype() == mx.bfloat16


def test_the_process_is_tuned_when_the_cpu_becomes_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[object] = []
    tuned: list[object] = []
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=(chosen or [mx.gpu])[-1]))
    monkeypatch.setattr(device.process, "tunes", lambda: True)
    monkeypatch.setattr(device.process, "tune", tuned.append)
    monkeypatch.setattr(device.process, "open_blas", lambda: ("/lib/libblas.so", ""))
    monkeypatch.setattr(device, "blas", None)
    for _ in range(2):
        device.use_cpu()
    assert chosen == [mx.cpu] and tuned == [mx] and device.blas == "/lib/libblas.so"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8, mx.int64, mx.bool_])
def test_copies_are_other_arrays_of_the_same_bits(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    array = mx.array(
        [0.0, -0.0, 1.5, float("nan"), float("inf")] if mx.issubdtype(dtype, mx.floating) else [0, 1], dtype
    )
    mx.eval(array)
    assert device.copy_with_cuda(array) is array
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    copy = device.copy_with_cuda(array)
    assert copy is not array and copy.dtype == dtype and mx.array_equal(copy.view(mx.uint8), array.view(mx.uint8))
    assert memoryview(copy.view(mx.uint8)).tobytes() == memoryview(array.view(mx.uint8)).tobytes()
