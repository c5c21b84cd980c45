"""Entries of a folder of images are images, masks, captions, or not used for a reason."""

from __future__ import annotations

import io
import os
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mflux_vae.errors import ImageError
from mflux_vae.image_folder.scan import MAX_LINE, ImageFolder, no_images, scan

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
AVIF = b"\0\0\0\x1cftypavif\0\0\0\0mif1miafavif"


@pytest.fixture(autouse=True, scope="module")
def without_the_extra_for_heif():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mflux_vae.image_files.formats.find_spec", lambda _: None)
        yield


def paint(path: Path, color="red", *, mode: str = "RGB", format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), color).save(path, format=format)


def reasons(folder: ImageFolder) -> dict[str, tuple[str, ...]]:
    return {" ".join(filter(None, (reason.noun, reason.tail))): names for reason, names in folder.unused.items()}


def entries(folder: Path, found: ImageFolder) -> set[str]:
    """All entries; those of a folder of masks take its place."""
    names = set(os.listdir(folder))
    known = found.used | {name for names in found.unused.values() for name in names}
    for below in {name.split("/")[0] for name in known if "/" in name}:
        names = names - {below} | {f"{below}/{name}" for name in os.listdir(folder / below)}
    return names


def assert_complete(folder: Path, found: ImageFolder) -> None:
    """used + not used = all, and nothing is both."""
    unused = [name for names in found.unused.values() for name in names]
    assert found.used | {*unused} == entries(folder, found)
    assert len(unused) == len({*unused}) and not found.used & {*unused}


def test_images_are_sorted_and_the_rest_has_a_reason(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        paint(tmp_path / name)
    for name in (".hidden.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = scan(tmp_path)
    assert found.images == ("a.JPG", "b.png", "c.webp")
    assert found.unused_files == 1
    assert_complete(tmp_path, found)
    assert scan(tmp_path, recursive=True).subfolders == ("folder.png",)


def test_a_missing_folder_and_a_file_in_its_place_are_named(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        scan(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError, match="is a file"):
        scan(tmp_path / "file")
    (tmp_path / "link").symlink_to("/nope")
    with pytest.raises(ImageError, match="/nope"):
        scan(tmp_path / "link")


def test_content_decides_what_is_an_image(tmp_path):
    for name, format in (("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c", "PNG"), ("d.JPG_large", "JPEG")):
        paint(tmp_path / name, format=format)
    for name, head in (("e.HEIC", HEIC), ("fake.png", HEIC), ("f.avif", AVIF), ("g.psd", b"8BPS\0\1")):
        (tmp_path / name).write_bytes(head)
    paint(tmp_path / "h.dng", format="TIFF")
    paint(tmp_path / "a.png.bak", format="PNG")
    (tmp_path / "i.png").write_bytes(b"broken")
    found = scan(tmp_path)
    assert found.images == ("a.jfif", "b.jpe", "c", "d.JPG_large", "i.png"), "a broken image is an error on reading"
    assert reasons(found)["HEIC image"] == ("e.HEIC", "fake.png")
    assert {"AVIF image", "PSD image", "camera raw image"} <= reasons(found).keys()
    text = found.unused_text()
    assert all(word in text for word in ("fake.png", "f.avif", "sips", "mflux-vae[heif]", "a.png.bak"))


def test_a_folder_of_heic_alone_is_named(tmp_path):
    for index in range(30):
        (tmp_path / f"IMG_{index}.HEIC").write_bytes(HEIC)
    message = str(no_images(scan(tmp_path)))
    assert "30 HEIC" in message and "sips" in message and "and 26 more" in message and len(message) < 400


def test_kohyas_folders_are_named_with_their_repeats(tmp_path):
    for index in range(5):
        paint(tmp_path / "img" / "10_sks star" / f"{index}.png")
    message = str(no_images(scan(tmp_path), repeats_flag="--repeats"))
    assert all(word in message for word in ("5 images", "'img/10_sks star'", "--repeats 10"))
    paint(tmp_path / "one.png")
    assert "5 images" in scan(tmp_path).unused_text() and "--repeats" not in scan(tmp_path).unused_text()
    (tmp_path / "empty").mkdir()
    assert_complete(tmp_path, scan(tmp_path))


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "z.png").symlink_to("/nope/z.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    message = str(no_images(scan(tmp_path)))
    assert "z.png -> /nope/z.png" in message and "cp -L" in message and "2 links" in message
    paint(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "more").symlink_to("elsewhere")
    assert reasons(scan(tmp_path, recursive=True))["link to a folder, which is not followed"] == ("more",)


def test_captions_of_each_spelling(tmp_path):
    names = ["0.png", "1.png", "2.png", "4.png", "5.png"]
    for name in [*names, unicodedata.normalize("NFD", "café.png"), "Screen\u202fshot\xa01.png"]:
        paint(tmp_path / name)
    read = ["0.caption", "1.TXT", "2.png.txt", "Metadata.CSV", "4.txt", "café.txt", "Screen shot 1.txt"]
    for name in [*read, "captions.json", "caption.txt", "9.txt", "5.json", "4.caption", "settings.toml"]:
        (tmp_path / name).write_text("a star")
    found = scan(tmp_path)
    assert found.metadata == "Metadata.CSV"
    assert sorted([*found.captions.values(), found.metadata]) == sorted(read)
    assert reasons(found) == {
        "caption without an image of that name": ("9.txt", "caption.txt"),
        "second caption of an image": ("4.caption",),
        "caption file of a kind that is not read": ("5.json", "captions.json"),
        "other file": ("settings.toml",),
    }
    assert_complete(tmp_path, found)


def test_masks_of_each_spelling_are_not_images(tmp_path):
    for index in range(6):
        paint(tmp_path / f"{index}.png")
    masks = ["0-masklabel.png", "1_mask.png", "2-Mask.jpg", "masks/3-mask.webp", "4.png-mask.png", "mask_5.png"]
    for name in [*masks, "b-mask.png", "1-mask.png", "masks/9.png", "3-condlabel.png"]:
        paint(tmp_path / name, 200, mode="L")
    (tmp_path / "masks" / ".DS_Store").write_text("")
    found = scan(tmp_path, find_twins=True)
    assert found.images == tuple(f"{index}.png" for index in range(6))
    assert dict(found.masks) == {**{f"{index}.png": name for index, name in enumerate(masks)}, "1.png": "1-mask.png"}
    assert reasons(found)["mask without an image of that name"] == ("b-mask.png", "masks/9.png")
    assert reasons(found)["second mask of an image"] == ("1_mask.png",)
    assert_complete(tmp_path, found)


def test_a_grey_image_beside_a_colour_image_is_not_used(tmp_path):
    paint(tmp_path / "a.jpg")
    paint(tmp_path / "a.png", 200, mode="L")
    paint(tmp_path / "b.jpg", "gray")
    paint(tmp_path / "b.png", "gray")
    assert scan(tmp_path, find_twins=True).images == ("a.jpg", "b.jpg", "b.png")
    assert_complete(tmp_path, scan(tmp_path, find_twins=True))


def test_images_of_one_name_share_mask_and_caption(tmp_path):
    for name in ("a.jpg", "a.png", "a-mask.png", "b.jpg", "b.png", "B.webp"):
        paint(tmp_path / name, "blue")
    for name in ("a.txt", "b.txt", "b.png.txt"):
        (tmp_path / name).write_text("x")
    found = scan(tmp_path)
    assert found.shared == {"a-mask.png": ["a.jpg", "a.png"], "a.txt": ["a.jpg", "a.png"]}
    assert found.captions["b.png"] == "b.png.txt" and found.captions["b.jpg"] == "b.txt"
    assert "B.webp" not in found.captions, "exact names come first"
    assert found.unused_files == 0


def test_images_that_are_not_on_this_machine_are_named(tmp_path):
    (tmp_path / ".IMG_1.HEIC.icloud").write_bytes(b"bplist00")
    assert "1 file kept in iCloud only" in str(no_images(scan(tmp_path)))


def test_names_are_listed_in_one_line(tmp_path):
    for name in ("a\nb.heic", "x" * 200 + ".heic", os.fsdecode(b"caf\xe9.heic")):
        (tmp_path / name).write_bytes(HEIC)
    text = scan(tmp_path).unused_text()
    assert "\n" not in text and len(text) < MAX_LINE and "a\\nb.heic" in text
    text.encode()


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert reasons(scan(tmp_path)) == {"device or pipe": ("a.png",)}


def test_other_programs_texts_are_worth_no_warning_where_texts_are_not_used(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a star")
    (tmp_path / "notes.txt").write_text("")
    assert not scan(tmp_path).unused_text(texts=False)
    assert "notes.txt" in scan(tmp_path).unused_text(uses=("captions",))
    assert "1 caption file (a.txt)" in scan(tmp_path).unused_text()
    (tmp_path / "a.npz").write_bytes(b"PK")
    assert "a.npz" in scan(tmp_path).unused_text(texts=False)


@cache
def content(color: str, format: str) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(file, format=Image.registered_extensions().get(f".{format.lower()}", format))
    return file.getvalue()


PICTURES = st.sampled_from(["png", "jpg", "jfif", "webp", "tiff", "bmp", "gif", "PNG", "jpe", ""])
STEMS = st.sampled_from(
    [
        "a",
        "b",
        "A",
        "a-mask",
        "b_mask",
        "a-masklabel",
        "c-mask",
        "mask-a",
        "caf\u00e9",
        "cafe\u0301",
        ".h",
        "a b",
        "a\xa0b",
    ]
)
OTHER = st.sampled_from(
    [
        *(
            "txt",
            "TXT",
            "png.txt",
            "caption",
            "json",
            "csv",
            "npz",
            "safetensors",
            "heic",
            "HEIC",
            "avif",
            "dng",
            "psd",
        ),
        *("png.bak", "xyz", "mp4", "part", "png.caption"),
    ]
)
NAMES = st.sampled_from(
    ["metadata.jsonl", "metadata.csv", "captions.json", "Thumbs.db", ".DS_Store", "._a.png", "desktop.ini", "x~"]
)
FOLDERS = st.sampled_from(["", "", "", "masks", "10_sks star", "@eaDir", "deep/er"])


@settings(max_examples=100, deadline=None)
@given(
    pictures=st.lists(st.tuples(FOLDERS, STEMS, PICTURES, st.sampled_from(["red", "gray"])), max_size=8),
    others=st.lists(st.one_of(st.tuples(FOLDERS, STEMS, OTHER).map(lambda t: (t[0], f"{t[1]}.{t[2]}")),
                              st.tuples(st.just(""), NAMES)), max_size=8),
    links=st.lists(st.tuples(STEMS, st.sampled_from(["a.png", "/nope", ".", "masks"])), max_size=3),
    recursive=st.booleans(),
)  # fmt: skip
def test_used_and_not_used_are_all_entries(tmp_path_factory, pictures, others, links, recursive):
    folder = tmp_path_factory.mktemp("folder")
    for inside, stem, suffix, color in pictures:
        format = {"": "PNG", "jfif": "JPEG", "jpe": "JPEG"}.get(suffix)
        path = folder / inside / (f"{stem}.{suffix}" if suffix else stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(color, format or suffix))
    for inside, name in others:
        (folder / inside).mkdir(parents=True, exist_ok=True)
        (folder / inside / name).write_bytes(HEIC if name.lower().endswith("heic") else b"x")
    for stem, target in links:
        if not os.path.lexists(folder / stem):
            (folder / stem).symlink_to(target)
    found = scan(folder, recursive=recursive, find_twins=True)
    assert_complete(folder, found)
    assert {*found.masks, *found.captions} <= {*found.images}
    assert not any("mask" in name for name in found.images if not name.startswith("mask-"))
    text = found.unused_text(uses=("masks", "captions"))
    loud = [reason for reason in found.unused if not reason.quiet]
    assert bool(text) == bool(loud)
    for reason in loud:
        assert f"{reason.noun}" in text
    assert len(text) < MAX_LINE + 300
    if not found.images:
        assert str(folder) in str(no_images(found))


def test_masks_without_a_name_or_with_a_number_are_not_images(tmp_path):
    for name in ("0.png", "0-masks.png", "0_mask_1.png", "mask.png", "carnival mask 2.png"):
        paint(tmp_path / name)
    found = scan(tmp_path)
    assert found.images == ("0.png", "carnival mask 2.png") and found.masks["0.png"] == "0-masks.png"
    assert reasons(found)["mask without an image of that name"] == ("mask.png",)
    assert reasons(found)["second mask of an image"] == ("0_mask_1.png",)


def test_links_in_a_circle_are_not_followed(tmp_path):
    below = tmp_path / "below"
    below.mkdir()
    for link, target in (("self", "."), ("a.png", "b.png"), ("b.png", "a.png"), ("below/up", "..")):
        (tmp_path / link).symlink_to(target)
    paint(below / "c.png")
    found = scan(tmp_path)
    assert not found.images and found.images_below == {"below": 1}
    assert {"a.png", "b.png"} == {*next(names for reason, names in reasons(found).items() if "not there" in reason)}
    assert ("self",) in reasons(found).values()


def test_counts_of_one_file_are_singular(tmp_path):
    (tmp_path / "0.txt").write_text("a")
    assert "1 file:" in str(no_images(scan(tmp_path)))
