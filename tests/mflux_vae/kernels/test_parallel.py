"""Chunks on several streams: which streams, and with how many threads a matrix product runs meanwhile and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from mflux_vae import kernels
from mflux_vae.kernels.cpu import parallel
from mflux_vae.runtime import device, threads
from tests.helpers import gpu_branch


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order: "one" and "all" for the threads of a product, "sync" for waiting."""
    events: list[str] = []

    @contextmanager
    def one_blas_thread() -> Iterator[None]:
        events.append("one")
        try:
            yield
        finally:
            events.append("all")

    whole = mx.synchronize

    def synchronize(*stream: mx.Stream) -> None:
        events.append("sync")
        whole(*stream)

    monkeypatch.setattr(device, "cores", lambda: 2)
    monkeypatch.setattr(device, "one_blas_thread", one_blas_thread)
    monkeypatch.setattr(mx, "synchronize", synchronize)
    return events


def test_products_use_all_cores_while_a_caller_has_the_results(limits: list[str]) -> None:
    results = kernels.run_parallel(lambda n=n: mx.array(n) + 1 for n in range(5))
    assert int(next(results)) == 1 and limits == ["sync", "one", "all"]
    kept = [int(result) for result in results]
    assert kept == [2, 3, 4, 5] and limits[-1] == "all" and limits.count("one") == limits.count("all") == 3


def test_products_use_all_cores_after_an_error(limits: list[str]) -> None:
    def fails() -> mx.array:
        raise RuntimeError("chunk")

    with pytest.raises(RuntimeError, match="chunk") as error:
        parallel.fill_parallel(mx.zeros(2), [(0, fails), (1, fails)])
    assert error.value.__traceback__ is not None and limits[-1] == "all"


def test_running_products_end_before_the_number_of_threads_changes(
    limits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_branch.force(monkeypatch, cpu=True)  # elsewhere nothing is waited for
    with kernels.overlapping():
        assert limits == ["sync", "one"]
    assert limits[-2:] == ["sync", "all"]


def test_chunks_run_on_the_current_default_stream() -> None:
    outside = parallel._streams()
    assert outside[0] == mx.default_stream(mx.cpu)
    with threads.portable():
        assert parallel._streams()[0] == mx.default_stream(mx.cpu) != outside[0]
    assert parallel._streams() == outside
    for stream in outside[1:]:
        with mx.stream(stream):
            assert parallel._streams() == outside, "within a chunk"


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_evaluated_on_gpus(compiled: bool, gpu_branch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("evaluated")

    monkeypatch.setattr(mx, "eval", refuse)
    monkeypatch.setattr(mx, "async_eval", refuse)
    kernel, one = mx.zeros((32, 3, 3, 32)), mx.ones((32,))
    norm = 4, one, one, 1e-6

    def everything(x: mx.array) -> mx.array:
        x = kernels.norm_silu_conv2d(kernels.group_norm(x, *norm), norm, kernel, one, padding=1, residual=x)
        x = kernels.conv2d(kernels.repeat_conv2d(x, kernel, padding=1), kernel, stride=2, padding=1)
        x = kernels.batch_norm(kernels.conv_transpose2d(x, kernel), one, one, 1e-6)[0]
        x = kernels.layer_norm(kernels.rms_norm(x, one, 1e-6), one, one, 1e-6)
        for activation in (kernels.relu, kernels.silu, kernels.gelu, kernels.gelu_tanh, kernels.tanh, kernels.sigmoid):
            x = activation(x)
        x = x.reshape(2, 4, -1, 32)
        x = kernels.map_batch(lambda x: kernels.attention(x, x, x, scale=0.1), kernels.softmax(x))
        return kernels.quantized_product(x, *mx.quantize(mx.ones((64, 32)), 32, 4), group_size=32, bits=4)

    gradient = mx.grad(lambda x: everything(x).sum())
    x = mx.zeros((2, 64, 64, 32))
    assert (mx.compile(gradient) if compiled else gradient)(x).shape == x.shape
