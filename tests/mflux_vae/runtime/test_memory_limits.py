"""Limits of MLX's memory during a run, on devices that are played."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae.runtime import device, memory_limits
from mflux_vae.runtime.memory_limits import DEFAULT_CACHE, LEAST_CACHE, WIRED_MARGIN, free_bytes, limited
from mflux_vae.tiling.plan import available_bytes

GB = 1 << 30
MAC = {"max_recommended_working_set_size": 24 * GB, "memory_size": 32 * GB}


class FakeLimits(SimpleNamespace):
    """Stands for MLX's limits, which return the one before."""

    cache, wired = 23 * GB, 0

    def set_cache_limit(self, limit: int) -> int:
        before, self.cache = self.cache, limit
        return before

    def set_wired_limit(self, limit: int) -> int:
        before, self.wired = self.wired, limit
        return before


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> FakeLimits:
    fake = FakeLimits()
    for name in ("set_cache_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, getattr(fake, name))
    return fake


def play(monkeypatch: pytest.MonkeyPatch, kind: str, info: dict[str, Any], *, active: int = 0, cached: int = 0) -> None:
    monkeypatch.setattr(device._assumed, "cpu", kind == "cpu")
    monkeypatch.setattr(device, "kind", lambda: kind)
    monkeypatch.setattr(mx, "device_info", lambda *_: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: active)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: cached)


@pytest.mark.parametrize(
    ("kind", "peak", "work", "cache", "wired"),
    [
        ("mac", 16 * GB, 3 * GB, 3 * GB, 16 * GB + WIRED_MARGIN),
        ("mac", 40 * GB, 3 * GB, 3 * GB, 24 * GB),
        ("mac", 2 * GB, GB // 8, LEAST_CACHE, 0),
        ("mac", None, None, DEFAULT_CACHE, 0),
        ("cuda", 16 * GB, 3 * GB, 3 * GB, 0),
        ("cpu", 16 * GB, 3 * GB, 23 * GB, 0),
    ],
)
def test_a_run_has_limits_that_are_restored(
    limits: FakeLimits, monkeypatch: pytest.MonkeyPatch, kind: str, peak: int, work: int, cache: int, wired: int
) -> None:
    play(monkeypatch, kind, MAC)
    with pytest.raises(KeyError), limited(peak=peak, work=work):
        assert (limits.cache, limits.wired) == (cache, wired)
        raise KeyError
    assert (limits.cache, limits.wired) == (23 * GB, 0)


def test_a_stricter_host_keeps_its_limits(limits: FakeLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "mac", MAC)
    limits.cache, limits.wired = GB // 2, 20 * GB
    with limited(peak=16 * GB, work=3 * GB), limited():
        assert (limits.cache, limits.wired) == (GB // 2, 20 * GB)
    assert (limits.cache, limits.wired) == (GB // 2, 20 * GB)


def test_memory_that_other_programs_use_counts_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = memory_limits._CUDA_RESERVE
    card = {"total_memory": 20 * GB, "free_memory": 6 * GB}
    play(monkeypatch, "cuda", card, active=GB, cached=2 * GB)
    assert free_bytes() == available_bytes() == 8 * GB - reserve
    play(monkeypatch, "cuda", {**card, "free_memory": 20 * GB}, active=GB)
    assert free_bytes() == 18 * GB - reserve, "MLX allocates no more than 95 %"
    play(monkeypatch, "cuda", {**card, "free_memory": 0})
    assert free_bytes() == 0
    play(monkeypatch, "mac", MAC, active=GB, cached=2 * GB)
    assert free_bytes() == available_bytes() == 23 * GB
