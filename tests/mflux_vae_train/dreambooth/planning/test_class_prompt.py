from __future__ import annotations

import pytest

from mflux_vae_train.dreambooth.planning.class_prompt import derive_class_prompt


@pytest.mark.parametrize(
    ("instance", "expected"),
    [
        ("a photo of sks dog", "a photo of a dog"),
        ("a photo of a sks dog", "a photo of a dog"),
        ("a photo of the sks dog on the beach", "a photo of a dog on the beach"),
        ("photo of zwx cat", "photo of a cat"),
        ("a photo of sks orange", "a photo of an orange"),
        ("a photo of sks can", "a photo of a can"),
        ("a photo of sks can, studio light", "a photo of a can, studio light"),
        ("a photo of sks can on a table", "a photo of a can on a table"),
        ("a photo of an ohwx bear", "a photo of a bear"),
        ("a photo of sks unicorn", "a photo of a unicorn"),
        ("a photo of sks hourglass", "a photo of an hourglass"),
        ("a photo of [V] dog", "a photo of a dog"),
        ("a photo of <new1> teapot, studio light", "a photo of a teapot, studio light"),
        ("sks dog", "a dog"),
        ("a photo of my sks dog.", "a photo of a dog."),
        ("a photo of a happy sks dog", "a photo of a happy dog"),
        ("a photo of sks shoes", "a photo of shoes"),
        ("a photo of sks glass", "a photo of a glass"),
        ("a photo of qwrt3 robot-toy", "a photo of a robot-toy"),
        ("a photo of sks building", "a photo of a building"),
        ("a DSLR photo of sks BMW", "a DSLR photo of a BMW"),
        ("a dslr photo of xyz dog", "a dslr photo of a dog"),
    ],
)
def test_unambiguous_prompts(instance, expected):
    assert derive_class_prompt(instance)[0] == expected


@pytest.mark.parametrize(
    ("instance", "reason"),
    [
        ("a photo of xyz", "no class word follows the identifier 'xyz'"),
        ("a photo of sks on the beach", "no class word"),
        ("a photo of sks, a dog", "no class word"),
        ("a photo of sks running", "no class word"),
        ("sks can run", "no class word"),
        ("a picture in sks style", "no class word"),
        ("a photo of sks dog's bowl", "no class word"),
        ("a photo of sks zwx dog", "several words"),
        ("a photo of a dog", "no identifier"),
        ("a photo of Rex the dog", "no identifier"),
        ("a BMW car", "no identifier"),
        ("a sky by the sea", "no identifier"),
        ("a 3d render of the 1st dog", "no identifier"),
        ("", "no identifier"),
    ],
)
def test_ambiguous_prompts(instance, reason):
    derived, why = derive_class_prompt(instance)
    assert derived is None
    assert reason in why
