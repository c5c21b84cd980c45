"""Prompts that the model cannot read as they are meant. The tokenizers of the embedded pipeline read 16 tokens."""

from __future__ import annotations

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.dataset import load_dataset
from mflux_vae_train.dreambooth.planning.prompt_checks import (
    check_prompts,
    identifier_warnings,
    prompts_of,
    syntax_warnings,
)
from mflux_vae_train.dreambooth.planning.resolve import resolve
from mflux_vae_train.pipelines import tiny
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.conftest import subject

FILLER = "a very long caption of so many words that no tokenizer of sixteen tokens reads them all"


@pytest.fixture(scope="module")
def pipeline():
    return tiny.load()


@pytest.fixture
def run(tmp_path):
    """Settings and images of a run with these captions."""

    def make(*captions: str, prompt: str = "a photo of sks star", **changes):
        for index, caption in enumerate(captions or [""]):
            save_image(tmp_path / f"{index}.png", subject(index))
            (tmp_path / f"{index}.txt").write_text(caption, encoding="utf-8")
        given = {"instance_data_dir": str(tmp_path), "instance_prompt": prompt, "num_validation_images": 0, **changes}
        settings = DreamBoothSettings(model="tiny", output_dir=str(tmp_path / "out"), **given)
        dataset = load_dataset(settings, resolution=64)
        return resolve(settings, FakePipeline.recommended, dataset), dataset

    return make


def test_prompts_that_fit_are_worth_no_warning(pipeline, run):
    assert check_prompts(pipeline, *run("a photo of sks star", "sks star on grass")) == []


def test_captions_that_are_cut_are_counted_and_equal_ones_named(pipeline, run):
    cut, equal = check_prompts(pipeline, *run(*(f"{FILLER} sks star {index}" for index in range(5))))
    for word in ("CLIP reads 16 tokens and cuts 5", "T5 reads 16", "first 0.png", "identifier 'sks' is lost in 5"):
        assert word in cut
    assert "5 different prompts are equal" in equal and "0.png" in equal


def test_an_identifier_before_the_limit_is_kept(pipeline, run):
    (cut,) = check_prompts(pipeline, *run(f"sks star, {FILLER}"))
    assert "identifier is kept" in cut


def test_a_prompt_limit_that_cuts_the_identifier(pipeline, run):
    (cut,) = check_prompts(pipeline, *run(max_sequence_length=4))
    assert "T5 reads 4" in cut and "CLIP" not in cut and "'sks' is lost for T5 in 1" in cut


def test_a_prompt_limit_above_the_models(pipeline, run):
    (line,) = check_prompts(pipeline, *run(max_sequence_length=512))
    assert "--max_sequence_length 512 has no effect" in line and "16" in line


def test_identifiers_that_do_not_separate(run, tmp_path):
    settings, _ = run(class_prompt="a sks star")
    (line,) = identifier_warnings(settings)
    assert "'sks'" in line and "--class_prompt" in line
    concepts = tuple(
        Concept(instance_data_dir=str(tmp_path), instance_prompt=f"a photo of {name}")
        for name in ("sks star", "SKS dog")
    )
    (line,) = identifier_warnings(DreamBoothSettings(model="tiny", concepts=concepts))
    assert "'sks' stands for 2 subjects" in line
    assert identifier_warnings(run()[0]) == []


def test_validation_prompts_without_the_identifier(run):
    (line,) = identifier_warnings(run(validation_prompt=("a SKS star", "a star"))[0])
    assert "--validation_prompt 'a star'" in line and "sks" in line


def test_words_that_a_text_encoder_does_not_know(pipeline, run):
    (unknown,) = check_prompts(pipeline, *run(prompt="a photo of \u2b50 star"))
    assert "T5 does not know '\u2b50'" in unknown and "star" not in unknown.replace("'\u2b50'", "")


@pytest.mark.parametrize("kind", ["class_images", "dop"])
@pytest.mark.parametrize(
    ("prompt", "class_prompt"),
    [
        ("a photo of a star", "a photo of a star"),
        (f"{FILLER} and sks star", None),
        (f"{FILLER} and sks star", f"{FILLER} and no star"),
    ],
)
def test_equal_instance_and_class_prompts_are_refused(pipeline, run, kind, prompt, class_prompt):
    with pytest.raises(SettingsError, match="equals --instance_prompt"):
        check_prompts(pipeline, *run(prompt=prompt, class_prompt=class_prompt, prior_preservation=kind))


def test_equal_prompts_matter_only_to_prior_preservation(pipeline, run):
    same = {"prompt": "a photo of a star", "class_prompt": "a photo of a star"}
    assert check_prompts(pipeline, *run(**same, prior_preservation="none")) == []
    assert check_prompts(pipeline, *run("a photo of sks star", **same)) == [], "captions differ"


def test_a_pipeline_that_cannot_tell(pipeline, run, monkeypatch):
    settings, dataset = run(FILLER)
    assert check_prompts(FakePipeline(), settings, dataset) is None

    class NotCached:
        def is_cached(self) -> bool:
            return False

    monkeypatch.setattr(pipeline, "_snapshot", NotCached())
    assert check_prompts(pipeline, settings, dataset) is None
    with pytest.raises(SettingsError, match="equals"):
        check_prompts(FakePipeline(), *run("a star", "a star", class_prompt="a star"))


@pytest.mark.parametrize(
    "text",
    [
        *("(sks star:1.3)", "((sks star))", "[cat:dog:0.5]", "[cat|dog]", "{red|blue}", "__colour__", "{{sks}}"),
        *(
            "<lora:star:0.8>",
            "a BREAK b",
            "a AND b",
            "sks++ star",
            "(sks)1.3",
            "a star --ar 16:9",
            "embedding:bad",
            "sks ||| star",
        ),
    ],
)
def test_syntax_of_other_tools(run, text):
    settings, dataset = run("", text)
    (line,) = syntax_warnings(prompts_of(settings, dataset))
    assert "1.png" in line and "read as text" in line


@pytest.mark.parametrize(
    "text", ["a photo (studio) of [V] star", "<s0><s1>: star, C++ - 3:4", "A STAR AND A DOG", "a_b"]
)
def test_plain_text_is_no_syntax(run, text):
    assert syntax_warnings(prompts_of(*run(text))) == []


def test_placeholders_in_validation_prompts_are_replaced(run):
    settings, _ = run(validation_prompt=("a [trigger] asleep", "a star"))
    assert settings.validation_prompt == ("a sks asleep", "a star")
    assert any("--validation_prompt" in line and "'sks'" in line for line in settings.warnings)
    with pytest.raises(SettingsError, match="validation_prompt"):
        run(prompt="a photo of a star", validation_prompt=("a [name]",))
    with pytest.raises(SettingsError, match="class_prompt"):
        run(class_prompt="a [name]")


@pytest.mark.parametrize("prompt", ["a photo of Rex", "a photo of TOK", "a photo of (sks star:1.3)"])
def test_preservation_that_nobody_turned_off_is_a_warning(run, prompt):
    assert any(line.startswith("prior preservation is off") for line in run(prompt=prompt)[0].warnings)
    (line,) = [line for line in run(prompt="a photo of a dog")[0].warnings if line.startswith("prior preservation")]
    assert "before the class word, or give --class_prompt" in line
    assert not any("prior" in line for line in run(prompt=prompt, prior_preservation="none")[0].warnings)
