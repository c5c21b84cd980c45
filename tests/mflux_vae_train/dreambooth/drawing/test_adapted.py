"""A pipeline of small real parts draws with an adapter at any scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.data.sampling import sample_images
from mflux_vae_train.dreambooth.drawing import adapted as room
from mflux_vae_train.dreambooth.drawing.adapted import open_adapted
from mflux_vae_train.dreambooth.drawing.source import LAST, Source
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.quantization import QuantizedLinear
from mflux_vae_train.randomness import Stream, sample_keys
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, small_pipeline

PROMPT = "a photo of sks dog"
PATTERNS = ["*attn.to_q", "*attn.to_v", "*q_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("model")
    small_pipeline(root / "tokenizers", recommended=RECOMMENDED).save_pretrained(root / "base", "float32")
    return root / "base"


def networks(pipeline: FluxPipeline, *, text: bool) -> dict:
    return {"transformer": pipeline.denoiser} | (pipeline.text_encoders_to_train() if text else {})


@pytest.fixture
def adapter(model, tmp_path):
    """Writes an adapter of random values, and returns its file."""

    def write(seed: int = 0, *, text: bool = False, dora: bool = False) -> Path:
        trained = networks(FluxPipeline.from_pretrained(model), text=text)
        for network in trained.values():
            lora.add_lora(network, PATTERNS, rank=2, alpha=3.0, dora=dora, seed=seed)
            for path, layer in lora.layers(network).items():
                key = mx.random.key(seed + len(path))
                layer.lora_b = mx.random.normal(layer.lora_b.shape, key=key)
        file = tmp_path / f"{seed}.safetensors"
        lora.save_adapter(trained, file)
        return file

    return write


def source_of(model: Path, files: dict[str, Path], **changes) -> Source:
    chosen = [*files][-1]
    return Source(path="here", model=str(model), adapters=files, chosen=chosen, size=(16, 32), steps=2, **changes)


def directly(model: Path, file: Path | None, *, text: bool, quantize: int | None = None) -> list[np.ndarray]:
    """The same image without the module under test."""
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.encode_text_in_step(text)
    if quantize:
        pipeline.quantize(quantize)
    conditioning = pipeline.encode_prompts([PROMPT, ""])
    if file is not None:
        lora.load_adapter(networks(pipeline, text=text), file)
    first = {name: rows[:1] for name, rows in conditioning.items()}
    options = {"size": (16, 32), "steps": 2, "guidance": RECOMMENDED.guidance}
    return sample_images(pipeline, first, sample_keys(5, Stream.PREVIEW, 0, range(1)), ["a"], **options)


@pytest.mark.parametrize(
    "how", [{}, {"text": True, "dora": True}, {"quantize": 8}], ids=["lora", "text encoder, dora", "quantized"]
)
def test_adapters_and_scales_change_without_opening_the_model_again(how, model, adapter, monkeypatch) -> None:
    how = dict(how)
    quantize, text = how.pop("quantize", None), how.get("text", False)
    files = {"2": adapter(1, **how), LAST: adapter(2, **how)}
    adapted = open_adapted(source_of(model, files, quantize=quantize))
    monkeypatch.setattr(room, "open_pipeline", None)
    encoded = adapted.encode([PROMPT])

    def drawn(label: str, scale: float) -> list[np.ndarray]:
        with adapted.using(label, scale) as pipeline:
            assert pipeline is adapted.pipeline
            return adapted.draw(encoded, PROMPT, seed=5)

    expected = {label: directly(model, file, text=text, quantize=quantize) for label, file in files.items()}
    base = directly(model, None, text=text, quantize=quantize)
    assert not np.array_equal(expected["2"], expected[LAST]) and not np.array_equal(base, expected[LAST])
    np.testing.assert_array_equal(drawn(LAST, 0), base)
    np.testing.assert_array_equal(drawn("2", 1), expected["2"])
    half = drawn("2", 0.5)
    np.testing.assert_array_equal(drawn(LAST, 1), expected[LAST])
    np.testing.assert_array_equal(drawn("2", 0), base)
    np.testing.assert_array_equal(drawn("2", 0.5), half)
    assert not np.array_equal(half, base) and not np.array_equal(half, expected["2"])
    if quantize:
        assert any(isinstance(layer, QuantizedLinear) for layer in adapted.pipeline.denoiser.modules())


def test_a_file_that_does_not_fit_is_refused_before_drawing(model, adapter, tmp_path) -> None:
    wrong, empty = tmp_path / "wrong.safetensors", tmp_path / "empty.safetensors"
    write_safetensors(wrong, {"transformer.nothing.lora_A.weight": mx.zeros((2, 4))})
    write_safetensors(empty, {})
    for file in (wrong, empty):
        with pytest.raises(WeightsError, match=file.name):
            open_adapted(source_of(model, {LAST: file}))
    adapted = open_adapted(source_of(model, {"2": wrong, LAST: (good := adapter())}))
    encoded = adapted.encode([PROMPT])
    with pytest.raises(WeightsError), adapted.using("2"):
        raise AssertionError
    with adapted.using(LAST):
        np.testing.assert_array_equal(adapted.draw(encoded, PROMPT, seed=5), directly(model, good, text=False))


def test_what_the_pipeline_cannot_do_is_refused(model, monkeypatch) -> None:
    source = Source(path="here", model=str(model))
    with pytest.raises(SettingsError, match=r"--size.*16"):
        open_adapted(replace(source, size=(20, 16)))
    monkeypatch.setattr(room, "open_pipeline", lambda *_, **__: FakePipeline())
    for flag, value in (("quantize", 4), ("clip_skip", 1), ("negative_prompt", "blurry")):
        with pytest.raises(SettingsError, match=f"--{flag}: pipeline fake does not"):
            open_adapted(replace(source, **{flag: value}))


def test_a_model_that_is_gone_is_named_with_the_file_that_names_it(tmp_path) -> None:
    source = Source(path="run", model=str(tmp_path / "gone"), settings=tmp_path / "settings.yaml")
    with pytest.raises(SettingsError, match=r"gone.*settings\.yaml.*--model"):
        open_adapted(source)


def test_guidance_leads_away_from_a_negative_prompt(model, tmp_path) -> None:
    source = Source(path="here", model=str(model), size=(16, 16), steps=2)

    def drawn(source: Source) -> list[np.ndarray]:
        adapted = open_adapted(source)
        return adapted.draw(adapted.encode([PROMPT]), PROMPT, seed=0)

    assert not np.array_equal(drawn(replace(source, negative_prompt="a red circle")), drawn(source))
    # guidance v + g (v - u) with u = v is none
    alike = drawn(replace(source, negative_prompt=PROMPT))
    np.testing.assert_allclose(alike[0], drawn(replace(source, guidance=1.0))[0], atol=1)
    with pytest.raises(SettingsError, match="no effect"):
        open_adapted(replace(source, negative_prompt="a red circle", guidance=1.0))
    small_pipeline(tmp_path / "t", True, recommended=RECOMMENDED).save_pretrained(tmp_path / "dev", "float32")
    with pytest.raises(SettingsError, match="no effect"):
        open_adapted(replace(source, model=str(tmp_path / "dev"), negative_prompt="a red circle"))
