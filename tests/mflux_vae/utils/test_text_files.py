"""Text of any origin is read as it is meant, or refused with the file's name and the fix."""

import codecs
from pathlib import Path

import pytest

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.utils.text_files import parse_json, read_text

TEXT = "ein Stern ⭐\nzwei\n"


@pytest.mark.parametrize("content", [TEXT, "\ufeff" + TEXT, TEXT.replace("\n", "\r\n"), TEXT.replace("\n", "\r")])
def test_reads_utf_8_with_and_without_a_mark_and_any_end_of_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert read_text(tmp_path / "a.txt") == TEXT


REFUSED = {
    "UTF-16 with a mark": (TEXT.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "UTF-16, big end first": (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16;"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "is UTF-16 without a byte order mark"),
    "UTF-16 without a mark, big end first": (TEXT.encode("utf-16-be"), "is UTF-16 without a byte order mark"),
    "UTF-32": (TEXT.encode("utf-32"), "is UTF-32;"),
    "cp1252": ("eins\ncafé".encode("cp1252"), "line 2 holds the byte 0xe9.*cp1252.*save it as UTF-8"),
    "a NUL byte": (b"a photo\nof a \0 star", "line 2 holds a NUL"),
    "a lone surrogate": (b"a \xed\xa0\x80 b", "line 1 holds the byte 0xed"),
}


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses_other_encodings_with_file_and_fix(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"a\.txt: {words}"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(ImageError, match="UTF-8"):
        read_text(tmp_path / "a.txt", ImageError)


def test_a_missing_file_is_left_to_the_caller_and_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "nothing")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"rank": 4,\n "rank": 8}', "line 2: 'rank' stands in line 1"),
        ('{"a": {"b": 1, "c": 2,\n\n "b": 1}}', "line 3: 'b'"),
        ('[{"a": "}{", "\\"": 1},\n {"x": 1, "x": 2}]', "line 2: 'x' stands in line 2"),
        ('{"é": 1, "\\u00e9": 2}', "line 1: 'é'"),
    ],
)
def test_json_with_a_key_twice_is_refused_at_any_depth(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_may_repeat_a_key_in_different_objects() -> None:
    assert parse_json('{"a": {"a": [{"a": 1}, {"a": 2}]}}') == {"a": {"a": [{"a": 1}, {"a": 2}]}}
