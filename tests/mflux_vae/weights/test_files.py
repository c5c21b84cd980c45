"""Weights files are read and written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import WeightsError
from mflux_vae.weights.formats import files
from tests.mflux_vae.naming_samples import same


def test_a_file_there_and_back_is_bitwise_the_same(tmp_path: Path) -> None:
    tensors = {
        name: mx.random.normal((3, 5), key=mx.random.key(1)).astype(dtype) for name, dtype in files.DTYPES.items()
    } | {"transposed": mx.arange(6).reshape(2, 3).T}
    files.write_safetensors(tmp_path / "new" / "a.safetensors", tensors, {"origin": "test"})
    read, metadata = files.read_safetensors(tmp_path / "new" / "a.safetensors")
    assert same(read, tensors)
    assert metadata == {"format": "pt", "origin": "test"}
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 60, -200, -1])
def test_a_truncated_file_is_refused_when_it_is_opened(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, {"first": mx.zeros((40,)), "last": mx.ones((40,))})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"a\.safetensors: not a complete safetensors file"):
        files.read_safetensors(path)


def test_other_files_and_missing_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("<html>not found</html>" * 20)
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        files.read_safetensors(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="no such weights file"):
        files.read_folder(tmp_path, "model")


def raw(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    """A safetensors file with any header, which may be bytes, and any length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(first: int, end: int, shape: list | None = None, dtype: str = "F32", **more: object) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - first) // 4] if shape is None else shape,
        "data_offsets": [first, end],
        **more,
    }


HEADERS = {
    "longer than the file": ({"a": entry(0, 16)}, {"length": 2**20}, "1048576"),
    "longer than any file": ({"a": entry(0, 16)}, {"length": 2**63 + 5}, "a header of 9223372036854775813 bytes"),
    "of no length": ({"a": entry(0, 16)}, {"length": 0}, "Expecting value"),
    "not JSON": (b"{'a': 1}", {}, "double quotes"),
    "not text": (b"\xff\xfe{}", {}, "codec can't decode"),
    "nested without end": (b"[" * 100_000, {}, "recursion"),
    "a list": ([1], {}, "not a JSON object"),
    "a name twice": (
        b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + json.dumps(entry(8, 16)).encode() + b"}",
        {},
        "duplicate",
    ),
    "metadata that are no texts": ({"__metadata__": {"a": 1}, "a": entry(0, 16)}, {}, "metadata"),
    "no entry": ({"a": 7}, {}, "offsets"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, {}, "offsets"),
    "three offsets": ({"a": entry(0, 16) | {"data_offsets": [0, 8, 16]}}, {}, "offsets"),
    "an unknown dtype": ({"a": entry(0, 16, dtype="F33")}, {}, "F33"),
    "a dtype that is no text": ({"a": entry(0, 16, dtype=["F32"])}, {}, "unknown dtype"),  # type: ignore[arg-type]
    "a negative shape": ({"a": entry(0, 16, [-4])}, {}, "impossible shape"),
    "a shape of texts": ({"a": entry(0, 16, ["4"])}, {}, "impossible shape"),
    "a huge shape": ({"a": entry(0, 16, [2**40])}, {}, "impossible shape"),
    "shapes that multiply beyond 64 bits": ({"a": entry(0, 16, [2**31 - 1] * 4)}, {}, "does not fit the bytes 0 to 16"),
    "a shape that is not its bytes": (
        {"a": entry(0, 16, [5])},
        {},
        "F32 of shape [5], which does not fit the bytes 0 to 16",
    ),
    "offsets beyond the file": ({"a": entry(0, 32)}, {}, "32 bytes"),
    "offsets before the data": ({"a": entry(-8, 8)}, {}, "byte -8"),
    "offsets backwards": ({"a": entry(16, 0, [-4])}, {}, "impossible shape"),
    "fractions": ({"a": entry(0, 16, [4]) | {"data_offsets": [0.0, 16.0]}}, {}, "does not fit"),
    "overlap": ({"a": entry(0, 12), "b": entry(8, 16)}, {}, "byte 8"),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 16)}, {}, "byte 8"),
    "bytes of no tensor": ({"a": entry(0, 8)}, {}, "8 bytes"),
}


@pytest.mark.parametrize(("content", "how", "word"), HEADERS.values(), ids=HEADERS)
def test_headers_are_checked_before_mlx_sees_them(
    content: object, how: dict, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = raw(tmp_path / "a.safetensors", content, **how)
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("MLX was given the file"))
    for read in (files.read_safetensors, files.open_weights):
        with pytest.raises(WeightsError, match=r"a\.safetensors: not a complete safetensors file") as caught:
            read(path)
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_headers_that_are_unusual_are_read(tmp_path: Path) -> None:
    content = {
        "__metadata__": None,
        "a": entry(8, 16),
        "b": entry(0, 8, [2, 1]),
        "c": entry(16, 16, [3, 0]),
        "d": entry(16, 20, []),
    }
    path = raw(
        tmp_path / "a.safetensors", json.dumps(content).encode() + b"  ", np.arange(5, dtype=np.float32).tobytes()
    )
    for tensors in (files.read_safetensors(path)[0], {k: v.load() for k, v in files.open_weights(path)[0].items()}):
        assert {key: value.tolist() for key, value in tensors.items()} == {
            "a": [2, 3],
            "b": [[0], [1]],
            "c": [[], [], []],
            "d": 4,
        }


def test_dtypes_that_mlx_does_not_load_leave_the_others_readable(tmp_path: Path) -> None:
    data = np.arange(2, dtype=np.float64).tobytes() + b"\x3c\xc1" + np.float16(1.5).tobytes() + b"\xc0\x3f\x7f"
    content = {
        "double": entry(0, 16, [2], "F64"),
        "tiny": entry(16, 18, [2], "F8_E5M2"),
        "half": entry(18, 20, [1], "F16"),
        "brain": entry(20, 22, [1], "BF16"),
        "power": entry(22, 23, [1], "F8_E8M0"),
    }
    tensors, _ = files.open_weights(raw(tmp_path / "a.safetensors", content, data))
    assert {key: stored.dtype for key, stored in tensors.items()} == {
        "double": "float64",
        "tiny": "f8_e5m2",
        "half": "float16",
        "brain": "bfloat16",
        "power": "f8_e8m0",
    }
    double, half, brain = (tensors[key].load() for key in ("double", "half", "brain"))
    assert (double.dtype, half.dtype, brain.dtype) == (mx.float32, mx.float16, mx.bfloat16)
    assert double.tolist() == [0, 1] and half.tolist() == brain.tolist() == [1.5]
    assert tensors["tiny"].load().tolist() == [1, -2.5]
    for read in (tensors["power"].load, lambda: files.read_safetensors(tmp_path / "a.safetensors")):
        with pytest.raises(WeightsError, match=r"a\.safetensors: power is stored as f8_e8m0"):
            read()


def test_flipped_bytes_of_a_header_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, {"first": mx.zeros((4, 3)), "last": mx.ones((5,))})
    whole = path.read_bytes()
    length, draw, refused = int.from_bytes(whole[:8], "little") + 8, random.Random(0), 0
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            broken[draw.randrange(length)] = draw.randrange(256)
        path.write_bytes(broken)
        try:
            mx.eval(files.read_safetensors(path)[0])
        except WeightsError:
            refused += 1
    assert refused > 150


def test_failed_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, {"x": mx.array(1)})

    def half(name: str, *_: object) -> None:
        Path(name).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", half)
    with pytest.raises(OSError, match="disk full"):
        files.write_safetensors(path, {"x": mx.array(2)})
    assert files.read_safetensors(path)[0]["x"].item() == 1
    files.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"x": object()})
    assert files.read_json(tmp_path / "a.json") == {"x": 1}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_a_file_can_be_written_over_while_its_tensors_are_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, {"x": mx.arange(5), "y": mx.arange(3)})
    tensors, _ = files.read_safetensors(path)
    files.write_safetensors(path, {"x": tensors["x"] + 1})
    assert tensors["y"].tolist() == [0, 1, 2]
    assert files.read_safetensors(path)[0]["x"].tolist() == [1, 2, 3, 4, 5]


def sharded(folder: Path, **weight_map: str) -> None:
    files.write_safetensors(folder / "m-00001-of-00002.safetensors", {"a": mx.array(1), "b": mx.array(2)})
    files.write_safetensors(folder / "m-00002-of-00002.safetensors", {"c": mx.array(3)})
    files.write_json(folder / "m.safetensors.index.json", {"weight_map": weight_map})


FIRST, SECOND = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    sharded(tmp_path, a=FIRST, b=FIRST, c=SECOND)
    assert {key: value.item() for key, value in files.read_folder(tmp_path, "m").items()} == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("outside", ["../m-00002-of-00002.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "."])
def test_an_index_cannot_reach_outside_its_folder(outside: str, tmp_path: Path) -> None:
    sharded(tmp_path / "inner", a=FIRST, c=outside)
    files.write_safetensors(tmp_path / SECOND, {"c": mx.array(3)})
    with pytest.raises(WeightsError, match=r"not a file in this folder|no such weights file"):
        files.read_folder(tmp_path / "inner", "m")


def test_incomplete_shards_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path, a=FIRST, d=SECOND, e=SECOND)
    with pytest.raises(WeightsError, match="shards lack d, e"):
        files.read_folder(tmp_path, "m")
    (tmp_path / SECOND).unlink()
    with pytest.raises(WeightsError, match=rf"{SECOND}: no such weights file"):
        files.read_folder(tmp_path, "m")
    (tmp_path / "m.safetensors.index.json").write_text("{}")
    with pytest.raises(WeightsError, match="no weight_map"):
        files.read_folder(tmp_path, "m")


@pytest.mark.parametrize(("text", "word"), [("[1]", "not a JSON object"), ("{", "not valid JSON"), ("\xff", "UTF-8")])
def test_broken_json_is_refused(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=word):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(WeightsError, match="no such file"):
        files.read_json(tmp_path / "b.json")


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems have no such names")
def test_names_that_are_not_utf_8_are_files_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    files.write_safetensors(path, {"a": mx.arange(5)}, {"name": path.stem})
    tensors, metadata = files.read_safetensors(path)
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4] and metadata["name"] == "caf\\xe9"


def test_json_there_and_back(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"é": True}}
    files.write_json(tmp_path / "deep" / "a.json", content)
    assert files.read_json(tmp_path / "deep" / "a.json") == content
    assert list(json.loads((tmp_path / "deep" / "a.json").read_text())) == ["b", "a"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, content, word):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=word):
        files.header(path)
