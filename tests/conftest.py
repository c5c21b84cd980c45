"""What tests of several folders share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import huggingface_hub.constants
import mlx.core as mx
import pytest

from mflux_vae import cli
from tests.helpers import gpu_branch as branch

# products in full float32 on an M5 and on NVIDIA's cards, for comparisons
os.environ.setdefault("MLX_ENABLE_TF32", "0")

PARITY = Path(__file__).parent / "parity"
"""Folder of all tests with the marker `parity`."""

Run: TypeAlias = Callable[..., tuple[int, str, str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--as-gpu", nargs="?", const="bfloat16", choices=list(branch.DTYPES), help=branch.HELP)


def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setattr(os, "fsync", lambda _: None)  # files of tests need not survive a power failure
    if chosen := config.getoption("as_gpu"):
        branch.force(patch, dtype=branch.DTYPES[chosen])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import test files that a session leaves out."""
    if not collection_path.name.startswith("test_") or _in_session(collection_path, config):
        return None
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out files that the command line names, too."""
    chosen = [item for item in items if _in_session(item.path, config)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _in_session(path: Path, config: pytest.Config) -> bool:
    """Whether a session may run tests of a file."""
    if config.getoption("as_gpu"):
        return branch.in_share(path)
    if (marks := config.getoption("markexpr")) == "parity":
        return PARITY in path.parents
    return path.name != branch.ALONE and not ("not parity" in marks and PARITY in path.parents)


def pytest_collection_finish() -> None:
    """Exempt modules and test items from garbage collection: a third of a second in every training run otherwise.

    Versions of Hypothesis before 6.140 take the frozen generator of NumPy for one that is not referred to.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def gpu_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """This test runs the code for Metal and CUDA, with bfloat16 as the default."""
    branch.force(monkeypatch)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Compilation of the formulas for GPUs takes a minute on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def gpu_dtype(pytestconfig: pytest.Config) -> mx.Dtype:
    """The default dtype of a session with `--as-gpu`."""
    return branch.DTYPES[pytestconfig.getoption("as_gpu")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """``mflux-vae`` in this process: arguments -> exit status, standard output, standard error."""

    def main(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return main


@pytest.fixture
def hub_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client keeps all that it keeps in this folder: files, tokens, what it notes of the hub."""
    constants, home = huggingface_hub.constants, tmp_path_factory.mktemp("hub")
    usual = constants.HF_HOME
    for name, value in vars(constants).items():
        if isinstance(value, str) and value.startswith(usual):
            monkeypatch.setattr(constants, name, str(home) + value.removeprefix(usual))
    return home
