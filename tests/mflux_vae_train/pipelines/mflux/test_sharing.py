"""Arrays of a host in networks of ours: shared, quantized or not; what cannot be shared is refused."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import PluginError, SettingsError, WeightsError
from mflux_vae_train.pipelines import mflux
from mflux_vae_train.pipelines.footprint import Workload
from mflux_vae_train.pipelines.mflux.sharing import Shared, nbytes
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.pipelines.mflux.fake_host import LoRALinear, fake_host


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_networks_hold_the_very_arrays_of_the_host(tmp_path, monkeypatch, bits) -> None:
    host = fake_host(tmp_path, monkeypatch, bits)
    theirs = {id(array) for _, array in tree_flatten(host.model.parameters())}
    before = host.state()
    for part in host.pipeline.parts.networks.values():
        assert {id(array) for _, array in tree_flatten(part.get().parameters())} <= theirs
    quantized = [layer for layer in host.pipeline.denoiser.modules() if isinstance(layer, nn.QuantizedLinear)]
    assert bool(quantized) == bool(bits) and all((layer.group_size, layer.bits) == (32, bits) for layer in quantized)
    assert host.state() == before


def test_a_quantized_embedding_is_kept_or_dequantized() -> None:
    host = nn.Module()
    host.kept, host.other = nn.Embedding(8, 64), nn.Embedding(8, 64)
    nn.quantize(host)
    ours = nn.Module()
    ours.kept, ours.other = nn.Embedding(8, 64), nn.Embedding(8, 64)
    network = Shared(lambda: ours, host, embeddings=["kept"]).get()
    ids = mx.array([3, 0, 7])
    assert network.kept.weight is host.kept.weight and not isinstance(network.other, nn.QuantizedEmbedding)
    for name in ("kept", "other"):
        assert mx.array_equal(network[name](ids), host[name](ids)).item()


def test_an_estimate_counts_the_whole_host_in_every_phase(tmp_path, monkeypatch) -> None:
    work = Workload(resolution=32, trained=1000, class_images=2)
    host = fake_host(tmp_path, monkeypatch)
    phases = host.pipeline.footprint(work).phases
    assert all(phase.weights >= nbytes(host.model) for phase in phases)
    smaller = fake_host(tmp_path, monkeypatch, 4).pipeline.footprint(work)
    assert smaller.peak < host.pipeline.footprint(work).peak


def test_a_host_with_an_adapter_or_other_weights_is_refused() -> None:
    host = nn.Module()
    host.layer = LoRALinear.from_linear(nn.Linear(4, 4), 2, 1.0)
    host.layer.lora_A = mx.zeros((4, 2))
    with pytest.raises(SettingsError, match="adapter"):
        Shared(nn.Module, host)
    with pytest.raises(WeightsError, match="missing"):
        Shared(lambda: nn.Linear(4, 4), nn.Module()).get()


def test_other_objects_pass_and_unknown_classes_of_mflux_are_refused(monkeypatch, caplog) -> None:
    pipeline = FakePipeline()
    assert mflux.as_pipeline(pipeline) is pipeline

    def model(name: str) -> nn.Module:
        return type(name, (nn.Module,), {"__module__": "mflux.models.of.a.release"})()

    with pytest.raises(PluginError, match="ZImage"):
        mflux.as_pipeline(model("Krea2"))
    monkeypatch.setattr(
        mflux, "import_module", lambda _: type("_", (), {"wrap": staticmethod(lambda model: "wrapped")})
    )
    for release, count in (("0.24.3", 0), ("0.31.0", 1)):
        monkeypatch.setattr(mflux, "version", lambda _, release=release: release)
        assert mflux.as_pipeline(model("Flux1")) == "wrapped"
        assert len(caplog.records) == count
