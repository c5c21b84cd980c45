"""Where the native extension cannot be used, MLX's operations serve and one line of the log says why."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

from mflux_vae import VAE
from mflux_vae.images import save_image
from mflux_vae.kernels.cpu import extension
from mflux_vae.runtime import device
from tests.conftest import Run
from tests.mflux_vae.small_models import small_kl

ROOT = Path(__file__).parents[3]
MLX = extension.MLX


@pytest.fixture(autouse=True)
def on_linux_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that has the extension, not looked for yet."""
    monkeypatch.delenv(extension.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(extension, "MLX", extension.mx.__version__)  # type: ignore[attr-defined]
    monkeypatch.setattr(extension, "importlib", loading(extension.API))
    extension._module.cache_clear()
    with device.assuming(cpu=True):
        yield
    extension._module.cache_clear()


def loading(api: int | None) -> SimpleNamespace:
    """`importlib` that finds an extension with this API."""
    return SimpleNamespace(import_module=lambda _: SimpleNamespace(API=api))


def raising(error: ImportError) -> SimpleNamespace:
    """`importlib` whose imports fail."""
    return SimpleNamespace(import_module=Mock(side_effect=error))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda patch: patch.setenv(extension.VARIABLE, "0"), extension.VARIABLE),
        (lambda patch: patch.setattr(platform, "machine", lambda: "aarch64"), "x86-64"),
        (lambda patch: patch.setattr(sys, "platform", "darwin"), "Linux"),
        (lambda patch: patch.setattr(extension, "MLX", "0.1.0"), "mlx[cpu]==0.1.0"),
        (lambda patch: patch.setattr(extension, "importlib", raising(ModuleNotFoundError("_native"))), "g++"),
        (lambda patch: patch.setattr(extension, "importlib", raising(ImportError("lacks AVX2"))), "AVX2"),
        (lambda patch: patch.setattr(extension, "importlib", loading(extension.API - 1)), "again"),
    ],
    ids=["switched off", "ARM", "macOS", "another MLX", "not built", "not loadable", "older"],
)
def test_one_line_says_why_mlx_computes(
    change: Callable[[pytest.MonkeyPatch], None],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert extension.native() is None and extension.native() is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO and word in record.getMessage()


def test_a_command_says_so_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run) -> None:
    monkeypatch.setenv(extension.VARIABLE, "0")
    VAE(network=small_kl()).save_pretrained(tmp_path / "model")
    save_image(tmp_path / "a.png", np.zeros((16, 16, 3), np.uint8))
    status, _, err = run("reconstruct", tmp_path / "a.png", "--model", tmp_path / "model")
    assert status == 0 and err.count("MLX's operations") == 1 and f"{extension.VARIABLE} is 0" in err


def test_nothing_is_logged_with_the_extension_or_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert extension.native() is not None
        monkeypatch.setenv(extension.VARIABLE, "0")
        with device.assuming(cpu=False):
            assert extension.native() is None
    assert not caplog.records


def test_unknown_choice_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(extension.VARIABLE, "off")
    assert extension.native() is not None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "off" in record.getMessage()


def test_is_built_for_the_version_that_it_is_loaded_with() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"mlx[cpu]=={MLX};' in text and f",<={MLX};" in text


ANOTHER_MLX = """
import mlx.core
mlx.core.__version__ = "9.9.9"
try:
    from mflux_vae.kernels.cpu import _native
except ImportError as error:
    print(error)
"""


def test_refuses_another_mlx_when_it_is_loaded() -> None:
    pytest.importorskip("mflux_vae.kernels.cpu._native", exc_type=ImportError)
    done = subprocess.run([sys.executable, "-c", ANOTHER_MLX], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "9.9.9" in done.stdout


def test_is_loaded_at_first_use() -> None:
    code = """
import mflux_vae, mflux_vae_train.pipelines.tiny
from mflux_vae.kernels.cpu import extension
assert not extension._module.cache_info().misses
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
