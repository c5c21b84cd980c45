"""latent-diffusion's autoencoder in torch, as its `ddconfig` describes it: what the tests compare with.

Written for these tests after the published architecture (Rombach et al. 2022, appendix G; Esser et al. 2021, table 7),
with the names that its files have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class TheirBlock(nn.Module):
    def __init__(self, inside: int, outside: int, dropout: float):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inside, 1e-6), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, outside, 1e-6), nn.Conv2d(outside, outside, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(self.drop(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class TheirAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) * x.shape[1] ** -0.5, dim=2)
        return x + self.proj_out(torch.einsum("bnm,bcm->bcn", weights, v).view_as(x))


class TheirLinearAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.to_qkv, self.to_out = nn.Conv2d(width, 3 * width, 1, bias=False), nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)
        context = torch.einsum("bdn,ben->bde", k.softmax(dim=-1), v)
        return self.to_out(torch.einsum("bde,bdn->ben", context, q).view_as(x))


class TheirDownsample(nn.Module):
    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class TheirUpsample(nn.Module):
    def __init__(self, width: int, with_conv: bool):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


ATTENTION = {"vanilla": TheirAttention, "linear": TheirLinearAttention, "none": lambda width: nn.Identity()}


def level(widths: Sequence[int], attention: Any, dropout: float) -> nn.Module:
    part = nn.Module()
    part.block = nn.ModuleList(TheirBlock(a, b, dropout) for a, b in pairwise(widths))
    part.attn = nn.ModuleList(attention(width) for width in widths[1:]) if attention else nn.ModuleList()
    return part


def middle(width: int, attention: Any, dropout: float) -> nn.Module:
    part = nn.Module()
    part.block_1, part.block_2 = TheirBlock(width, width, dropout), TheirBlock(width, width, dropout)
    part.attn_1 = attention(width)
    return part


def run_level(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for i, block in enumerate(part.block):
        x = block(x)
        if len(part.attn):
            x = part.attn[i](x)
    for name in ("downsample", "upsample"):
        x = getattr(part, name)(x) if hasattr(part, name) else x
    return x


class TheirHalf(nn.Module):
    """Encoder or decoder, as far as they are alike."""

    def ends(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.norm_out(x)))

    def through_middle(self, x: torch.Tensor) -> torch.Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))


class TheirEncoder(TheirHalf):
    def __init__(self, c: dict[str, Any], attention: Any):
        super().__init__()
        mult, previous, resolution = c["ch_mult"], c["ch"], c["resolution"]
        self.conv_in = nn.Conv2d(c["in_channels"], previous, 3, padding=1)
        self.down = nn.ModuleList()
        for i, factor in enumerate(mult):
            widths = [previous] + [factor * c["ch"]] * c["num_res_blocks"]
            self.down.append(level(widths, attention if resolution in c["attn_resolutions"] else None, c["dropout"]))
            previous = widths[-1]
            if i < len(mult) - 1:
                self.down[-1].downsample = TheirDownsample(previous, c["resamp_with_conv"])
                resolution //= 2
        self.mid = middle(previous, attention, c["dropout"])
        self.norm_out = nn.GroupNorm(32, previous, 1e-6)
        self.conv_out = nn.Conv2d(previous, (1 + c["double_z"]) * c["z_channels"], 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for part in self.down:
            x = run_level(part, x)
        return self.ends(self.through_middle(x))


class TheirDecoder(TheirHalf):
    def __init__(self, c: dict[str, Any], attention: Any):
        super().__init__()
        mult, levels = c["ch_mult"], len(c["ch_mult"])
        previous, resolution = mult[-1] * c["ch"], c["resolution"] // 2 ** (levels - 1)
        self.conv_in = nn.Conv2d(c["z_channels"], previous, 3, padding=1)
        self.mid = middle(previous, attention, c["dropout"])
        parts = []
        for i in reversed(range(levels)):
            widths = [previous] + [mult[i] * c["ch"]] * (c["num_res_blocks"] + 1)
            parts.append(level(widths, attention if resolution in c["attn_resolutions"] else None, c["dropout"]))
            previous = widths[-1]
            if i:
                parts[-1].upsample = TheirUpsample(previous, c["resamp_with_conv"])
                resolution *= 2
        self.up = nn.ModuleList(reversed(parts))
        self.norm_out = nn.GroupNorm(32, previous, 1e-6)
        self.conv_out = nn.Conv2d(previous, c["out_ch"], 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.through_middle(self.conv_in(z))
        for part in reversed(self.up):
            x = run_level(part, x)
        return self.ends(x)


class TheirAutoencoderKL(nn.Module):
    def __init__(self, embed_dim: int, **ddconfig: Any):
        super().__init__()
        c = {"dropout": 0.0, "resamp_with_conv": True, "double_z": True, "attn_type": "vanilla", **ddconfig}
        attention = ATTENTION["linear" if c.get("use_linear_attn") else c["attn_type"]]
        self.encoder, self.decoder = TheirEncoder(c, attention), TheirDecoder(c, attention)
        times, z = 1 + c["double_z"], c["z_channels"]
        self.quant_conv = nn.Conv2d(times * z, times * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z, 1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))
