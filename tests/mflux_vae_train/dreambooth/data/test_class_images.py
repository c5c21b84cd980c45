from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mflux_vae.errors import SettingsError
from mflux_vae.images import image_text, load_image, save_image
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data import class_images
from tests.contracts.fake import FakePipeline

PROMPT = "a photo of a dog"


def generate(folder, indices, *, seed=0, prompt=PROMPT):
    pipeline = FakePipeline()
    class_images.generate_class_images(
        pipeline,
        pipeline.encode_prompts([prompt]),
        indices,
        folder,
        count=6,
        class_prompt=prompt,
        resolution=16,
        guidance=1.5,
        steps=3,
        seed=seed,
    )
    return pipeline


def load_all(folder):
    return {path.name: load_image(path) for path in sorted(folder.glob("*.png"))}


def test_images_differ_and_carry_their_prompt(tmp_path):
    generate(tmp_path, range(6))
    images = load_all(tmp_path)
    assert list(images) == [f"class-{index:05d}.png" for index in range(6)]
    assert len({image.tobytes() for image in images.values()}) == 6
    assert image_text(tmp_path / "class-00000.png") == {class_images.PROMPT_KEY: PROMPT}


def test_resumed_generation_is_identical(tmp_path):
    generate(tmp_path / "whole", range(6))
    generate(tmp_path / "parts", range(3))
    present = class_images.check_class_images(tmp_path / "parts", PROMPT)
    missing = class_images.missing_indices(present, 6)
    assert missing == [3, 4, 5]
    generate(tmp_path / "parts", missing)
    whole, parts = load_all(tmp_path / "whole"), load_all(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, image in whole.items():
        np.testing.assert_array_equal(image, parts[name])


def test_only_missing_images_are_sampled(tmp_path):
    assert generate(tmp_path, range(6)).images_sampled == 6


def test_gaps_are_filled_and_user_images_count(tmp_path):
    generate(tmp_path, [0, 2])
    save_image(tmp_path / "dog.png", np.zeros((16, 16, 3), np.uint8))
    present = class_images.check_class_images(tmp_path, PROMPT)
    assert len(present) == 3
    assert class_images.missing_indices(present, 5) == [1, 3]
    assert class_images.missing_indices(present, 3) == class_images.missing_indices(present, 2) == []


def test_seed_changes_the_images(tmp_path):
    generate(tmp_path / "a", [0])
    generate(tmp_path / "b", [0], seed=1)
    assert (load_all(tmp_path / "a")["class-00000.png"] != load_all(tmp_path / "b")["class-00000.png"]).any()


def test_images_of_another_class_are_rejected(tmp_path):
    generate(tmp_path, [0], prompt="a photo of a cat")
    with pytest.raises(SettingsError, match="a cat"):
        class_images.check_class_images(tmp_path, PROMPT)


def test_images_of_earlier_versions_are_judged(tmp_path):
    save_image(tmp_path / "class-00003.png", np.zeros((16, 16, 3), np.uint8), text={"prompt": "a photo of a cat"})
    with pytest.raises(SettingsError, match="a cat"):
        class_images.check_class_images(tmp_path, PROMPT)


@pytest.mark.parametrize("name", ["ComfyUI_00001_.png", "class-00000.png"])
def test_images_of_other_programs_are_not_judged(tmp_path, name):
    """ComfyUI stores the graph of an image as `prompt` and `workflow`, Automatic1111 its prompt as `parameters`."""
    texts = PngInfo()
    texts.add_text("prompt", json.dumps({"3": {"class_type": "KSampler", "inputs": {"text": "a cat" * 900}}}))
    texts.add_text("workflow", "{}")
    Image.new("RGB", (16, 16)).save(tmp_path / name, pnginfo=texts)
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.jpg", comment="prompt")
    assert len(class_images.check_class_images(tmp_path, PROMPT)) == 2


@pytest.mark.parametrize("add", ["add_text", "add_itxt"])
def test_one_text_named_prompt_is_not_enough(tmp_path, add):
    texts = PngInfo()
    getattr(texts, add)("prompt", "a photo of a cat")
    Image.new("RGB", (16, 16)).save(tmp_path / f"{add}.png", pnginfo=texts)
    assert class_images.check_class_images(tmp_path, PROMPT) == [tmp_path / f"{add}.png"]


def test_long_prompts_are_shortened_in_the_error(tmp_path):
    generate(tmp_path, [0], prompt="a photo of a cat " * 300)
    with pytest.raises(SettingsError, match="a photo of a cat") as error:
        class_images.check_class_images(tmp_path, PROMPT)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


def test_missing_folder_has_no_images(tmp_path):
    assert class_images.check_class_images(tmp_path / "nowhere", PROMPT) == []


def test_what_a_class_folder_holds_and_is_not_used_is_named(tmp_path):
    save_image(tmp_path / "1_dog" / "a.png", np.zeros((8, 8, 3), np.uint8))
    save_image(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "b.txt").write_text("a dog")
    (tmp_path / "c.psd").write_bytes(b"8BPS\0\1")
    concept = Concept(
        instance_data_dir="x", instance_prompt="a sks dog", class_prompt=PROMPT, class_data_dir=str(tmp_path)
    )
    (folder,) = class_images.scan_class_folders([concept], count=3)
    assert folder.present == 1 and len(folder.missing) == 2
    for word in ("1 image in subfolders ('1_dog')", "c.psd", "b.txt"):
        assert word in folder.unused
