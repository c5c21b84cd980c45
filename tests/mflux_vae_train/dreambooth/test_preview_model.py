"""--preview_model: another pipeline draws class images and previews for the trained one."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.images import load_image
from mflux_vae_train import lora
from mflux_vae_train.dreambooth import preview_model
from mflux_vae_train.dreambooth.data.sampling import sample_images
from mflux_vae_train.dreambooth.planning.drawn_footprint import DrawnWorkload, footprint_of
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.pipelines.quantization import QuantizedLinear
from mflux_vae_train.randomness import Stream, sample_keys
from tests.contracts.fake import FakeDenoiser, FakePipeline
from tests.mflux_vae_train.dreambooth.planning.test_memory_estimate import Weighed
from tests.mflux_vae_train.dreambooth.runs.test_train import Stop, interrupted_after
from tests.mflux_vae_train.pipelines.flux1.small_flux import RECOMMENDED, drawn, small_pipeline

ADAPTER = "pytorch_lora_weights.safetensors"


class Distilled(FakePipeline):
    """Has other weights than FakePipeline, and needs fewer steps."""

    name = "distilled"
    recommended = replace(FakePipeline.recommended, steps=2, guidance=1.0)

    def __init__(self) -> None:
        super().__init__(seed=1)


@pytest.fixture
def opens(monkeypatch):
    """Lets --preview_model open this pipeline."""

    def put(pipeline):
        monkeypatch.setattr(preview_model, "open_pipeline", lambda model, vae: pipeline)
        return pipeline

    return put


def log_text(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def test_previews_are_drawn_by_the_other_model_with_the_adapter(short_run, opens, tmp_path) -> None:
    drawing, trained = opens(Distilled()), FakePipeline()
    given = {"prior_preservation": "none", "num_validation_images": 2, "max_train_steps": 2, "validation_steps": 2}
    given["use_dora"] = True
    adapter = DreamBooth(trained).train(short_run(preview_model="distilled", **given)).result
    assert trained.images_sampled == 0 and drawing.images_sampled == 4, "before and after the training"
    assert not [one for one in drawing.prompts_encoded if one], "the encoders are equal"
    assert not lora.layers(drawing.denoiser), "it is the base model again"

    again = Distilled()
    lora.load_adapter({"transformer": again.denoiser}, adapter)
    conditioning = again.encode_prompts(["a photo of sks dog"])
    keys = sample_keys(0, Stream.PREVIEW, 0, range(2))
    images = sample_images(again, conditioning, keys, ["a", "b"], size=(16, 16), guidance=1.0, steps=2)
    saved = load_image(tmp_path / "out" / "samples" / "step-00002.png")
    np.testing.assert_array_equal(saved, np.concatenate(images, axis=1))

    DreamBooth(FakePipeline()).train(short_run(output_dir=str(tmp_path / "alone"), **given))
    assert (tmp_path / "alone" / ADAPTER).read_bytes() == adapter.read_bytes(), "the training does not depend on it"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "previews are by `distilled`" in card and "2 steps, guidance 1." in card


def test_class_images_are_drawn_by_the_other_model_without_an_adapter(short_run, opens, tmp_path) -> None:
    given = {"prior_preservation": "class_images", "num_class_images": 2, "max_train_steps": 1}
    opens(Distilled())
    DreamBooth(FakePipeline()).train(short_run(preview_model="distilled", **given))
    DreamBooth(Distilled()).train(short_run(output_dir=str(tmp_path / "its"), **given))
    for name in ("class-00000.png", "class-00001.png"):
        one, other = (load_image(tmp_path / run / "class_images" / name) for run in ("out", "its"))
        np.testing.assert_array_equal(one, other)


def test_a_run_continues_with_another_preview_model_unless_it_draws_class_images(
    short_run, opens, tmp_path, monkeypatch
) -> None:
    given = {"prior_preservation": "class_images", "num_class_images": 2, "checkpointing_steps": 2}
    opens(Distilled())
    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupted_after(2, patch)
        DreamBooth(FakePipeline()).train(short_run(preview_model="distilled", **given))
    classes = tmp_path / "out" / "class_images"
    shutil.move(classes, tmp_path / "kept")
    with pytest.raises(SettingsError, match="preview_model was 'distilled'"):
        DreamBooth(FakePipeline()).train(short_run(num_inference_steps=2, **given))
    shutil.move(tmp_path / "kept", classes)
    assert DreamBooth(FakePipeline()).train(short_run(num_inference_steps=2, **given)).updates == 4


def test_a_dry_run_names_the_preview_model(short_run, opens, caplog) -> None:
    opens(Distilled())
    with caplog.at_level(logging.INFO):
        DreamBooth(FakePipeline()).train(short_run(dry_run=True, preview_model="distilled", num_validation_images=1))
    assert "class images and previews are drawn by distilled: 2 steps, guidance 1" in log_text(caplog)
    caplog.clear()
    settings = short_run(dry_run=True, preview_model="distilled", num_inference_steps=7, guidance=2.0)
    with caplog.at_level(logging.INFO):
        DreamBooth(FakePipeline()).train(settings)
    assert "drawn by distilled: 7 steps, guidance 2" in log_text(caplog)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        DreamBooth(FakePipeline()).train(short_run(dry_run=True, preview_model="distilled", num_class_images=0))
    assert "--preview_model has no effect" in log_text(caplog) and "drawn by" not in log_text(caplog)


def test_preview_models_that_do_not_fit_are_refused(short_run, opens) -> None:
    with pytest.raises(SettingsError, match="leave it out"):
        short_run(preview_model="fake")
    with pytest.raises(SettingsError, match=r"preview_model.*--train_mode lora"):
        short_run(preview_model="distilled", train_mode="full")
    with pytest.raises(SettingsError, match=r"--preview_model nowhere: there is no pipeline"):
        DreamBooth(FakePipeline()).train(short_run(preview_model="nowhere"))
    opens(Distilled()).denoiser = FakeDenoiser(width=32)
    with pytest.raises(SettingsError, match=r"blocks\.0\.to_out is \(32, 32\) in distilled and \(24, 24\) in fake"):
        DreamBooth(FakePipeline()).train(short_run(preview_model="distilled"))
    opens(Distilled()).denoiser = FakeDenoiser()
    with pytest.raises(SettingsError, match="--quantize"):
        DreamBooth(Weighed()).train(short_run(preview_model="distilled", quantize=4))
    opens(tiny.load())
    with pytest.raises(SettingsError, match="missing in tiny"):
        DreamBooth(FakePipeline()).train(short_run(preview_model="tiny"))


def test_a_model_with_other_encoders_encodes_its_prompts(short_run, opens) -> None:
    drawing = opens(type("Other", (Distilled,), {"encoder_fingerprint": lambda self, use: "another"})())
    DreamBooth(FakePipeline()).train(short_run(preview_model="other", num_class_images=1, max_train_steps=1))
    assert drawing.prompts_encoded[:3] == ["a photo of a dog", "", "a photo of sks dog"]


# pipelines whose parts are loaded on demand


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline, and one with another transformer."""
    root = tmp_path_factory.mktemp("folders")
    base = small_pipeline(root / "tokenizers", recommended=RECOMMENDED, base_model="owner/base")
    base.save_pretrained(root / "base", "float32")
    drawn(base.denoiser, 9)
    base.save_pretrained(root / "sibling", "float32")
    return root


def test_parts_are_shared_and_the_denoiser_is_freed(short_run, opens, folders) -> None:
    trained, drawing = (FluxPipeline.from_pretrained(folders / name) for name in ("base", "sibling"))
    opens(drawing)
    changes = {"quantize": 4, "use_dora": True, "train_text_encoder": True, "num_validation_images": 1}
    changes |= {"gradient_accumulation_steps": 1, "num_class_images": 0, "num_inference_steps": 1, "resolution": 16}
    settings = short_run(preview_model="sibling", max_train_steps=1, **changes)
    adapter = DreamBooth(trained).train(settings).result
    assert drawing.prompts is trained.prompts and drawing.parts.vae is trained.parts.vae
    assert drawing._denoiser.loaded is None and all(part.loaded is None for part in drawing.parts._text_encoders())
    with preview_model.adapted(trained, drawing):
        ours, theirs = lora.layers(trained.denoiser), lora.layers(drawing.denoiser)
        assert ours and ours.keys() == theirs.keys()
        for path, layer in theirs.items():
            assert layer.lora_a is ours[path].lora_a and layer.m is ours[path].m
            assert isinstance(layer.linear, QuantizedLinear) and layer.linear is not ours[path].linear
    assert "previews are by `sibling`" in (adapter.parent / "README.md").read_text()


def test_equal_models_draw_equal_images(short_run, folders) -> None:
    trained, drawing = (FluxPipeline.from_pretrained(folders / "base") for _ in range(2))
    lora.add_lora(trained.denoiser, ["*attn.to_q"], rank=2)
    for layer in lora.layers(trained.denoiser).values():
        layer.lora_b = mx.ones_like(layer.lora_b)
    assert preview_model.share_encoders(trained, drawing)
    conditioning = trained.encode_prompts(["a photo of a dog"])

    def draw(pipeline: FluxPipeline) -> mx.array:
        return pipeline.sample(
            conditioning, size=(16, 16), steps=1, guidance=2.0, key=mx.random.split(mx.random.key(0), 1)
        )

    alone = draw(drawing)
    with preview_model.adapted(trained, drawing):
        assert mx.array_equal(draw(drawing), draw(trained)) and not mx.array_equal(draw(drawing), alone)


def test_other_text_encoders_cannot_be_trained(short_run, folders, opens, tmp_path) -> None:
    trained, drawing = (FluxPipeline.from_pretrained(folders / name) for name in ("base", "sibling"))
    drawn(drawing.parts.networks["text_encoder"].keep(), 5)
    opens(drawing)
    with pytest.raises(SettingsError, match="text encoders"):
        DreamBooth(trained).train(short_run(preview_model="sibling", train_text_encoder=True, num_class_images=0))
    assert not (tmp_path / "out").exists()


# memory


class Drawing(Weighed):
    """Estimates what drawing needs."""

    def footprint(self, work: Workload) -> Footprint:
        learning = 10 * work.trained
        phases = [Phase("text encoding", 50, 5, 1.0)]
        phases += [Phase("class images", 100, 7, 1.0 * work.steps)] if work.class_images else []
        phases.append(Phase("latents", 100 if work.class_images else 0, 3, 0.0))
        phases.append(Phase("training", 100 + learning, 40, 2.0))
        return Footprint(phases=[*phases, Phase("previews", 100 + learning, 7, 0.0)], download=11)


def test_the_second_denoiser_counts_where_both_are_held() -> None:
    work = DrawnWorkload(resolution=16, trained=3, class_images=2, steps=4, drawing=Drawing())
    found = footprint_of(Drawing(), work)
    assert {one.name: one.weights for one in found.phases} == {
        "text encoding": 50, "class images": 100, "latents": 0, "training": 130, "previews": 230,
    }  # fmt: skip
    assert [one.name for one in found.phases][:3] == ["text encoding", "class images", "latents"]
    assert found.phases[1].operations == 4.0 and found.download == 22
    assert footprint_of(Drawing(), replace(work, trained=0)).peak == 207


def test_the_estimate_of_a_mac_has_both_models(short_run, opens, folders, caplog, monkeypatch) -> None:
    trained, drawing = (FluxPipeline.from_pretrained(folders / name) for name in ("base", "sibling"))
    opens(drawing)
    asked: list[Workload] = []

    def footprint(work: Workload) -> Footprint:
        asked.append(work)
        return FluxPipeline.footprint(drawing, work)

    monkeypatch.setattr(drawing, "footprint", footprint)
    settings = short_run(dry_run=True, estimate_for="mac", preview_model="sibling", num_validation_images=1)
    with caplog.at_level(logging.INFO):
        DreamBooth(trained).train(settings)
    assert asked and all(work.previews and not work.trained for work in asked)
    assert "estimated peak memory" in log_text(caplog)


def test_a_model_without_an_estimate_is_a_warning(short_run, opens, caplog) -> None:
    opens(Distilled())
    DreamBooth(Weighed()).train(short_run(dry_run=True, preview_model="distilled"))
    assert "the estimate lacks the memory of --preview_model" in log_text(caplog)


def test_arrays_of_an_adapter_are_not_copied() -> None:
    one, other = FakePipeline().denoiser, Distilled().denoiser
    lora.add_lora(one, ["blocks.*"], rank=2)
    base = mx.array(other.blocks[0]["to_out"].weight)
    with lora.transplanted(one, other):
        layer = other.blocks[0]["to_out"]
        assert layer.lora_a is one.blocks[0]["to_out"].lora_a and layer.linear.weight is not base
        assert mx.array_equal(layer.linear.weight, base)
        assert not mx.array_equal(one.blocks[0]["to_out"].linear.weight, base)
    assert not lora.layers(other)
