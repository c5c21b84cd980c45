"""Number formats: 8-bit floats are decoded and scaled, other formats are refused with file, key and fix."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae.cli import latent_file
from mflux_vae.errors import ImageError, WeightsError
from mflux_vae.vae import VAE
from mflux_vae.weights.formats import files
from mflux_vae.weights.formats.lazy_tensor import decode_fp8
from mflux_vae.weights.keymaps.rules import load_strict
from tests.mflux_vae.small_models import small_kl

CODES = np.arange(256, dtype=np.uint8)
E4M3 = {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x7E: 448, 0xB8: -1, 0xC4: -3}
E5M2 = {0x00: 0, 0x01: 2**-16, 0x3C: 1, 0x3D: 1.25, 0x7B: 57344, 0x7C: math.inf, 0xC1: -2.5}


def stored(
    path: Path, tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file with any dtypes."""
    content: dict = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, values) in tensors.items():
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(content).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def read(path: Path) -> dict[str, mx.array]:
    return {name: tensor.load() for name, tensor in files.open_weights(path)[0].items()}


@pytest.mark.parametrize(("dtype", "values"), [("F8_E4M3", E4M3), ("F8_E5M2", E5M2)])
def test_eight_bit_floats_are_read_as_the_values_they_stand_for(dtype: str, values: dict, tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", {"x": (dtype, [256], CODES.tobytes())})
    for found in (read(path)["x"], files.read_safetensors(path)[0]["x"]):
        assert found.dtype == mx.bfloat16
        assert {code: found[code].item() for code in values} == values
    again = decode_fp8(mx.array(CODES), dtype.lower()).astype(mx.float32)
    assert mx.isnan(again).sum() == (2 if dtype == "F8_E4M3" else 6)
    if dtype == "F8_E4M3":
        finite = mx.array(np.flatnonzero(CODES & 0x7F != 0x7F))  # MLX 0.32.2 reads NaN as 480
        assert mx.array_equal(again[finite], mx.from_fp8(mx.array(CODES), mx.float32)[finite])


def test_torch_files_with_eight_bit_floats(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        x = torch.tensor(CODES).view(dtype).reshape(16, 16)
        torch.save({"x": x, "t": x.T}, tmp_path / "a.pt")
        found = read(tmp_path / "a.pt")
        for name, expected in (("x", x), ("t", x.T)):
            np.testing.assert_array_equal(np.array(found[name].astype(mx.float32)), expected.float().numpy())
    torch.save({"x": torch.tensor(CODES).view(torch.float8_e4m3fnuz)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt: x is stored as float8_e4m3fnuz"):
        read(tmp_path / "a.pt")


WEIGHT = ("F8_E4M3", [2, 2], b"\x38\x40\x44\xb8")  # 1 2 3 -1


def floats(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


HALF = ("F32", [], floats(0.5))
QUANT = b'{"format": "float8_e4m3fn"}'


@pytest.mark.parametrize(
    "beside",
    [
        {"scaled_fp8": ("F8_E4M3", [0], b""), "a.scale_weight": HALF},
        {"model.scaled_fp8": ("F8_E4M3", [2], b"\0\0"), "a.scale_weight": ("F32", [1], floats(0.5))},
        {"a.scale_weight": HALF, "a.scale_input": ("F32", [1], floats(7))},
        {"a.weight_scale": HALF, "a.input_scale": HALF, "a.comfy_quant": ("U8", [len(QUANT)], QUANT)},
    ],
)
def test_scales_are_multiplied_in(beside: dict, tmp_path: Path) -> None:
    rest = {"a.weight": WEIGHT, "a.bias": ("F32", [2], floats(1, 2))}
    expected = {"a.weight": [[0.5, 1], [1.5, -0.5]], "a.bias": [1, 2]}
    found = read(stored(tmp_path / "a.safetensors", rest | beside))
    assert {name: tensor.tolist() for name, tensor in found.items()} == expected
    # a scale in another shard than its weight
    stored(tmp_path / "m-1.safetensors", rest)
    stored(tmp_path / "m-2.safetensors", beside)
    shards = dict.fromkeys(rest, "m-1.safetensors") | dict.fromkeys(beside, "m-2.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = files.read_folder(tmp_path, "m")
    assert {name: tensor.tolist() for name, tensor in found.items()} == expected


def test_a_scale_per_row_and_a_wide_layer_of_a_scaled_file(tmp_path: Path) -> None:
    tensors = {
        "scaled_fp8": ("F8_E4M3", [0], b""),
        "a.weight": WEIGHT,
        "a.scale_weight": ("F32", [2, 1], floats(2, 10)),
        "b.weight": ("F32", [1], floats(3)),
        "b.scale_weight": HALF,
    }
    found = read(stored(tmp_path / "a.safetensors", tensors))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "a.weight": [[2, 4], [30, -10]],
        "b.weight": [1.5],
    }


@pytest.mark.parametrize(
    ("beside", "metadata", "word"),
    [
        ({"a.weight_scale": ("F32", [1, 2], floats(1, 1))}, {}, "blocks"),
        ({"a.weight_scale_inv": ("F32", [1], floats(1))}, {}, "block"),
        ({"a.weight_scale_2": HALF}, {}, "NVFP4"),
        ({"a.weight.absmax": HALF}, {}, "bitsandbytes"),
        ({"a.comfy_quant": ("U8", [19], b'{"format": "mxfp8"}')}, {}, "mxfp8"),
        ({"a.comfy_quant": ("U8", [2], b"{]")}, {}, "None"),
        ({}, {"_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}'}, "nvfp4"),
        ({}, {"_quantization_metadata": "["}, "_quantization_metadata"),
        ({"b": ("F4", [1], b"")}, {}, "stored as F4"),
    ],
)
def test_other_quantization_is_refused_by_name(beside: dict, metadata: dict, word: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "a.safetensors", {"a.weight": WEIGHT, **beside}, metadata)
    with pytest.raises(WeightsError, match=rf"a\.safetensors: .*{word}"):
        files.open_weights(path)


@pytest.mark.parametrize("dtype", ["U8", "I8", "I32", "I64", "BOOL"])
def test_whole_numbers_are_no_weights(dtype: str, tmp_path: Path) -> None:
    network = nn.Linear(2, 1, bias=False)
    size = {"I32": 4, "I64": 8}.get(dtype, 1)
    tensors = read(stored(tmp_path / "a.safetensors", {"weight": (dtype, [1, 2], bytes(2 * size))}))
    with pytest.raises(WeightsError, match="not floats: weight is"):
        load_strict(network, tensors, where="a.safetensors")


@pytest.mark.parametrize(
    ("stored_as", "word"),
    [
        (("U8", [4, 1, 1], bytes(4)), "uint8"),
        (("I32", [4, 1, 1], bytes(16)), "int32"),
        (("F32", [4, 1, 1], floats(1, 2, 3, math.nan)), "NaN"),
    ],
)
def test_latents_that_are_no_numbers_are_refused(stored_as: tuple, word: str, tmp_path: Path) -> None:
    pictures = {"a.png": {"size": [8, 8], "crc32": 0}}
    metadata = {"format": latent_file.FORMAT, "settings": "{}", "pictures": json.dumps(pictures)}
    path = stored(tmp_path / "l.safetensors", {"a.png": stored_as}, metadata)
    with pytest.raises(WeightsError, match=rf"l\.safetensors: a\.png .*{word}"):
        latent_file.read(path)
    stored(path, {"a.png": ("F64", [4, 1, 1], np.arange(4.0).tobytes())}, metadata)
    assert latent_file.read(path)[0]["a.png"].latents.flatten().tolist() == [0, 1, 2, 3]


def test_decode_takes_floats_only() -> None:
    vae = VAE(network=small_kl())
    with pytest.raises(ImageError, match="int32"):
        vae.decode(mx.zeros((1, vae.latent_channels, 2, 2), mx.int32))


def test_a_gguf_file_is_called_so(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.safetensors"):
        (tmp_path / name).write_bytes(b"GGUF\3\0\0\0" + bytes(100))
        with pytest.raises(WeightsError, match="GGUF"):
            files.open_weights(tmp_path / name)
