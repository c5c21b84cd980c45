"""The instance images of a run: files, prompts, masks and crops."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, check_files, load_dataset

PROMPT = "a photo of sks dog"


@pytest.fixture
def load(instance_dir):
    def loaded(resolution: int = 16, **changes) -> InstanceDataset:
        given = {"model": "fake", "instance_data_dir": str(instance_dir), "instance_prompt": PROMPT}
        if "concepts" in changes:
            given = {"model": "fake"}
        return load_dataset(DreamBoothSettings(**given, **changes), resolution=resolution, multiple=4)

    return loaded


def picture(height: int = 16, width: int = 16, level: int = 0) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_images_are_sorted_counted_and_fingerprinted(instance_dir, load):
    pictures = load()
    assert [image.path.name for image in pictures.images] == [f"picture-{index}.png" for index in range(5)]
    assert pictures.skipped == 1
    assert all(image.read(image.square).shape == (16, 16, 3) for image in pictures.images)
    (instance_dir / "picture-0.png").rename(instance_dir / "aaa.png")
    assert load().fingerprint == pictures.fingerprint
    save_image(instance_dir / "aaa.png", picture())
    assert load().fingerprint != pictures.fingerprint


def test_a_share_is_held_out_by_content(instance_dir, load):
    whole = load()
    names = {share: [one.path.name for one in load(validation_share=share).held_out] for share in (0.01, 0.4, 0.99)}
    assert [len(names[share]) for share in names] == [1, 2, 4] and {*names[0.01]} < {*names[0.4]} < {*names[0.99]}
    found = load(validation_share=0.4, seed=1)
    assert [one.path.name for one in found.held_out] == names[0.4] and found.samples_per_epoch == 3
    assert sorted(one.content for one in found.all_images) == sorted(one.content for one in whole.images)
    (held_out,) = names[0.01]
    (instance_dir / "copy.png").write_bytes((instance_dir / held_out).read_bytes())
    assert sorted(one.path.name for one in load(validation_share=0.01).held_out) == sorted(["copy.png", held_out])


def test_a_single_image_cannot_be_shared(instance_dir, tmp_path, load):
    save_image(tmp_path / "one" / "a.png", picture())
    single = Concept(instance_data_dir=str(tmp_path / "one"), instance_prompt=PROMPT)
    with pytest.raises(SettingsError, match="validation_share"):
        load(concepts=[single], validation_share=0.2)
    several = [single, Concept(instance_data_dir=str(instance_dir), instance_prompt=PROMPT)]
    found = load(concepts=several, validation_share=0.2)
    assert [one.concept for one in found.held_out] == [1] and "nothing held out" in " ".join(found.warnings)


def test_a_folder_is_held_out_with_its_captions_masks_and_one_crop(instance_dir, tmp_path, load):
    more = tmp_path / "more"
    save_image(more / "a.png", picture(16, 40))
    save_image(more / "a-mask.png", picture(16, 40, 255)[..., :1])
    (more / "a.txt").write_text("sks dog, asleep")
    (more / "b.png").write_bytes((instance_dir / "picture-1.png").read_bytes())
    save_image(instance_dir / "picture-0-mask.png", picture(20, 16, 255)[..., :1])
    crops = {"center_crop": False, "num_crops": 3, "random_flip": True, "masked_loss": True}
    found, before = load(validation_data_dir=str(more), **crops), load(**crops)
    assert found.fingerprint == before.fingerprint and found.held_out_fingerprint != before.held_out_fingerprint
    first, second = found.held_out
    assert (first.caption, second.caption, first.mask) == ("sks dog, asleep", PROMPT, more / "a-mask.png")
    assert [[crop.offset for crop in row] for row in first.crops] == [[0.5]]
    assert "also trained (b.png)" in " ".join(found.repetition_warnings())
    given = {"model": "fake", "instance_data_dir": str(instance_dir), "instance_prompt": PROMPT}
    settings = DreamBoothSettings(**given, validation_data_dir=str(more))
    assert "2 held out in" in found.summary(settings.subjects)[0]
    (more / "c.png").write_text("no image")
    with pytest.raises(ImageError, match=r"c\.png"):
        check_files(settings)


def test_folder_without_images_is_rejected(tmp_path, load):
    (tmp_path / "Thumbs.db").write_bytes(b"")
    with pytest.raises(ImageError, match=r"1 file\b.*\.png"):
        load(concepts=[Concept(instance_data_dir=tmp_path, instance_prompt=PROMPT)])


@pytest.mark.parametrize("broken", [0, 3])
def test_broken_image_is_named(instance_dir, load, broken):
    path = instance_dir / f"picture-{broken}.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=rf"picture-{broken}\.png"):
        load()


def test_a_single_image_and_copies_are_warnings(instance_dir, load):
    assert load().repetition_warnings() == []
    (instance_dir / "copy.png").write_bytes((instance_dir / "picture-1.png").read_bytes())
    (twice,) = load().repetition_warnings()
    assert "copy.png, picture-1.png" in twice
    for path in instance_dir.glob("picture-*.png"):
        path.unlink()
    (single,) = load().repetition_warnings()
    assert "single image" in single and "copy.png" in single


# prompts


def captions_of(pictures: InstanceDataset) -> list[str]:
    return [instance.caption for instance in pictures.images]


def test_prompts_come_from_metadata_then_text_files_then_settings(instance_dir, load):
    assert captions_of(load()) == [PROMPT] * 5
    (instance_dir / "picture-0.txt").write_text("sks dog\nasleep ")
    (instance_dir / "picture-1.txt").write_text("sks dog awake")
    (instance_dir / "picture-2.txt").write_text(" \n")
    rows = [
        {"file_name": "picture-1.png", "text": "sks dog in metadata"},
        {"file_name": "picture-3.png", "prompt": "x"},
    ]
    (instance_dir / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pictures = load()
    assert captions_of(pictures) == ["sks dog asleep", "sks dog in metadata", PROMPT, "x", PROMPT]
    assert pictures.skipped == 1, "caption files are used"
    assert "3 of 5 images have another prompt than --instance_prompt" in pictures.summary(
        [Concept(instance_data_dir="x", instance_prompt=PROMPT)]
    )


def test_caption_column(instance_dir, load):
    (instance_dir / "metadata.jsonl").write_text(
        json.dumps({"file_name": "picture-4.png", "text": "t", "caption2": "s"})
    )
    assert captions_of(load())[4] == "t"
    assert captions_of(load(caption_column="caption2"))[4] == "s"
    with pytest.raises(SettingsError, match="caption_column"):
        load(caption_column="caption")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"file_name": "picture-0.png", "text": ', "JSON"),
        ("[1]", "file_name"),
        ('{"file_name": "nobody.png", "text": "x"}', "nobody"),
        ('{"file_name": "picture-0.png", "text": 3}', "no text"),
    ],
)
def test_invalid_metadata_is_rejected(instance_dir, load, line, word):
    (instance_dir / "metadata.jsonl").write_text(line)
    with pytest.raises(SettingsError, match=word):
        load()


def test_column_without_metadata_and_undecodable_text_are_rejected(instance_dir, load):
    with pytest.raises(SettingsError, match="metadata"):
        load(caption_column="caption")
    (instance_dir / "picture-0.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SettingsError, match=r"picture-0\.txt"):
        load()


# masks


def test_masks_are_not_images(instance_dir, load):
    save_image(instance_dir / "picture-1-mask.png", picture(20, 16, 200)[..., :1])
    save_image(instance_dir / "lonely-mask.png", picture())
    unmasked = load()
    assert [image.path.name for image in unmasked.images] == [f"picture-{i}.png" for i in range(5)]
    assert "lonely-mask.png" in unmasked.warnings[0]
    assert unmasked.unused_masks == 1 and all(one.mask is None for one in unmasked.images)
    assert "picture-1-mask.png" in unmasked.warnings[1] and "--masked_loss" in unmasked.warnings[1]
    masked = load(masked_loss=True)
    assert "4 of 5 images without a mask (picture-0.png" in masked.warnings[1]
    assert [one.path for one in masked.images] == [
        one.path for one in unmasked.images
    ] and masked.fingerprint != unmasked.fingerprint
    assert [one.mask.name if one.mask else None for one in masked.images][1] == "picture-1-mask.png"


@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (picture(20, 16, 0), "black"),
        (picture(16, 20, 255), "aspect"),
        (None, "NAME-mask"),
    ],
)
def test_unusable_masks_are_rejected(instance_dir, load, mask, word):
    if mask is not None:
        save_image(instance_dir / "picture-1-mask.png", mask)
    with pytest.raises(ImageError, match=word):
        load(masked_loss=True)


def test_black_crops_are_dropped(instance_dir, load):
    """Such samples have no loss, and an update of nothing else would have no gradient."""
    save_image(instance_dir / "picture-0.png", picture(80, 16))
    mask = picture(80, 16)
    mask[:20] = 255
    save_image(instance_dir / "picture-0-mask.png", mask)
    cut = {"center_crop": False, "num_crops": 5}
    assert [row[0].offset for row in load(**cut).images[0].crops] == [0, 0.25, 0.5, 0.75, 1]
    assert [row[0].offset for row in load(**cut, masked_loss=True).images[0].crops] == [0, 0.25]
    with pytest.raises(ImageError, match="crop"):
        load(masked_loss=True)


def test_small_mask_passes_the_check_before_the_resolution_is_known(instance_dir, load):
    mask = picture(1024, 1024)
    mask[500:505, 500:505] = 255
    save_image(instance_dir / "picture-0.png", picture(1024, 1024))
    save_image(instance_dir / "picture-0-mask.png", mask)
    settings = DreamBoothSettings(
        model="fake", instance_data_dir=str(instance_dir), instance_prompt=PROMPT, masked_loss=True
    )
    check_files(settings)
    assert len(load_dataset(settings, resolution=512, multiple=16).images) == 5


# concepts, crops


def test_concepts_have_separate_images_and_prompts(instance_dir, tmp_path, load):
    save_image(tmp_path / "cats" / "cat.png", picture())
    concepts = [
        Concept(instance_data_dir=instance_dir, instance_prompt=PROMPT),
        Concept(instance_data_dir=tmp_path / "cats", instance_prompt="a photo of xyz cat"),
    ]
    pictures = load(concepts=concepts)
    assert [one.concept for one in pictures.images] == [0] * 5 + [1]
    assert captions_of(pictures) == [PROMPT] * 5 + ["a photo of xyz cat"]
    lines = pictures.summary(concepts)
    assert lines[0].startswith("5 instance images in") and "1 other file skipped" in lines[1]


def test_crops_of_each_image(instance_dir, load):
    for path in instance_dir.glob("*.png"):
        path.unlink()
    save_image(instance_dir / "square.png", picture(40, 40))
    save_image(instance_dir / "tall.png", picture(80, 41))
    assert [[len(row) for row in one.crops] for one in load().images] == [[1], [1]]
    assert [[len(row) for row in one.crops] for one in load(random_flip=True).images] == [[2], [2]]
    several = load(random_flip=True, center_crop=False, num_crops=3).images
    assert [[len(row) for row in one.crops] for one in several] == [[2], [2, 2, 2]]
    bucketed = load(use_aspect_ratio_buckets=True)
    assert [one.shape for one in bucketed.images] == [(16, 16), (24, 12)]
    assert "shapes: 16x16 1, 24x12 1" in bucketed.summary([Concept(instance_data_dir="x", instance_prompt=PROMPT)])


def test_images_smaller_than_training_images_are_a_warning(instance_dir, load):
    assert not any("enlarged" in line for line in load().warnings)
    save_image(instance_dir / "picture-1.png", picture(16, 12))
    (line,) = [line for line in load().warnings if "enlarged" in line]
    assert "picture-1.png" in line
