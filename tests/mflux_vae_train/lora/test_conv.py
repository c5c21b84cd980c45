"""LoRA on convolutions: files in PEFT's and kohya's shapes, fusing, dropout, choice of layers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.networks.layers import Conv2d
from mflux_vae.weights.formats.files import write_safetensors
from mflux_vae_train import lora

X = mx.random.normal((2, 6, 5, 4), key=mx.random.key(1))
KOHYA = {"lora_unet_down": ("down",), "lora_unet_block_1": ("block.1",), "lora_unet_out": ("out",)}


class Net(nn.Module):
    """A strided convolution, a 1x1 convolution without bias, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down = Conv2d(4, 6, 3, stride=2, padding=1)
        self.block = [nn.Identity(), Conv2d(6, 5, 1, bias=False)]
        self.out = nn.Linear(5, 3)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out(mx.tanh(self.block[1](mx.tanh(self.down(x)))))


def adapted(dropout: float = 0.0) -> Net:
    """The same weights on every call; the adapter's matrices are random."""
    mx.random.seed(0)
    net = Net()
    lora.add_lora(net, ["down", "block.*", "out"], rank=2, alpha=3.0, dropout=dropout)
    for layer in lora.layers(net).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    return net


def test_matrices_have_the_shapes_of_peft() -> None:
    shapes = {key: tuple(value.shape) for key, value in lora.adapter_tensors(adapted(), "unet").items()}
    assert shapes == {
        "unet.down.lora_A.weight": (2, 4, 3, 3),
        "unet.down.lora_B.weight": (6, 2, 1, 1),
        "unet.block.1.lora_A.weight": (2, 6, 1, 1),
        "unet.block.1.lora_B.weight": (5, 2, 1, 1),
        "unet.out.lora_A.weight": (2, 5),
        "unet.out.lora_B.weight": (3, 2),
    }


def test_fused_weights_give_the_same() -> None:
    net = adapted()
    expected = net(X)
    plain = Net()
    with lora.disabled(net):
        plain.update(net.parameters())
        assert mx.array_equal(net(X), plain(X)) and not mx.allclose(net(X), expected)
    lora.fuse(net)
    assert not lora.layers(net) and type(net.down) is Conv2d
    np.testing.assert_allclose(net(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kohya", [False, True])
def test_files_are_read_back(tmp_path: Path, kohya: bool) -> None:
    net, path = adapted(), tmp_path / "adapter.safetensors"
    if kohya:
        tensors = lora.kohya_tensors(net, KOHYA)
        assert tensors["lora_unet_down.lora_down.weight"].shape == (2, 4, 3, 3)
        assert tensors["lora_unet_block_1.lora_up.weight"].shape == (5, 2, 1, 1)
        write_safetensors(path, tensors, {})
    else:
        lora.save_adapter({"unet": net}, path)
    other = Net()
    with lora.disabled(net):
        other.update(net.parameters())
    lora.load_adapter({"unet": other}, path, {"unet": KOHYA})
    np.testing.assert_allclose(other(X), net(X), rtol=1e-5, atol=1e-6)


def test_a_matrix_for_another_kernel_is_refused(tmp_path: Path) -> None:
    tensors = lora.adapter_tensors(adapted(), "unet")
    tensors["unet.down.lora_A.weight"] = mx.zeros((2, 4, 1, 1))
    write_safetensors(tmp_path / "adapter.safetensors", tensors, {})
    with pytest.raises(WeightsError, match="down"):
        lora.load_adapter({"unet": Net()}, tmp_path / "adapter.safetensors")


def test_all_layers_are_the_linear_ones() -> None:
    net = Net()
    assert list(lora.matching(net, lora.patterns_of(lora.ALL_LAYERS, {}))) == ["out"]
    assert lora.matching(net, ["down", "out"]) == {"down": 9 * 4 + 6, "out": 8}
    with pytest.raises(SettingsError, match="DoRA"):
        lora.add_lora(net, ["down"], rank=2, dora=True)


def test_dropout_changes_the_adapter_alone() -> None:
    net, rows = adapted(dropout=0.5), mx.array([[1, 2], [3, 4]], mx.uint32)
    plain, base = net.down(X), net.down.linear(X)
    with lora.dropout_keys(net, rows):
        dropped, again = net.down(X), net.down(X)
    with lora.dropout_keys(net, rows[:1]):
        alone = net.down(X[:1])
    assert mx.array_equal(dropped, again) and not mx.allclose(dropped, plain)
    np.testing.assert_allclose(alone, dropped[:1], rtol=1e-5, atol=1e-6)
    assert not mx.allclose(dropped, base)


def test_matrices_get_gradients() -> None:
    net = adapted()
    _, gradients = nn.value_and_grad(net, lambda: mx.square(net(X)).mean())()
    found = dict(tree_flatten(gradients))
    assert found.keys() == {f"{path}.{name}" for path in lora.layers(net) for name in ("lora_a", "lora_b")}
    step = 1e-2

    def loss(value: float) -> float:
        original = net.down.lora_a
        net.down.lora_a = original.at[7, 1].add(value)
        result = mx.square(net(X)).mean().item()
        net.down.lora_a = original
        return result

    assert found["down.lora_a"][7, 1].item() == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=0.02)
