"""Prompts of single images, and the words of other tools in them."""

from __future__ import annotations

import json

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.image_folder.scan import scan
from mflux_vae.images import save_image
from mflux_vae_train.dreambooth.data.captions import captions
from mflux_vae_train.dreambooth.data.identifier import identifier_of
from mflux_vae_train.dreambooth.data.placeholders import adapt_captions
from tests.mflux_vae_train.dreambooth.conftest import subject

PROMPT = "a photo of sks star"


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        save_image(tmp_path / f"{index}.png", subject(index))
    return tmp_path


def read(folder, **options):
    return captions(scan(folder), prompt=PROMPT, **options)


def rows(folder, *rows, name="metadata.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows))


def test_metadata_csv_of_the_hub(folder):
    rows(folder, "file_name,text", '0.png,"a star, red"', "1.png,two", '2.png,"two\nlines"', name="metadata.csv")
    found = read(folder)
    assert found.texts == {"0.png": "a star, red", "1.png": "two", "2.png": "two\nlines", "3.png": PROMPT}
    assert "1 of 4 images have no caption (3.png)" in found.warnings[0]
    rows(folder, "file_name,caption", "0.png,x", name="metadata.csv")
    assert read(folder, column="caption").texts["0.png"] == "x"


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["image,text", "0.png,x"], "first line"),
        (["file_name,text,text", "0.png,x,y"], "first line"),
        (["file_name,text", "0.png,a star, red"], "line 2.*quotes"),
        (["file_name,text", "0.png,x", "./0.PNG,y"], "lines 2 and 3"),
        (["file_name,text", '0.png,"x'], "CSV"),
    ],
)
def test_broken_csv_is_refused(folder, lines, word):
    rows(folder, *lines, name="metadata.csv")
    with pytest.raises(SettingsError, match=word):
        read(folder)


def test_names_in_metadata_may_be_written_differently(folder):
    save_image(folder / "cafe\u0301.png", subject(0))
    names = ["./0.png", "1.PNG", str(folder / "2.png"), ".\\3.png", "caf\u00e9.png"]
    rows(folder, *({"file_name": name, "text": f"text {index}"} for index, name in enumerate(names)))
    assert [*read(folder).texts.values()] == [f"text {index}" for index in range(5)]


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["0.png", "1.png", "./0.png"], "lines 1 and 3"),
        (["train/0.png"], "write '0.png'"),
        (["9.png"], "does not exist"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(folder, names, word):
    rows(folder, *({"file_name": name, "text": "x"} for name in names))
    with pytest.raises(SettingsError, match=word):
        read(folder)


def test_names_that_differ_in_case_are_not_guessed(folder):
    for name in ("a.png", "A.png"):
        save_image(folder / name, subject(0))
    if len(scan(folder).images) == 6:  # not on file systems that ignore case
        rows(folder, {"file_name": "a.PNG", "text": "x"})
        with pytest.raises(SettingsError, match="may be"):
            read(folder)


def test_line_separators_within_a_text_are_content(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read(folder).texts["0.png"] == "a\u2028b\x85c"


def test_captions_that_are_not_used_are_named(folder):
    (folder / "0.txt").write_text(" \n")
    (folder / "1.txt").write_text("replaced")
    (folder / "2.txt").write_text("a star\nof two lines")
    (folder / "5.psd").write_bytes(b"8BPS\0\1")
    rows(folder, {"file_name": "1.png", "text": "x"}, {"file_name": "5.psd", "text": "x"})
    found = read(folder)
    assert found.texts == {"0.png": PROMPT, "1.png": "x", "2.png": "a star of two lines", "3.png": PROMPT}
    assert [next(word for word in line.split() if word[0].isdigit()) for line in found.warnings] == ["1"] * 5
    for word in ("empty caption (0.txt)", "(3.png)", "not used (1.txt)", "several lines", "5.psd"):
        assert any(word in line for line in found.warnings)


def test_placeholders_are_replaced_by_the_identifier(folder):
    for index, text in enumerate(["a [trigger] on grass", "[Name] asleep", "{} star", "a star"]):
        (folder / f"{index}.txt").write_text(text)
    texts, lines = adapt_captions(read(folder), PROMPT)
    assert [*texts.values()] == ["a sks on grass", "sks asleep", "sks star", "a star"]
    assert (
        len(lines) == 2
        and "3 captions" in lines[0]
        and "'sks' of --instance_prompt is missing in 1 of 4 captions (3.png)" in lines[-1]
    )
    with pytest.raises(SettingsError, match=r"placeholder.*'a photo of a star' has no identifier"):
        adapt_captions(read(folder), "a photo of a star")


@pytest.mark.parametrize("prompt", ["a photo of [trigger] dog", "a photo of {}", "a photo of sks [filewords]"])
def test_placeholders_in_the_instance_prompt_are_refused(folder, prompt):
    with pytest.raises(SettingsError, match="placeholder"):
        adapt_captions(read(folder), prompt)


def test_captions_with_the_identifier_are_worth_no_warning(folder):
    for index, text in enumerate(["SKS star", "a photo of sks, asleep", "sks_star", "(sks:1.2)"]):
        (folder / f"{index}.txt").write_text(text)
    assert adapt_captions(read(folder), PROMPT)[1] == []


@pytest.mark.parametrize(
    ("prompt", "identifier"),
    [
        ("a photo of TOK", "TOK"),
        ("a photo of ohwx man", "ohwx"),
        ("a photo of <s0><s1>", "<s0><s1>"),
        ("a photo of <s0> <s1> man", "<s0><s1>"),
        ("photo of p3rs0n, smiling", "p3rs0n"),
        ("a photo of k1tty42 cat", "k1tty42"),
        ("a photo of OHWX person", "OHWX"),
        ("A PHOTO OF SKS DOG", "SKS"),
        ("a photo of S* on grass", "S*"),
        ("a photo of Zxq dog", "Zxq"),
        ("a photo of Mrs Smith", None),
        ("a photo of d0g_t0k dog", "d0g_t0k"),
        ("a DSLR photo of sks dog", "sks"),
        ("a photo of a NASA rocket in 4k, 35mm, f2, 1980s", None),
        ("A BIG DOG IN THE PARK", None),
        ("1girl and an iphone15", None),
    ],
)
def test_identifiers(prompt, identifier):
    assert identifier_of(prompt) == identifier


def test_the_class_prompt_leaves_the_identifier_over():
    assert identifier_of("a photo of Rex dog", "a photo of a dog") == "Rex"
    assert identifier_of("a photo of Rex the dog", "A photo of a dog.") == "Rex"
    assert identifier_of("a photo of old Rex dog", "a photo of a dog") is None
