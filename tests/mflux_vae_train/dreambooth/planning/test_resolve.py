from __future__ import annotations

import dataclasses

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.planning.resolve import choose
from mflux_vae_train.pipelines import flux1
from mflux_vae_train.pipelines.noise import SCHEMES, NoiseSampling
from tests.contracts.fake import FakePipeline

RECOMMENDED = FakePipeline.recommended


def chosen(prompt="a photo of sks dog", pictures=5, **given):
    settings = DreamBoothSettings(model="fake", instance_data_dir="pictures", instance_prompt=prompt, **given)
    return choose(settings, RECOMMENDED, pictures=pictures)


def test_the_pipeline_decides_what_is_left_open_and_it_is_said():
    choices = chosen()
    settings = choices.settings
    assert settings.resolution == RECOMMENDED.resolution
    assert settings.learning_rate == RECOMMENDED.learning_rate
    assert settings.guidance == RECOMMENDED.guidance
    assert settings.caption_dropout == RECOMMENDED.caption_dropout
    assert settings.prior_loss_weight == RECOMMENDED.prior_loss_weight
    assert (settings.rank, settings.lora_alpha) == (RECOMMENDED.rank, RECOMMENDED.rank)
    assert settings.validation_prompt == ("a photo of sks dog",)
    assert settings.validation_steps == 100
    said = " ".join(choices.notes)
    for words in ("learning_rate 0.02", "resolution 16", "guidance 1.5", "rank 2", "'a photo of a dog'"):
        assert words in said


def test_what_the_user_gives_stands():
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
    choices = chosen(**given)
    assert {name: getattr(choices.settings, name) for name in given} == given
    assert not any(note.startswith("chosen") for note in choices.notes)


def test_what_was_chosen_chooses_the_same_again():
    once = chosen(num_train_epochs=3).settings
    assert choose(once, RECOMMENDED, pictures=5).settings == once


def test_full_training_has_its_own_rate_and_no_rank():
    settings = chosen(train_mode="full").settings
    assert settings.learning_rate == RECOMMENDED.learning_rate_full
    assert settings.rank is None and settings.lora_alpha is None


@pytest.mark.parametrize(("given", "near"), [(18, "16 or 20"), (9, "8 or 12")])
def test_a_resolution_the_pipeline_cannot_do_is_refused(given, near):
    with pytest.raises(SettingsError, match=f"--resolution is {given}; a multiple of 4 is needed, such as {near}"):
        chosen(resolution=given)


def test_prior_preservation_is_on_where_a_class_prompt_is_known():
    assert chosen().settings.with_prior_preservation
    assert chosen("a photo of xyz", class_prompt="a dog").settings.with_prior_preservation


def test_prior_preservation_is_off_where_none_is_known_and_it_is_said_why():
    choices = chosen("a photo of xyz")
    assert choices.settings.with_prior_preservation is False and choices.settings.class_prompt is None
    assert any("prior preservation is off: no class word follows" in note for note in choices.notes)


def test_prior_preservation_asked_for_without_a_class_prompt_is_an_error():
    with pytest.raises(SettingsError, match="needs --class_prompt: no class word follows"):
        chosen("a photo of xyz", with_prior_preservation=True)


def test_prior_preservation_can_be_turned_off():
    assert chosen(with_prior_preservation=False).settings.class_prompt is None


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
def test_what_preserves_the_prior(given, kind):
    choices = chosen(**given)
    assert choices.preservation == choices.settings.prior_preservation == kind
    assert choices.settings.with_prior_preservation is (kind == "class_images")
    assert (choices.settings.class_prompt is None) == (kind == "none")
    assert (choices.settings.class_data_dir is None) == (kind != "class_images")
    assert choices.prior_loss_weight == {"class_images": 0.5, "dop": 1.0}.get(kind)
    assert choose(choices.settings, RECOMMENDED, pictures=5).settings == choices.settings


def test_output_preservation_needs_a_class_prompt_and_an_adapter():
    with pytest.raises(SettingsError, match="--prior_preservation needs --class_prompt"):
        chosen("a photo of xyz", prior_preservation="dop")
    with pytest.raises(SettingsError, match="--train_mode full"):
        chosen(prior_preservation="dop", train_mode="full")
    with pytest.raises(SettingsError, match="contradicts --prior_preservation dop"):
        chosen(prior_preservation="dop", with_prior_preservation=True)


def test_concepts_are_decided_one_by_one():
    concepts = [
        Concept(instance_data_dir="a", instance_prompt="a photo of sks dog"),
        Concept(instance_data_dir="b", instance_prompt="a photo of xyz cat", class_data_dir="cats", repeats=3),
        Concept(instance_data_dir="c", instance_prompt="a photo of zwx dog"),
    ]
    settings = DreamBoothSettings(model="fake", concepts=concepts, repeats=2, output_dir="out")
    choices = choose(settings, RECOMMENDED, pictures=5)
    assert [one.class_prompt for one in choices.concepts] == [
        "a photo of a dog",
        "a photo of a cat",
        "a photo of a dog",
    ]
    assert [one.class_data_dir for one in choices.concepts] == ["out/class_images", "cats", "out/class_images"]
    assert [one.repeats for one in choices.concepts] == [2, 3, 2]
    assert choices.settings.concepts == choices.concepts
    assert choices.validation_prompt == ("a photo of sks dog", "a photo of xyz cat", "a photo of zwx dog")
    assert choose(choices.settings, RECOMMENDED, pictures=5).settings == choices.settings


def test_noise_levels_are_the_pipelines_unless_it_is_told():
    assert chosen().settings.weighting_scheme == "uniform" and chosen().sampling is None
    asked = chosen(weighting_scheme="logit_normal", logit_mean=0.5)
    assert asked.sampling == NoiseSampling(scheme="logit_normal", logit_mean=0.5)
    assert not any("logit" in line for line in asked.warnings)


def test_every_weighting_scheme_is_a_choice():
    flag = next(field for field in dataclasses.fields(DreamBoothSettings) if field.name == "weighting_scheme")
    assert flag.metadata["choices"] == tuple(SCHEMES)


def test_epochs_replace_updates():
    choices = chosen(num_train_epochs=3, train_batch_size=2, gradient_accumulation_steps=2)
    assert choices.plan.samples == 15 and choices.plan.updates == 4
    assert choices.settings.max_train_steps == 4


def test_epochs_between_previews_become_updates():
    settings = chosen(validation_epochs=4, gradient_accumulation_steps=2).settings
    assert (settings.validation_steps, settings.validation_epochs) == (10, None)  # 4 x 5 pictures, two in an update
    assert chosen(validation_epochs=1, gradient_accumulation_steps=100).settings.validation_steps == 1


@pytest.mark.parametrize(("given", "expected"), [(None, RECOMMENDED.learning_rate * 6), (1e-3, 6e-3)])
def test_a_scaled_learning_rate_is_said_and_scaled_once(given, expected):
    choices = chosen(scale_lr=True, learning_rate=given, train_batch_size=2, gradient_accumulation_steps=3)
    assert choices.learning_rate == choices.settings.learning_rate == pytest.approx(expected)
    assert any(f"x 6 pictures in an update: {expected:g}" in note for note in choices.notes)
    assert choose(choices.settings, RECOMMENDED, pictures=5).learning_rate == choices.learning_rate


def test_prodigy_in_a_short_run_is_a_warning():
    (line,) = chosen(optimizer="prodigy", max_train_steps=200).warnings
    assert "this run has 200" in line
    assert chosen(optimizer="prodigy", max_train_steps=599).warnings
    assert not chosen(optimizer="prodigy", max_train_steps=600).warnings
    assert not chosen(optimizer="prodigy", max_train_steps=300, lr_scheduler="constant").warnings
    assert not chosen(max_train_steps=200).warnings


def test_what_is_unusual_is_a_warning():
    # what the pipeline itself recommends, 1.5, is as usual as the recipe's 5 to 10
    assert chosen(guidance=12).warnings == ["--guidance is 12; usual is 1.5 to 10"]
    assert chosen(guidance=1).warnings == ["--guidance is 1; usual is 1.5 to 10"]
    assert not chosen().warnings and not chosen(guidance=7.5).warnings


@pytest.mark.parametrize(
    ("model", "guidance", "said"),
    [
        ("schnell", 7.5, "distilled to draw without guidance"),
        ("schnell", 1.0, None),
        ("schnell", 0.0, None),
        ("dev", 7.5, "--guidance is 7.5; usual is 1.5 to 5"),
        ("dev", 3.5, None),
    ],
)
def test_what_guidance_is_usual_depends_on_the_model(model, guidance, said):
    settings = DreamBoothSettings(
        model=model, instance_data_dir="pictures", instance_prompt="a photo of sks dog", guidance=guidance
    )
    warnings = choose(settings, flux1.load(model).recommended, pictures=5).warnings
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


def test_seed_000s_example_is_understood():
    choices = chosen(
        "a photo of xyz",
        guidance=7.5,
        num_class_images=10,
        learning_rate=5e-6,
        lr_warmup_steps=50,
        max_train_steps=800,
    )
    assert dataclasses.asdict(choices.settings)["guidance"] == 7.5
    assert choices.plan.updates == 800
