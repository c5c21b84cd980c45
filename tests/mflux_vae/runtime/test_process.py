"""What importing the package changes in the process, and the error where MLX cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mflux_vae.runtime import device, process

ROOT = Path(__file__).parents[3]

tuned = pytest.mark.skipif(
    sys.platform != "linux" or not device.is_cpu(), reason="only a process on a Linux CPU is changed"
)

STATE = """
import json, os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mflux_vae
from mflux_vae.runtime import device
variables = {name: os.environ.get(name) for name in ("KMP_BLOCKTIME", "MLX_BFS_MAX_WIDTH")}
print(json.dumps({**variables, "blas": device.blas, "cache": device.mx.set_cache_limit(0), "caught": len(caught)}))
"""


def run(*command: object, path: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds packages in `path` first; without the variables of this one that tune it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("KMP_BLOCKTIME", "MLX_BFS_MAX_WIDTH")}
    variables = {**kept, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]), **changes}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120
    )


def state(path: Path = ROOT, **changes: str) -> dict[str, Any]:
    done = run("-c", STATE, path=path, **changes)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@tuned
def test_one_variable_leaves_the_process_as_it_is() -> None:
    changed, left = state(), state(**{process.TUNE_VARIABLE: "0"})
    assert changed["KMP_BLOCKTIME"] == "0" and changed["MLX_BFS_MAX_WIDTH"] is None
    assert changed["blas"] == device.blas and changed["cache"] > 64 << 20
    assert left == {"KMP_BLOCKTIME": None, "MLX_BFS_MAX_WIDTH": None, "blas": None, "cache": 32 << 20, "caught": 0}


@tuned
def test_variables_of_the_user_win() -> None:
    found = state(KMP_BLOCKTIME="7", MLX_BFS_MAX_WIDTH="30")
    assert (found["KMP_BLOCKTIME"], found["MLX_BFS_MAX_WIDTH"]) == ("7", "30")


@tuned
def test_a_cuda_build_without_a_gpu_gets_a_blas_after_the_import(tmp_path: Path) -> None:
    folder = tmp_path / "mlx_cuda_13-0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.0\n")
    found = state(path=tmp_path)
    assert found["blas"] == device.blas and found["caught"]  # the warning of several back ends


CUDA = """
import mlx.core as mx
mx.cuda.is_available, mx.device_count = (lambda: True), (lambda kind: {count})
card = {{"architecture": "sm_89", "compute_capability_major": 8, "compute_capability_minor": 9}}
mx.device_info = lambda *_: card
import mflux_vae
from mflux_vae.cli import main
print(os.environ.get("MLX_CUDA_CONV_CACHE_SIZE"), os.environ.get("MLX_PTX_CACHE_DIR"))
sys.exit({count} or main(["info", "sd1"]))
"""


@pytest.mark.parametrize(("count", "tune"), [(1, "1"), (1, "0"), (0, "1")])
def test_mlx_for_cuda_is_prepared_though_it_was_imported_before(count: int, tune: str, tmp_path: Path) -> None:
    code = "import os, sys\n" + CUDA.format(count=count)
    variables = {process.TUNE_VARIABLE: tune, "XDG_CACHE_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = run("-c", code, **variables)
    set_to, folder, *_ = done.stdout.split()
    if count and tune == "1":
        assert set_to == "1024" and folder.startswith(str(tmp_path)) and "sm_89" in folder
    else:
        assert (set_to, folder) == ("None", "None")
    assert done.returncode == (count or 2)
    if not count:
        (line,) = done.stderr.splitlines()
        assert "CUDA_VISIBLE_DEVICES" in line and "pip install" in line


def test_the_oldest_mlx_is_that_of_the_package() -> None:
    assert f'"mlx>={process.OLDEST_MLX}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


ABSENT = "raise ImportError('libmlx.so: cannot open shared object file')"
COMMANDS = {
    "mflux_vae.cli": ["info", "sd1"],
    "mflux_vae_train.dreambooth.cli": ["--model", "tiny", "--instance_data_dir", ".", "--instance_prompt", "a dog"],
}


@pytest.fixture(params=[(ABSENT, "cpu"), ("__version__ = '0.31.2'", process.OLDEST_MLX)], ids=["none", "old"])
def broken_mlx(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder with an `mlx` that does not serve, and a word of the error."""
    core, word = request.param
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text(core)
    (tmp_path / "mlx" / "utils.py").write_text("tree_flatten = None")
    return tmp_path, word


@pytest.mark.parametrize("module", COMMANDS)
def test_without_a_back_end_commands_exit_with_one_line(module: str, broken_mlx: tuple[Path, str]) -> None:
    path, word = broken_mlx
    done = run("-m", module, *COMMANDS[module], path=path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and "MLX" in line and word in line and "pip install" in line


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["encode", "--help"]])
@pytest.mark.parametrize("module", COMMANDS)
def test_help_needs_no_back_end(module: str, arguments: list[str], broken_mlx: tuple[Path, str]) -> None:
    path, _ = broken_mlx
    done = run("-m", module, *arguments[-1 if module != "mflux_vae.cli" else 0 :], path=path)
    assert done.returncode == 0 and "usage" in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "code", ["import mflux_vae; mflux_vae.SettingsError; mflux_vae.VAE", "import mflux_vae_train.plugin"]
)
def test_without_a_back_end_the_package_says_so(code: str, broken_mlx: tuple[Path, str]) -> None:
    path, word = broken_mlx
    done = run("-c", code, path=path)
    assert done.returncode == 1
    assert "BackendError" in done.stderr.splitlines()[-1] and word in done.stderr.splitlines()[-1]
