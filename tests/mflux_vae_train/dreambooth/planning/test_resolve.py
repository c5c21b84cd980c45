from __future__ import annotations

import dataclasses

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.crops import training_resolution
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings, resolve
from mflux_vae_train.pipelines import flux1
from mflux_vae_train.pipelines.noise import SCHEMES, NoiseSampling
from tests.contracts.fake import FakePipeline

RECOMMENDED = FakePipeline.recommended


def resolved_from(settings: DreamBoothSettings, recommended=RECOMMENDED, *, images: int = 5) -> ResolvedSettings:
    resolution = training_resolution(settings, recommended)
    dataset = InstanceDataset(images=[], skipped=0, unused_masks=0, resolution=resolution, samples_per_epoch=images)
    return resolve(settings, recommended, dataset)


def resolved(prompt="a photo of sks dog", **given) -> ResolvedSettings:
    return resolved_from(
        DreamBoothSettings(model="fake", instance_data_dir="pictures", instance_prompt=prompt, **given)
    )


def assert_resolves_to_itself(run: ResolvedSettings) -> None:
    assert resolved_from(run.to_settings()).to_settings() == run.to_settings()


def test_guidance_is_for_the_model_that_draws():
    for given, training in (({}, 7.5), ({"preview_model": "distilled"}, RECOMMENDED.guidance)):
        settings = resolved(guidance=7.5, **given)
        assert (settings.drawing_guidance, settings.training_guidance, settings.guidance) == (7.5, training, 7.5)


def test_the_pipeline_provides_defaults_and_they_are_noted():
    settings = resolved()
    assert settings.resolution == RECOMMENDED.resolution
    assert settings.learning_rate == RECOMMENDED.learning_rate
    assert settings.guidance == RECOMMENDED.guidance
    assert settings.caption_dropout == RECOMMENDED.caption_dropout
    assert settings.prior_loss_weight == RECOMMENDED.prior_loss_weight
    assert (settings.rank, settings.lora_alpha) == (RECOMMENDED.rank, RECOMMENDED.rank)
    assert settings.validation_prompt == ("a photo of sks dog",)
    assert settings.validation_steps == 100
    notes = " ".join(settings.notes)
    for words in ("learning_rate 0.02", "resolution 16", "guidance 1.5", "rank 2", "'a photo of a dog'"):
        assert words in notes


def test_given_settings_are_kept():
    given = {
        "learning_rate": 1e-5,
        "resolution": 32,
        "guidance": 7.5,
        "rank": 3,
        "lora_alpha": 1.5,
        "caption_dropout": 0.0,
        "prior_loss_weight": 0.0,
        "validation_prompt": ("x", "y"),
        "validation_steps": 7,
        "class_prompt": "a dog",
        "class_data_dir": "dogs",
        "weighting_scheme": "sigma_sqrt",
    }
    run = resolved(**given)
    assert {name: getattr(run, name) for name in given} == given
    assert not any(note.startswith("chosen") for note in run.notes)


def test_resolved_settings_resolve_to_themselves():
    assert_resolves_to_itself(resolved(num_train_epochs=3))


def test_full_training_has_another_rate_and_no_rank():
    settings = resolved(train_mode="full")
    assert settings.learning_rate == RECOMMENDED.learning_rate_full
    assert settings.rank is None and settings.lora_alpha is None


@pytest.mark.parametrize(("given", "near"), [(18, "16 or 20"), (9, "8 or 12")])
def test_an_unsupported_resolution_is_refused(given, near):
    with pytest.raises(SettingsError, match=f"--resolution is {given}; a multiple of 4 is needed, such as {near}"):
        resolved(resolution=given)


def test_prior_preservation_is_on_with_a_class_prompt():
    assert resolved().with_prior_preservation
    assert resolved("a photo of xyz", class_prompt="a dog").with_prior_preservation


def test_prior_preservation_is_off_without_a_class_prompt():
    run = resolved("a photo of xyz")
    assert run.with_prior_preservation is False and run.class_prompt is None
    assert any("prior preservation is off: no class word follows" in line for line in run.warnings)


def test_prior_preservation_needs_a_class_prompt():
    with pytest.raises(SettingsError, match="--class_prompt"):
        resolved("a photo of xyz", with_prior_preservation=True)


def test_prior_preservation_can_be_turned_off():
    assert resolved(with_prior_preservation=False).class_prompt is None


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, "class_images"),
        ({"with_prior_preservation": True}, "class_images"),
        ({"with_prior_preservation": False}, "none"),
        ({"prior_preservation": "dop"}, "dop"),
        ({"prior_preservation": "dop", "with_prior_preservation": False}, "dop"),
        ({"prior_preservation": "none"}, "none"),
    ],
)
def test_kinds_of_prior_preservation(given, kind):
    run = resolved(**given)
    assert run.prior_preservation == kind
    assert run.with_prior_preservation is (kind == "class_images")
    assert (run.class_prompt is None) == (kind == "none")
    assert (run.class_data_dir is None) == (kind != "class_images")
    assert run.prior_loss_weight == {"class_images": 0.5, "dop": 1.0}.get(kind)
    assert_resolves_to_itself(run)


def test_dop_needs_a_class_prompt_and_an_adapter():
    with pytest.raises(SettingsError, match="--class_prompt"):
        resolved("a photo of xyz", prior_preservation="dop")
    with pytest.raises(SettingsError, match="--train_mode full"):
        resolved(prior_preservation="dop", train_mode="full")
    with pytest.raises(SettingsError, match="contradicts"):
        resolved(prior_preservation="dop", with_prior_preservation=True)


def test_concepts_are_resolved_one_by_one():
    concepts = [
        Concept(instance_data_dir="a", instance_prompt="a photo of sks dog"),
        Concept(instance_data_dir="b", instance_prompt="a photo of xyz cat", class_data_dir="cats", repeats=3),
        Concept(instance_data_dir="c", instance_prompt="a photo of zwx dog"),
    ]
    settings = DreamBoothSettings(model="fake", concepts=concepts, repeats=2, output_dir="out")
    run = resolved_from(settings)
    assert [one.class_prompt for one in run.concepts] == [
        "a photo of a dog",
        "a photo of a cat",
        "a photo of a dog",
    ]
    assert [one.class_data_dir for one in run.concepts] == ["out/class_images", "cats", "out/class_images"]
    assert [one.repeats for one in run.concepts] == [2, 3, 2]
    assert run.subjects == run.concepts
    assert run.validation_prompt == ("a photo of sks dog", "a photo of xyz cat", "a photo of zwx dog")
    assert_resolves_to_itself(run)


def test_noise_levels_default_to_the_pipelines():
    assert resolved().weighting_scheme == "uniform" and resolved().sampling is None
    run = resolved(weighting_scheme="logit_normal", logit_mean=0.5)
    assert run.sampling == NoiseSampling(scheme="logit_normal", logit_mean=0.5)
    assert not any("logit" in line for line in run.warnings)


def test_offset_noise_is_a_noise_offset():
    assert resolved(offset_noise=True).sampling == NoiseSampling(scheme="uniform", noise_offset=0.1)
    assert resolved(offset_noise=True, noise_offset=0.05).sampling == NoiseSampling(scheme="uniform", noise_offset=0.05)


@pytest.mark.parametrize("scheme", [None, "uniform"])
def test_options_of_noise_apply_whatever_the_pipeline_recommends(scheme):
    given = DreamBoothSettings(model="x", instance_data_dir="y", instance_prompt="a photo of sks dog", snr_gamma=5.0)
    run = resolved_from(given, dataclasses.replace(RECOMMENDED, weighting_scheme=scheme))
    assert run.sampling == NoiseSampling(scheme="uniform", snr_gamma=5.0)


def test_every_weighting_scheme_is_a_choice():
    flag = next(field for field in dataclasses.fields(DreamBoothSettings) if field.name == "weighting_scheme")
    assert flag.metadata["choices"] == tuple(SCHEMES)


def test_epochs_replace_updates():
    run = resolved(num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=2)
    assert run.plan.samples == 15 and run.plan.updates == 4
    assert run.max_train_steps == 4


def test_validation_epochs_become_updates():
    settings = resolved(validation_epochs=4, gradient_accumulation_steps=2)
    assert (settings.validation_steps, settings.validation_epochs) == (10, None)  # 4 epochs of 5 images, two per update
    assert resolved(validation_epochs=1, gradient_accumulation_steps=100).validation_steps == 1


@pytest.mark.parametrize(("given", "expected"), [(None, RECOMMENDED.learning_rate * 6), (1e-3, 6e-3)])
def test_scale_lr_applies_once(given, expected):
    run = resolved(scale_lr=True, learning_rate=given, train_batch_size=2, gradient_accumulation_steps=3)
    assert run.learning_rate == pytest.approx(expected)
    assert any(f"x 6 images per update: {expected:g}" in note for note in run.notes)
    assert resolved_from(run.to_settings()).learning_rate == run.learning_rate


def test_prodigy_in_a_short_run_is_a_warning():
    (line,) = resolved(optimizer="prodigy", max_train_steps=200).warnings
    assert "this run has 200" in line
    assert resolved(optimizer="prodigy", max_train_steps=599).warnings
    assert not resolved(optimizer="prodigy", max_train_steps=600).warnings
    assert not resolved(optimizer="prodigy", max_train_steps=300, lr_scheduler="constant").warnings
    assert not resolved(max_train_steps=200).warnings


def test_unusual_guidance_is_a_warning():
    # the pipeline's recommendation of 1.5 extends the usual range of 5 to 10
    assert resolved(guidance=12).warnings == ("--guidance is 12; usual is 1.5 to 10",)
    assert resolved(guidance=1).warnings == ("--guidance is 1; usual is 1.5 to 10",)
    assert not resolved().warnings and not resolved(guidance=7.5).warnings


@pytest.mark.parametrize(
    ("model", "guidance", "expected"),
    [
        ("schnell", 7.5, "distilled"),
        ("schnell", 1.0, None),
        ("schnell", 0.0, None),
        ("dev", 7.5, "--guidance is 7.5; usual is 1.5 to 5"),
        ("dev", 3.5, None),
    ],
)
def test_usual_guidance_depends_on_the_model(model, guidance, expected):
    settings = DreamBoothSettings(
        model=model, instance_data_dir="pictures", instance_prompt="a photo of sks dog", guidance=guidance
    )
    warnings = resolved_from(settings, flux1.load(model).recommended).warnings
    assert len(warnings) == (expected is not None)
    assert expected is None or expected in warnings[0]


def test_the_example_of_seed_000():
    run = resolved(
        "a photo of xyz",
        guidance=7.5,
        num_class_images=10,
        learning_rate=5e-6,
        lr_warmup_steps=50,
        max_train_steps=800,
    )
    assert run.guidance == 7.5
    assert run.plan.updates == 800
