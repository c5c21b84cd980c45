"""Arrays of .npz files come back to the bit, and a file that is none ends in one line."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import WeightsError
from mflux_vae.weights.formats.files import open_weights

DRAWS = np.random.default_rng(0)


def read(path: Path) -> dict[str, mx.array]:
    return {name: stored.load() for name, stored in open_weights(path)[0].items()}


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version, allow_pickle=True)
    return file.getvalue()


def archive(path: Path, content: bytes, name: str = "a.npy", how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr(name, content)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "bool"])
def test_what_mlx_saves_comes_back(dtype: str, tmp_path: Path) -> None:
    number = getattr(mx, dtype) if dtype != "bool" else mx.bool_
    given = {
        "a.weight": mx.array(DRAWS.integers(0, 2, (3, 2, 4))).astype(number),
        "turned": mx.array(DRAWS.integers(0, 2, (2, 3))).astype(number).T,
        "one": mx.array(1).astype(number),
        "none": mx.zeros((0, 2), number),
    }
    mx.savez(str(tmp_path / "a.npz"), **given)
    again = read(tmp_path / "a.npz")
    assert again.keys() == given.keys()
    assert all(again[name].dtype == number and mx.array_equal(again[name], given[name]) for name in given)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_what_numpy_saves_comes_back(shape: tuple[int, ...], order: str, tmp_path: Path) -> None:
    given = np.asarray(DRAWS.standard_normal(shape), order=order)
    np.savez(tmp_path / "a.npz", a=given)
    stored = open_weights(tmp_path / "a.npz")[0]["a"]
    assert (stored.shape, stored.dtype) == (shape, "float64")
    np.testing.assert_array_equal(stored.load(), given.astype(np.float32))


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: np.savez_compressed(path, a=np.zeros(2000)), r"a\.npy is compressed"),
        (lambda path: archive(path, npy(np.array([{}], object))), r"dtype"),
        (lambda path: archive(path, npy(np.zeros(2, ">f4"))), r"little-endian"),
        (lambda path: archive(path, npy(np.zeros(2, "c8"))), "dtype"),
        (lambda path: archive(path, npy(np.zeros(2, "f4"), (3, 0))), r"version"),
        (lambda path: archive(path, npy(np.zeros(2, "f4"))[:-1]), r"7 bytes"),
        (lambda path: archive(path, npy(np.zeros(2, "f4")) + b"0"), "9 bytes"),
        (lambda path: archive(path, b"\x93NUMPY\x01\x00"), "not readable as"),
        (lambda path: archive(path, b"no array"), "not readable as"),
        (lambda path: archive(path, npy(np.zeros(2)).replace(b"(2,)", b"(-2)")), "not readable as"),
        (lambda path: archive(path, npy(np.zeros(2)).replace(b"(2,)", b"(2,(")), "not readable as"),
        (lambda path: archive(path, npy(np.zeros(2)), "a.txt"), "not readable as"),
    ],
)
def test_what_is_refused(write: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    with pytest.raises(WeightsError, match=told) as caught:
        read(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(caught.value) and "\n" not in str(caught.value)


def test_broken_files_end_in_one_line(tmp_path: Path) -> None:
    path, draws, refused = tmp_path / "a.npz", random.Random(0), 0
    mx.savez(str(path), a=mx.arange(6).reshape(2, 3), b=mx.zeros((4,)))
    whole = path.read_bytes()
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draws.randint(1, 4)):
            broken[draws.randrange(len(broken))] = draws.randrange(256)
        path.write_bytes(broken[: draws.choice([len(broken), draws.randrange(len(broken))])])
        try:
            read(path)
        except WeightsError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100
