"""Parts that are loaded on first use, from several threads."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.runtime.threads import exclusive
from mflux_vae_train.pipelines.loading.lazy import Lazy
from tests.helpers.thread_programs import in_thread


def test_other_threads_compute_during_a_download() -> None:
    computed = []

    def compute() -> None:
        with exclusive():
            computed.append(int(mx.array(2) + 1))

    part = Lazy(lambda: computed[:], prepare=lambda: in_thread(compute))
    assert part.get() == [3] and part.get() == [3], "prepared once"
    part.release()
    assert part.fingerprint(str) == "[3, 3]" and part.loaded is None


def test_a_loaded_part_is_not_prepared() -> None:
    part = Lazy(loaded=5, prepare=lambda: 1 / 0)
    assert part.get() == 5 and part.fingerprint(str) == "5"
