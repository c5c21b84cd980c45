"""LAPA's latent action quantizer in torch, in use: what the tests compare with.

Written for these tests after the published network (Ye et al. 2024, arXiv 2410.11758), with the names that its files
have, and with all that these hold: buffers, parameters that nothing uses, and an empty one. Frames are (B, C, S, S) in
[0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Gain(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class Depthwise(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dsconv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: torch.Tensor, video: tuple[int, ...]) -> torch.Tensor:
        grid = x.reshape(*video, -1).permute(0, 4, 1, 2, 3)
        done = self.dsconv(F.pad(grid, (1, 1, 1, 1, 2, 0)))
        return done.permute(0, 2, 3, 4, 1).reshape(x.shape)


class TheirAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int, nulls: int):
        super().__init__()
        self.norm, self.context_norm = Gain(dim), Gain(dim)
        self.null_kv = nn.Parameter(torch.randn(heads, 2 * nulls, dim_head))
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(dim_head)) for _ in range(2))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.heads, self.nulls = heads, nulls

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, bias: Any = 0.0) -> torch.Tensor:
        seen = x if context is None else self.context_norm(context)
        keys, values = self.to_kv(seen).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(self.norm(x)), keys, values)
        )
        learned = self.null_kv.unflatten(1, (self.nulls, 2)).expand(len(x), -1, -1, -1, -1)
        k, v = torch.cat([learned[..., 0, :], k], 2), torch.cat([learned[..., 1, :], v], 2)
        q, k = F.normalize(q, dim=-1) * self.q_scale, F.normalize(k, dim=-1) * self.k_scale
        weights = (8 * torch.einsum("bhid,bhjd->bhij", q, k) + bias).softmax(-1)
        return self.to_out(torch.einsum("bhij,bhjd->bihd", weights, v).flatten(2))


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class TheirTransformer(nn.Module):
    def __init__(self, depth: int, dim: int, heads: int, dim_head: int, *, cross: bool = False):
        super().__init__()
        inner = int(4 * (2 / 3) * dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Depthwise(dim),
                    TheirAttention(dim, heads, dim_head, 0),
                    TheirAttention(dim, heads, dim_head, 2) if cross else None,
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, 2 * inner, bias=False),
                        Gate(),
                        nn.Dropout(0.0),
                        nn.Linear(inner, dim, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.norm_out = Gain(dim)

    def forward(self, x: torch.Tensor, video: tuple[int, ...], bias: Any = 0.0, context: Any = None) -> torch.Tensor:
        for position, attention, cross, feed_forward in self.layers:
            x = x + position(x, video)
            x = x + attention(x, bias=bias)
            if cross is not None:
                x = x + cross(x, context)
            x = x + feed_forward(x)
        return self.norm_out(x)


class Bias(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        first, second = (nn.Sequential(nn.Linear(inside, dim), nn.LeakyReLU(0.1)) for inside in (2, dim))
        self.net = nn.ModuleList([first, second, nn.Linear(dim, heads)])

    def forward(self, side: int) -> torch.Tensor:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        x = places[:, None] - places[None]
        x = x.sign() * (x.abs() + 1).log()
        for layer in self.net:
            x = layer(x)
        return x.permute(2, 0, 1)


class TheirQuantizer(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        dim, kernels = config.quant_dim, {4: (3, 2, 1, 3, 1, 0), 1: (3, 2, 1, 4, 1, 0), 16: (3, 2, 1, 3, 2, 1)}
        kernel = kernels[config.code_seq_len]
        self.codebooks = nn.Parameter(torch.randn(config.codebook_size, dim))
        self.project_in, self.project_out = nn.Linear(config.dim, dim), nn.Linear(dim, config.dim)
        first, second = nn.Conv2d(dim, dim, *kernel[:3]), nn.Conv2d(dim, dim, *kernel[3:])
        self.cnn_encoder = nn.Sequential(first, nn.ReLU(), second)

    def summary(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.cnn_encoder(self.project_in(tokens).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        vectors = self.codebooks[codes.flatten()]
        return self.project_out(vectors.reshape(len(codes), vectors.shape[1], -1).transpose(1, 2))


class TheirLatentActionQuantization(nn.Module):
    """`config` has the fields of `mflux_vae.networks.laq.LAQConfig`."""

    def __init__(self, config: Any):
        super().__init__()
        sizes = config.dim, config.heads, config.dim_head
        numbers = config.channels * config.patch_size**2
        self.spatial_rel_pos_bias = Bias(config.dim, config.heads)
        self.to_patch_emb_first_frame = nn.Sequential(
            nn.PixelUnshuffle(config.patch_size),  # (C, p1, p2), in this order
            nn.LayerNorm(numbers),
            nn.Linear(numbers, config.dim),
            nn.LayerNorm(config.dim),
        )
        self.enc_spatial_transformer = TheirTransformer(config.spatial_depth, *sizes)
        self.enc_temporal_transformer = TheirTransformer(config.temporal_depth, *sizes)
        self.vq = TheirQuantizer(config)
        self.dec_spatial_transformer = TheirTransformer(config.spatial_depth, *sizes, cross=True)
        self.to_pixels_first_frame = nn.Sequential(nn.Linear(config.dim, numbers), nn.PixelShuffle(config.patch_size))
        self.side = config.image_size // config.patch_size

    def tokens(self, frame: torch.Tensor) -> torch.Tensor:
        unshuffle, *layers = self.to_patch_emb_first_frame
        return nn.Sequential(*layers)(unshuffle(frame).permute(0, 2, 3, 1))

    def difference(self, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        video = len(first), 2, self.side, self.side
        x = torch.stack([self.tokens(first), self.tokens(last)], 1)
        x = self.enc_spatial_transformer(x.flatten(2, 3).flatten(0, 1), video, self.spatial_rel_pos_bias(self.side))
        x = x.reshape(*video, -1).permute(0, 2, 3, 1, 4)
        x = self.enc_temporal_transformer(x.reshape(-1, 2, x.shape[-1]), video).reshape(x.shape)
        return self.vq.summary(x[..., 1, :]) - self.vq.summary(x[..., 0, :])

    def encode(self, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return torch.cdist(self.difference(first, last), self.vq.codebooks).argmin(-1)

    def decode(self, first: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        x, context = self.tokens(first).flatten(1, 2), self.vq.decode(codes)
        x = self.dec_spatial_transformer(
            x, (len(x), 1, self.side, self.side), self.spatial_rel_pos_bias(self.side), context
        )
        linear, shuffle = self.to_pixels_first_frame
        return shuffle(linear(x).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2))
