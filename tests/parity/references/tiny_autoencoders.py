"""TAEF2 and TAEHV as published by Ollin Boer Bohan (madebyollin/taesd, madebyollin/taehv; MIT), with free widths."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def conv(a: int, b: int, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)  # type: ignore[arg-type]


class Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    def __init__(self, n: int, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(conv(n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))
        if pool:
            wide, narrow = nn.Conv2d(n, 4 * n, 1, bias=False), nn.Conv2d(4 * n, n, 1, bias=False)
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * n), nn.ReLU(), narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return F.relu(self.conv(x) + x)


class TAEF2(nn.Module):
    """Images in [0, 1] and latents, NCHW."""

    def __init__(self, n: int, latent: int, encoder: tuple[int, ...], decoder: tuple[int, ...]):
        super().__init__()
        down: list[nn.Module] = []
        for level, blocks in enumerate(encoder):
            down.append(conv(n, n, stride=2, bias=False) if level else conv(3, n))
            down += [Block(n, pool=level == len(encoder) - 1) for _ in range(blocks)]
        up: list[nn.Module] = [Clamp(), conv(latent, n), nn.ReLU()]
        for level, blocks in enumerate(decoder):
            up += [nn.Upsample(scale_factor=2), conv(n, n, bias=False)] if level else []
            up += [Block(n, pool=level == 0) for _ in range(blocks)]
        self.encoder = nn.Sequential(*down, conv(n, latent))
        self.decoder = nn.Sequential(*up, conv(n, 3))


class MemBlock(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.conv = nn.Sequential(conv(2 * n, n), nn.ReLU(), conv(n, n), nn.ReLU(), conv(n, n))

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(torch.cat([x, past], 1)) + x)


class TPool(nn.Module):
    def __init__(self, n: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(n * stride, n, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, channels, height, width = x.shape
        return self.conv(x.reshape(-1, self.stride * channels, height, width))


class TGrow(nn.Module):
    def __init__(self, n: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(n, n * stride, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


def apply(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Frames (N, T, C, H, W) through blocks that see the frame before, zero for the first."""
    batch = x.shape[0]
    x = x.flatten(0, 1)
    for block in model:
        if isinstance(block, MemBlock):
            frames = x.unflatten(0, (batch, -1))
            past = F.pad(frames, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
            x = block(x, past.flatten(0, 1))
        else:
            x = block(x)
    return x.unflatten(0, (batch, -1))


class TAEHV(nn.Module):
    """Images in [0, 1] and latents, NCHW; `encode_video` and `decode_video` of one frame, unclipped."""

    def __init__(self, n: int, latent: int, widths: tuple[int, ...]):
        super().__init__()
        down: list[nn.Module] = [conv(3, n), nn.ReLU()]
        for stride in (2, 2, 1):
            down += [TPool(n, stride), conv(n, n, stride=2, bias=False), *(MemBlock(n) for _ in range(3))]
        up: list[nn.Module] = [Clamp(), conv(latent, widths[0]), nn.ReLU()]
        for a, b, stride in zip(widths[:-1], widths[1:], (1, 2, 2), strict=True):
            up += [*(MemBlock(a) for _ in range(3)), nn.Upsample(scale_factor=2)]
            up += [TGrow(a, stride), conv(a, b, bias=False)]
        self.encoder = nn.Sequential(*down, conv(n, latent))
        self.decoder = nn.Sequential(*up, nn.ReLU(), conv(widths[-1], 3))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return apply(self.encoder, x[:, None].repeat_interleave(4, dim=1))[:, 0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return apply(self.decoder, z[:, None])[:, 3]
