from __future__ import annotations

import pytest
from PIL import Image

from mflux_vae.image_files.formats import image_format, readable, remedy


def box(major: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + major + bytes(4) + b"".join(others)
    return (4 + len(body)).to_bytes(4, "big") + body + bytes(64)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("suffix", [".jfif", ".png", ""])
def test_content_decides(tmp_path, format, suffix):
    path = tmp_path / f"picture{suffix}"
    Image.new("RGB", (8, 8)).save(path, format=format)
    assert image_format(path) == format and readable(format)


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (box(b"heic", b"mif1", b"heic"), "HEIC"),
        (box(b"mif1", b"miaf", b"heic"), "HEIC"),
        (box(b"mif1", b"miaf", b"avif"), "AVIF"),
        (box(b"avif", b"mif1"), "AVIF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (box(b"crx ", b"isom"), "camera raw"),
        (box(b"isom", b"mp42"), None),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"8BPS\0\1", "PSD"),
        (b"BMW in a garage", None),
        (b"a photo of sks star", None),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", None),
        (b"", None),
    ],
)
def test_heads(tmp_path, head, format):
    (tmp_path / "fake.png").write_bytes(head)
    assert image_format(tmp_path / "fake.png") == format


def test_a_raw_file_is_no_tiff(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tif")
    assert image_format((tmp_path / "a.tif").rename(tmp_path / "a.DNG")) == "camera raw"
    assert not readable("camera raw")


def test_heif_is_readable_with_the_extra(monkeypatch):
    for installed in (None, object()):
        monkeypatch.setattr("mflux_vae.image_files.formats.find_spec", lambda name, found=installed: found)
        assert readable("HEIC") == readable("AVIF") == (installed is not None)
    assert "mflux-vae[heif]" in remedy("HEIC") and "heif" not in remedy("PSD")
    assert not readable(None)


def test_a_missing_file_is_an_oserror(tmp_path):
    with pytest.raises(OSError):
        image_format(tmp_path / "none.png")
