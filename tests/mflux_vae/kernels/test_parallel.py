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
