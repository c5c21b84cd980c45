"""Layers of autoencoders, NHWC. Attribute names are those of diffusers, so parameter paths equal checkpoint keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.kernels.overrides import overridable
from mflux_vae.runtime.device import is_cpu


def layer_input(x: mx.array, layer: nn.Module) -> mx.array:
    """x in the dtype that a layer computes in: that of its weight. In evaluation on a GPU, float32 stays float32.

    Activations in bfloat16 would cost the latents of Stable Diffusion's autoencoder 1.3 % of their deviation (root mean
    square), weights in bfloat16 cost a few tenths. So weights may be stored in half precision, to be half as large.
    """
    kept = not (layer.training or is_cpu())
    return x.astype(mx.result_type(x.dtype, layer.weight.dtype) if kept else layer.weight.dtype)


class Linear(nn.Linear):
    """`nn.Linear` through this project's kernel."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.linear(x, self.weight, self.get("bias"))


class Conv2d(nn.Module):
    """Convolution; see `layer_input` for its dtype.

    The weight is (O, kh, kw, C), initialised as in torch (Kaiming uniform with a = sqrt 5).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: kernels.Padding = 0,
        bias: bool = True,
    ):
        super().__init__()
        bound = (in_channels * kernel * kernel) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (out_channels, kernel, kernel, in_channels))
        if bias:
            self.bias = mx.random.uniform(-bound, bound, (out_channels,))
        self._stride, self._padding = stride, padding

    def __call__(self, x: mx.array) -> mx.array:
        x = layer_input(x, self)
        return kernels.conv2d(x, self.weight, self.get("bias"), stride=self._stride, padding=self._padding)


class GroupNorm(nn.Module):
    """Group normalisation with scale and shift per channel."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self._groups, self._eps = groups, eps

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.group_norm(x, self._groups, self.weight, self.bias, self._eps)


class TransposedConv2d(nn.Module):
    """Transposed 3x3 convolution with stride 2 and padding 1: output side 2n, or 2n - 1 with `size`.

    The weight is (O, 3, 3, C), initialised as in torch.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        bound = (out_channels * 9) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (out_channels, 3, 3, in_channels))
        self.bias = mx.random.uniform(-bound, bound, (out_channels,))

    def __call__(self, x: mx.array, *, size: tuple[int, int] | None = None) -> mx.array:
        return kernels.conv_transpose2d(layer_input(x, self), self.weight, self.bias, size=size)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as in torch (Ioffe and Szegedy 2015).

    Evaluation uses the running statistics, training those of the batch. Training does not change the running
    statistics, so that a step stays a function of arrays: call `batch_statistics` inside the differentiated or compiled
    function, and `fold_statistics` afterwards. Running statistics get no gradients, even after `unfreeze`.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))
        self._eps, self.momentum = eps, momentum

    @property
    def _no_grad(self) -> set[str]:
        """Names of frozen parameters, read by MLX."""
        frozen: set[str] = self.__dict__.setdefault("_frozen", set())
        frozen |= {"running_mean", "running_var"}
        return frozen

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        self.__dict__["_frozen"] = set(names)

    def __call__(self, x: mx.array, slope: float = 1.0) -> mx.array:
        """Normalize; then leaky ReLU of this slope, unless it is 1."""
        if not self.training:
            y = kernels.batch_norm_apply(x, self.running_mean, self.running_var, self.weight, self.bias, self._eps)
            return y if slope == 1 else kernels.leaky_relu(y, slope)
        y, mean, variance = kernels.batch_norm(x, self.weight, self.bias, self._eps, slope)
        count = math.prod(x.shape[:-1])
        self._seen = [mx.stop_gradient(mean), mx.stop_gradient(variance) * (count / max(count - 1, 1))]
        return y


def batch_statistics(module: nn.Module) -> dict[str, mx.array]:
    """Pop the batch statistics of the last training call of a module.

    Returns:
        mean and unbiased variance (C,) under the parameter names of the running ones; empty without batch norms or in
        evaluation. Averages over micro-batches may be folded.
    """
    seen: dict[str, mx.array] = {}
    for name, part in module.named_modules():
        if isinstance(part, BatchNorm) and "_seen" in part:
            mean, variance = part.pop("_seen")
            prefix = f"{name}." if name else ""
            seen |= {f"{prefix}running_mean": mean, f"{prefix}running_var": variance}
    return seen


def fold_statistics(module: nn.Module, seen: Mapping[str, mx.array]) -> None:
    """Update running statistics with those of `batch_statistics`, by each norm's momentum."""
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, BatchNorm) and f"{prefix}running_mean" in seen:
            for kind in ("running_mean", "running_var"):
                old, new = part[kind], seen[f"{prefix}{kind}"]
                part[kind] = old + part.momentum * (new.astype(old.dtype) - old)


def norm_silu_conv(norm: GroupNorm, conv: Conv2d, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """conv(silu(norm(x))) + residual."""
    settings = norm._groups, norm.weight, norm.bias, norm._eps
    return kernels.norm_silu_conv2d(
        x, settings, conv.weight, conv.get("bias"), padding=conv._padding, residual=residual
    )


class ResnetBlock(nn.Module):
    """Twice norm, SiLU, conv, with a skip connection; dropout before the second convolution in training."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, *, dropout: float = 0.0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)
        if dropout:
            self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array) -> mx.array:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        x = self.conv_shortcut(x) if "conv_shortcut" in self else x
        if "dropout" in self and self.training:
            return x + self.conv2(self.dropout(kernels.silu(self.norm2(h))))
        return norm_silu_conv(self.norm2, self.conv2, h, residual=x)


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a skip connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = [Linear(channels, channels)]

    @overridable
    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        h = self.group_norm(x).reshape(batch, height * width, 1, channels)
        h = kernels.attention(self.to_q(h), self.to_k(h), self.to_v(h), scale=channels**-0.5)
        return x + self.to_out[0](h).reshape(x.shape)


class LinearAttention(nn.Module):
    """Linear attention of latent-diffusion (Katharopoulos et al. 2020): one head, no norm, no skip connection.

    Cost is linear in the number of pixels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.to_qkv = Linear(channels, 3 * channels, bias=False)
        self.to_out = Linear(channels, channels)

    @overridable
    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        q, k, v = mx.split(self.to_qkv(x.reshape(batch, height * width, channels)), 3, axis=-1)
        context = kernels.softmax(k.swapaxes(1, 2)) @ v
        return self.to_out(q @ context).reshape(x.shape)


class Downsample(nn.Module):
    """Halve height and width.

    Args:
        conv: False: average 2x2 pixels.
        padding: of the convolution; at the right and bottom in the published autoencoders.
    """

    def __init__(self, channels: int, *, conv: bool = True, padding: kernels.Padding = ((0, 1), (0, 1))):
        super().__init__()
        if conv:
            self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x) if "conv" in self else avg_pool_2x(x)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, followed by a convolution unless `conv` is False.

    Args:
        out_channels: of the convolution; None: `channels`.
    """

    def __init__(self, channels: int, out_channels: int | None = None, *, conv: bool = True):
        super().__init__()
        if conv:
            self.conv = Conv2d(channels, out_channels or channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        if "conv" not in self:
            return kernels.upsample_nearest_2x(x)
        return kernels.repeat_conv2d(layer_input(x, self.conv), self.conv.weight, self.conv.get("bias"), padding=1)


@overridable
def avg_pool_2x(x: mx.array) -> mx.array:
    """Average 2x2 pixels: (B, H, W, C) -> (B, H // 2, W // 2, C). An odd last row or column is dropped."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


Layer: TypeAlias = Callable[[mx.array], mx.array]


class Stage(nn.Module):
    """Residual blocks at one resolution, each followed by optional attention; then optional down- or upsampling."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attentions: Sequence[nn.Module] = (),
        *,
        down: Downsample | None = None,
        up: Upsample | None = None,
    ):
        super().__init__()
        self.resnets = list(resnets)
        if attentions:
            self.attentions = list(attentions)
        if down is not None:
            self.downsamplers = [down]
        if up is not None:
            self.upsamplers = [up]

    def steps(self) -> Sequence[Layer]:
        """Layers of the stage in order. A caller that iterates over them need not hold the input of the stage."""
        pairs = zip_longest(self.resnets, self.get("attentions", []))
        resamplers = [*self.get("downsamplers", []), *self.get("upsamplers", [])]
        return [*(step for pair in pairs for step in pair if step is not None), *resamplers]

    def __call__(self, x: mx.array) -> mx.array:
        for step in Stage.steps(self):
            x = step(x)
        return x


class MidBlock(nn.Module):
    """Residual block, optional attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, attention: nn.Module | None, dropout: float = 0.0):
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups, dropout=dropout) for _ in range(2)]
        if attention is not None:
            self.attentions = [attention]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for attention in self.get("attentions", []):
            x = attention(x)
        return self.resnets[1](x)
