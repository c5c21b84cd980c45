"""Each text of MLX's devices becomes one line with a cure; other errors stay as they are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import DeviceError, SettingsError
from mflux_vae.images import save_image
from mflux_vae.runtime.device_errors import device_error, device_errors
from mflux_vae.utils.arrays import flaw, one_colour
from mflux_vae.utils.console import run_command
from mflux_vae.vae import VAE
from tests.conftest import Run
from tests.mflux_vae.small_models import small_kl

METAL = "[METAL] Command buffer execution failed: "
TOO_LARGE = "bytes which is greater than the maximum allowed buffer size of 9534832640 bytes."
OUT_OF_MEMORY = (
    METAL + "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    f"[metal::malloc] Attempting to allocate 12884901888 {TOO_LARGE}",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 4294967296 bytes.",
    "[malloc_or_wait] Unable to allocate 4294967296 bytes.",
    "[conv] A single unfolding row needs 99 bytes, which exceeds the maximum Metal buffer size of 9 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "cudaMalloc(&data, size) failed: out of memory",
    "cudaMallocManaged(&data, size) failed: out of memory",
    "cudaMallocHost(&data, size) failed: out of memory",
    "cudaGraphInstantiate(&handle_, graph, nullptr, nullptr, 0) failed: out of memory",
    "cudaGraphLaunch(graph_exec, stream()) failed: out of memory",
    "cublasLtMatmul(handle_, desc, alpha, a) failed with code: 3.",
    "graph.build() failed: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.",
    "std::bad_alloc",
)
"""As in MLX's sources, with numbers filled in."""

OTHERS = {
    "Cache thrashing is happening, please set the environment variable MLX_CUDA_CONV_CACHE_SIZE to a larger value than"
    " 128 to fix degraded performance.": "MLX_CUDA_CONV_CACHE_SIZE=1280",
    "Failed to load compiled copy_gg kernel: .": "delete the folder {kernels}",
    "cuModuleGetFunction(&kernel, module_, mangled.c_str()) failed: named symbol not found": "delete the folder",
    "cudaGraphLaunch(graph_exec, stream()) failed: no kernel image is available for execution on the device": "install",
    "Failed to compile kernel: default_program(9): error: no cuda_bf16.h\n1 error detected.": "CUDA_HOME",
    "Can not find locations of CUDA headers, please set environment variable CUDA_HOME or CUDA_PATH.": "CUDA_HOME",
    "cudaGetDeviceCount(&count) failed: CUDA driver version is insufficient for CUDA runtime version": "driver",
    "[metal::load_device] No Metal device available. This typically occurs in headless sessions.": "log in",
    "cudaSetDevice(device_) failed: no CUDA-capable device is detected": "use a CPU",
    "graph.prepare() failed: [cudnn_frontend] Error: No valid execution plans built..": "MLX_CUDA_USE_CUDNN_SDPA=0",
    "graph->encode_capturing( encoder, {{'x', x}}) failed: CUDNN_STATUS_EXECUTION_FAILED.": "cuDNN",
    METAL + "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).": "macOS stopped",
    METAL + "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).": "draw",
    METAL + "Insufficient Permission (to submit GPU work from background) (00000006:kIOGPUCommandBufferCallbackError"
    "BackgroundExecutionNotPermitted).": "logged in",
    METAL
    + "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).": "GPU",
    METAL + "Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault).": "restart",
    "[metal::Device] Unable to load kernel steel_gemm\n": "install MLX again",
    "Failed to load the default metallib. This library is using language version 4.0.": "install MLX again",
    "cudaEventSynchronize(event_) failed: an illegal memory access was encountered": "nvidia-smi",
    "cudaStreamSynchronize(stream_) failed: unspecified launch failure": "nvidia-smi",
    "cublasLtMatmul(handle_, desc, alpha, a) failed with code: 13.": "nvidia-smi",
    "cuLaunchKernel(func, 1, 1) failed: uncorrectable ECC error encountered": "nvidia-smi",
}
"""Text of MLX -> a part of the cure."""


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_out_of_memory(text: str) -> None:
    found = device_error(RuntimeError(text))
    assert found is not None and found.memory and found.exit_code == 1
    assert text.rstrip(".")[:100] in str(found) and str(found).startswith("out of memory (")


@pytest.mark.parametrize("text", OTHERS)
def test_other_failures_have_a_cure(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    found = device_error(RuntimeError(text))
    assert found is not None and not found.memory
    assert OTHERS[text].format(kernels=tmp_path) in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[matmul] Last dimension of first input with shape (2,3) must match"),
        RuntimeError("[write] Unable to write 8 bytes to file."),
        RuntimeError("[ring] Receiving failed with errno 104"),
        RuntimeError("out of memory budget of my model"),
        RuntimeError("Unable to allocate a slot"),
        RuntimeError("custom_loss(x) failed: no such layer"),
        ValueError("out of memory"),
        KeyError("x"),
    ],
)
def test_other_errors_stay(error: Exception) -> None:
    assert device_error(error) is None
    with pytest.raises(type(error)) as caught, device_errors("cure"):
        raise error
    assert caught.value is error


def test_what_a_device_error_caused_counts() -> None:
    def within(inner: Exception, outer: Exception) -> Exception:
        outer.__context__ = inner  # as if raised while `inner` is handled
        return outer

    for inner in (RuntimeError(OUT_OF_MEMORY[0]), MemoryError("no space for arrays"), DeviceError("x", memory=True)):
        outer = within(inner, ValueError("cannot sample"))
        found = device_error(outer)
        assert found is not None and found.memory
        outer.__suppress_context__ = True
        assert device_error(outer) is None
    with pytest.raises(DeviceError, match="METAL"), device_errors():
        raise KeyError("x") from RuntimeError(METAL + "x")
    assert device_error(within(RuntimeError(OUT_OF_MEMORY[0]), SettingsError("no such flag"))) is None


def test_the_innermost_cure_counts() -> None:
    inner = device_errors(lambda: "give --less")
    with pytest.raises(DeviceError) as caught, device_errors("outer"), inner, device_errors():
        raise MemoryError
    assert str(caught.value).endswith("; give --less") and "outer" not in str(caught.value)
    with pytest.raises(DeviceError, match="nvidia-smi"), device_errors("give --less"):
        raise RuntimeError("cudaGraphLaunch(x) failed: unknown error")


@pytest.mark.parametrize("debug", [None, False])
def test_a_command_prints_one_line(debug: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RuntimeError(OUT_OF_MEMORY[0])

    assert run_command("program", work, levels={"mflux_vae": logging.INFO}, debug=debug) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("program: error: out of memory (")


def test_commands_name_the_image_and_flags_that_need_less_memory(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VAE(network=small_kl()).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    save_image(tmp_path / "photo.png", noise)
    save_image(tmp_path / "white.png", np.full_like(noise, 255))
    photo, file, model = tmp_path / "photo.png", tmp_path / "file.safetensors", ("--model", tmp_path / "model")
    kind = type(small_kl())

    def failing(method: str, result: Any) -> None:
        before = getattr(kind, method)

        def call(network: Any, x: mx.array) -> Any:
            if isinstance(result, str):
                raise RuntimeError(result)
            found = before(network, x)
            return found * result if method == "decode" else type(found)(found.mean * result, found.logvar)

        monkeypatch.setattr(kind, method, call)

    for result, words in ((OUT_OF_MEMORY[3], "--tiling exact"), (0.0, "same value"), (float("nan"), "NaN")):
        failing("encode", result)
        status, _, err = run("encode", photo, "--output", file, *model)
        monkeypatch.undo()
        assert (status, err.count("\n"), file.exists()) == (1, 1, False) and "photo.png" in err and words in err
    assert run("encode", photo, tmp_path / "white.png", "--output", file, *model)[0] == 0
    failing("decode", float("nan"))
    status, _, err = run("decode", file, "--output", tmp_path / "pngs")
    assert status == 1 and "photo.png" in err and "NaN" in err and not (tmp_path / "pngs" / "photo.png").exists()
    failing("decode", OUT_OF_MEMORY[6])
    status, _, err = run("reconstruct", photo, *model, "--tiling", "exact")
    assert status == 1 and "--tile 256" in err and "--tiling blend" in err


def test_flaws_of_arrays() -> None:
    assert flaw(mx.array([1.0, float("inf")])) == flaw(mx.array([1.0, float("nan")])) == "NaN or infinite values"
    assert flaw(mx.zeros((2, 3), mx.bfloat16)) == "the same value everywhere"
    assert flaw(mx.zeros((2, 3)), varies=False) is None and flaw(mx.zeros((1, 1))) is None
    assert flaw(mx.array([[1.0, 2.0], [1.0, 2.0]])) is None  # plain, with two channels
    white = np.full((4, 4, 3), 250, np.uint8)
    assert one_colour(white) and not one_colour(np.where(np.eye(4)[..., None] > 0, white // 2, white))
