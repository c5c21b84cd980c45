"""Several threads: programs that end with status 0 and compute what one thread does, and the parts they rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import VAE, ImageError
from mflux_vae.errors import InputError
from mflux_vae.runtime.threads import portable, thread_safe
from tests.helpers.thread_programs import in_thread

ATTEMPTS = {"thread_at_exit": 5}
"""What goes wrong while a process exits does not always happen."""


@pytest.mark.parametrize(
    "program",
    [
        *("vae_of_main_thread", "vae_of_other_thread", "four_threads", "thread_at_exit", "compiled"),
        *("pipeline_of_main_thread", "pipeline_of_other_thread", "vae_training", "dreambooth"),
    ],
)
def test_program(program: str, tmp_path: Path) -> None:
    for attempt in range(ATTEMPTS.get(program, 1)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [sys.executable, "-m", "tests.helpers.thread_programs", program, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]


def test_portable_arrays_are_computed_in_another_thread() -> None:
    with portable():
        x = mx.random.normal((3,), key=mx.random.key(0)) + 1
    assert in_thread(x.tolist) == x.tolist()


def test_results_are_for_every_thread() -> None:
    @thread_safe
    def squares(x: mx.array) -> dict[str, list[mx.array]]:
        return {"squares": [x * x, (x + 1) * (x + 1)]}

    assert in_thread(squares, mx.array(3.0))["squares"][1].item() == 16
    assert mx.grad(lambda x: squares(x)["squares"][0])(mx.array(3.0)).item() == 6
    assert mx.compile(squares)(mx.array(3.0))["squares"][0].item() == 9


def test_an_error_in_one_thread_does_not_stop_others() -> None:
    vae = VAE.from_pretrained("tiny")
    with pytest.raises(ImageError, match="expected"):
        in_thread(vae.encode, np.zeros((1, 2, 8, 8)))
    image = mx.zeros((1, 3, 64, 64))
    with pytest.raises(InputError, match="thread"):
        in_thread(vae.encode, image)
    mx.eval(image)
    assert in_thread(vae.encode, image).tolist() == vae.encode(image).tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_thread_leaves_one_stream_behind() -> None:
    """MLX's default one; none of a BLAS library."""
    vae, image = VAE.from_pretrained("tiny"), mx.array(np.zeros((1, 3, 256, 256)))
    in_thread(vae.encode, image)
    mx.clear_cache()  # starts the system thread of every stream
    before = len(os.listdir("/proc/self/task"))
    for _ in range(5):
        in_thread(vae.encode, image)
    assert len(os.listdir("/proc/self/task")) <= before + 7  # two may still be ending
