"""torch's files are read to the bit, without torch, and nothing in them is ever executed."""

from __future__ import annotations

import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import WeightsError
from mflux_vae.weights.formats.files import open_weights
from mflux_vae.weights.formats.torch_files import read_torch
from tests.mflux_vae.weights.torch_writer import call, dump, name, of_arrays, tensor, write_old, write_zip

DRAWS = np.random.default_rng(0)
BASE = DRAWS.standard_normal((4, 6)).astype(np.float32)
ARRAYS = {
    "kernel": DRAWS.standard_normal((3, 2, 1, 1)).astype(np.float32),
    "transposed": BASE.T,
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
WRITERS = {"zip": write_zip, "old": write_old}


def written(path: Path, arrays: dict[str, np.ndarray], how: str = "zip") -> Path:
    tensors, storages = of_arrays(arrays, old=how == "old")
    itemsize = next(iter(arrays.values())).itemsize
    return write_old(path, tensors, storages, itemsize) if how == "old" else write_zip(path, tensors, storages)


@pytest.mark.parametrize("how", WRITERS)
def test_tensors_come_back_to_the_bit(how: str, tmp_path: Path) -> None:
    read = read_torch(written(tmp_path / "a.pt", ARRAYS, how))
    assert read.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert read[key].shape == array.shape and read[key].dtype == "float32"
        np.testing.assert_array_equal(np.array(read[key].load()), array)


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("dtype", ["float16", "float64", "int64", "uint16"])
def test_every_dtype_keeps_its_bits(how: str, dtype: str, tmp_path: Path) -> None:
    array = DRAWS.integers(0, 2**14, (2, 3)).astype(dtype)
    (read,) = read_torch(written(tmp_path / "a.pt", {"x": array}, how)).values()
    loaded = read.load()
    if dtype == "uint16":  # the bits of bfloat16
        assert read.dtype == "bfloat16" and loaded.dtype == mx.bfloat16
        loaded = loaded.view(mx.uint16)
    assert str(loaded.dtype) == f"mlx.core.{'float32' if dtype == 'float64' else dtype}"
    np.testing.assert_array_equal(np.array(loaded), array)


def test_views_begin_and_step_where_they_say(tmp_path: Path) -> None:
    content = {"part": tensor("0", "Float", 24, (2, 3), (12, 2), offset=7)}
    read = read_torch(write_zip(tmp_path / "a.pt", content, {"0": BASE.tobytes()}))
    expected = np.lib.stride_tricks.as_strided(BASE.reshape(-1)[7:], (2, 3), (48, 8))
    np.testing.assert_array_equal(np.array(read["part"].load()), expected)


@pytest.mark.parametrize("how", WRITERS.values(), ids=WRITERS)
def test_dictionaries_are_opened_and_trainers_leftovers_passed_over(how: Callable, tmp_path: Path) -> None:
    one = tensor("0", "Float", 2, (2,), (1,), old=how is write_old)
    path = how(
        tmp_path / "a.ckpt",
        {
            "state_dict": call(name("collections", "OrderedDict")) + b"(" + dump("encoder.weight") + one + b"u",
            "epoch": 3,
            "callbacks": {name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): {"best": [1, None]}},
            "hyper": call(name("omegaconf.dictconfig", "DictConfig"), {}) + b"}(" + dump("a") + dump(1) + b"ub",
            "parameter": call(name("torch._utils", "_rebuild_parameter"), one, True, {}),
        },
        {"0": np.array([1, 2], np.float32).tobytes()},
    )
    read = read_torch(path)
    assert read.keys() == {"state_dict.encoder.weight", "parameter"}
    assert read["parameter"].load().tolist() == read["state_dict.encoder.weight"].load().tolist() == [1, 2]


class Touch:
    """Makes a file when it is unpickled the usual way."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


HOSTILE = {
    "function": lambda trap: pickle.dumps({"a": Touch(trap)}, 2)[2:-1],
    "newer protocol": lambda trap: pickle.dumps({"a": Touch(trap)}, 4)[2:-1],
    "eval": lambda trap: call(name("builtins", "eval"), f"open({str(trap)!r}, 'w')"),
    "through torch": lambda trap: call(name("torch.hub", "load_state_dict_from_url"), "http://example.org"),
    "torch.load": lambda trap: call(name("torch", "load"), str(trap)),
    "through numpy": lambda trap: call(
        name("numpy.testing._private.utils", "runstring"), f"open({str(trap)!r}, 'w')", {}
    ),
    "getattr": lambda trap: call(name("builtins", "getattr"), name("collections", "OrderedDict"), "__init__"),
    "instance": lambda trap: f"(S'touch {trap}'\nios\nsystem\n".encode(),
    "object": lambda trap: b"(" + name("torch", "Size") + dump(str(trap)) + b"o",
    "attributes of a name": lambda trap: name("torch._utils", "_rebuild_tensor_v2") + dump({"__code__": 1}) + b"b",
    "call of a call": lambda trap: call(call(name("torch", "Size"), (1,)), 1),
    "extension": lambda trap: b"\x82\x01",
}


@pytest.mark.parametrize("how", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("attack", HOSTILE.values(), ids=HOSTILE)
def test_nothing_is_executed(attack: Callable[[Path], bytes], how: Callable, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path = how(tmp_path / "a.pt", {"a": attack(trap), "b": 1}, {})
    with pytest.raises(WeightsError, match=r"a\.pt: not readable as") as caught:
        read_torch(path)
    assert not trap.exists() and "\n" not in str(caught.value)


def test_pickle_itself_would_execute_the_attack(tmp_path: Path) -> None:
    """Otherwise the test before proves nothing."""
    pickle.loads(b"\x80\x02" + HOSTILE["function"](tmp_path / "executed") + b".")
    assert (tmp_path / "executed").exists()


FLOATS = {"0": bytes(16)}
BROKEN = {
    "shape beyond its storage": ({"x": tensor("0", "Float", 4, (5,), (1,))}, r"16 bytes"),
    "offset beyond": ({"x": tensor("0", "Float", 4, (2,), (1,), offset=3)}, "16 bytes"),
    "stride beyond": ({"x": tensor("0", "Float", 4, (2,), (4,))}, "16 bytes"),
    "a storage that lies about its size": ({"x": tensor("0", "Float", 99, (99,), (1,))}, "16 bytes"),
    "much out of little": ({"x": tensor("0", "Float", 4, (2**20, 2**20), (0, 0))}, "16 bytes"),
    "negative": ({"x": tensor("0", "Float", 4, (-1,), (1,))}, "impossible shape"),
    "negative stride": ({"x": tensor("0", "Float", 4, (2,), (-1,), offset=2)}, "impossible shape"),
    "65 dimensions": ({"x": tensor("0", "Float", 4, (1,) * 65, (1,) * 65)}, "65 dimensions"),
    "a missing storage": ({"x": tensor("1", "Float", 4, (4,), (1,))}, "archive/data/1 is missing"),
    "one name for two storages": (
        {"x": tensor("0", "Float", 4, (4,), (1,)), "y": tensor("0", "Half", 8, (8,), (1,))},
        "duplicate",
    ),
    "unknown numbers": ({"x": tensor("0", "QInt8", 4, (4,), (1,))}, "unknown dtype"),
    "a whole model": (call(name("torch.nn.modules.linear", "Linear"), 1), "Linear.*save its state_dict"),
    "one tensor": (tensor("0", "Float", 4, (4,), (1,)), "Tensor"),
    "a list": ([1, 2], "list"),
    "a stack that is empty": (b"000", "broken"),
    "a memo that is empty": (b"h\x07", "broken"),
    "no mark": (b"t", "missing mark|broken"),
    "an opcode that is none": (b"\xff", "broken"),
    "items of a number": (dump(1) + dump(2) + dump(3) + b"s", "dictionary"),
    "nested without end": (b"}" + (dump("a" * 99) + b"}") * 20 + b"s" * 20, "nested"),
}


@pytest.mark.parametrize(("content", "word"), BROKEN.values(), ids=BROKEN)
def test_inconsistent_files_are_refused(content: object, word: str, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.pt", content, FLOATS)
    with pytest.raises(WeightsError, match=word) as caught:
        read_torch(path)
    assert "\n" not in str(caught.value)


def test_compression_bombs_are_refused(tmp_path: Path) -> None:
    one = {"x": tensor("0", "Float", 2**22, (2**22,), (1,))}
    packed = write_zip(tmp_path / "a.pt", one, {"0": bytes(2**24)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed, which torch never does"):
        read_torch(packed)
    pairs = b"](" + b"(" + dump("a") + b"Nt" + b"e"
    laughs = b")" + b"2\x86" * 300 + b"N"  # a tuple of a tuple of ..., 300 deep, doubled each time
    for content in (b"}" + laughs + b"s", b"}" + b"(" + laughs + b"u", b"}" + pairs + b"0"):
        assert read_torch(write_zip(tmp_path / "b.pt", content, {})) == {}
    huge = b"}" + b"r\xff\xff\xff\x7f"  # memo number 2**31 - 1
    assert read_torch(write_zip(tmp_path / "b.pt", huge, {})) == {}


@pytest.mark.parametrize("how", WRITERS)
def test_every_truncation_is_refused(how: str, tmp_path: Path) -> None:
    whole = written(tmp_path / "a.pt", ARRAYS, how).read_bytes()
    for kept in sorted({0, 1, 2, 3, 9, *range(0, len(whole), 41), len(whole) - 1}):
        (tmp_path / "b.pt").write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match=r"b\.pt: not readable as"):
            read_torch(tmp_path / "b.pt")


@pytest.mark.parametrize("how", WRITERS)
def test_flipped_bytes_are_read_or_refused(how: str, tmp_path: Path) -> None:
    whole = written(tmp_path / "a.pt", ARRAYS, how).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(whole))] = draw.randrange(256)
        (tmp_path / "b.pt").write_bytes(broken)
        try:
            for stored in read_torch(tmp_path / "b.pt").values():
                stored.load()
        except WeightsError:
            refused += 1
    assert refused > 100


OTHERS = {
    "text": (b"hello, I am no weights file", "neither"),
    "empty": (b"", "empty"),
    "another pickle": (pickle.dumps({"a": 1}, 2), "torch.save"),
    "tar": (b"a" * 257 + b"ustar" + bytes(250), "tar format"),
    "zip": (b"PK\x05\x06" + bytes(18), "neither|broken"),
}


@pytest.mark.parametrize(("data", "word"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(data: bytes, word: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(data)
    with pytest.raises(WeightsError, match=word):
        open_weights(tmp_path / "a.ckpt")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    script = write_zip(tmp_path / "a.pt", {}, {}, **{"constants.pkl": b""})
    big = write_zip(tmp_path / "b.pt", {}, {}, byteorder="big")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("word/document.xml", "")
    for path, word in ((script, "TorchScript"), (big, "byte order"), (tmp_path / "c.pt", "without data.pkl")):
        with pytest.raises(WeightsError, match=word):
            read_torch(path)
    with pytest.raises(WeightsError, match="no such weights file"):
        read_torch(tmp_path / "d.pt")


def test_old_files_count_their_storages(tmp_path: Path) -> None:
    content = {"x": tensor("0", "Float", 4, (4,), (1,), old=True)}
    path = write_old(tmp_path / "a.pt", content, {"0": bytes(16)})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<q", 4) + bytes(16), struct.pack("<q", 2**60) + bytes(16)))
    with pytest.raises(WeightsError, match="exceeds"):
        read_torch(path)
    write_old(path, content, {"7": bytes(16)})
    with pytest.raises(WeightsError, match="'7'"):
        read_torch(path)


def test_a_file_is_what_its_bytes_say_whatever_its_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"x": np.array([1, 2], np.float32)})
    assert open_weights(path)[0]["x"].load().tolist() == [1, 2]
