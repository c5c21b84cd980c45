"""The KL-regularised convolutional autoencoder of Stable Diffusion, SDXL, SD3 and FLUX (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.networks.ddconfig import kl_settings
from mflux_vae.networks.latent_scaling import ScaledConfig, ScaledLatents
from mflux_vae.networks.layers import (
    Attention,
    Conv2d,
    Downsample,
    GroupNorm,
    LinearAttention,
    MidBlock,
    ResnetBlock,
    Stage,
    Upsample,
    norm_silu_conv,
)
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.utils.formatting import first_few

DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
"""Names in diffusers of a level without and with attention."""

ATTENTION_TYPES = ("vanilla", "linear")

C = TypeVar("C", bound="AutoencoderKLConfig")


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(ScaledConfig):
    """Fields of the config.json of diffusers' `AutoencoderKL`; defaults are those of Stable Diffusion.

    Level 0 has the full resolution, in encoder and decoder. diffusers lacks the fields from
    `decoder_block_out_channels` on: `to_dict` omits them if they have their defaults.

    Attributes:
        in_channels, out_channels: channels of an image.
        latent_channels: channels of a latent.
        block_out_channels: channels of each level; every level but the last halves the resolution.
        layers_per_block: residual blocks of an encoder level; the decoder has one more.
        norm_num_groups: groups of every group norm; divides all channel counts.
        scaling_factor, shift_factor: scaled latents are (latents - shift) * scale.
        latents_mean, latents_std: per channel; with both, scaled latents are (latents - mean) * scale / std.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions around the latents.
        mid_block_add_attention: attention at the lowest resolution.
        force_upcast: whether the network overflows in float16.
        sample_size: side of the training images, pixels.
        encoder_attention, decoder_attention: levels with attention after each residual block; `down_block_types` and
            `up_block_types` in a config.json.
        decoder_block_out_channels: channels of the decoder, if different.
        attention_type: "vanilla", or "linear" (latent-diffusion: no norm, no skip connection).
        dropout: dropout rate of residual blocks in training.
        resample_with_conv: False: average pooling and nearest neighbour instead of convolutions.
        double_z: False: an encoder without variances, with a point posterior.
        z_channels: channels inside the quant convolutions, if not `latent_channels`.
        stem_channels: channels before the first level, if different.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    sample_size: int = 512
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    decoder_block_out_channels: tuple[int, ...] | None = None
    attention_type: str = "vanilla"
    dropout: float = 0.0
    resample_with_conv: bool = True
    double_z: bool = True
    z_channels: int | None = None
    stem_channels: int | None = None

    NAME: ClassVar[str] = "AutoencoderKL"
    ABSENT: ClassVar[Mapping[str, Any]] = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}
    """Defaults of diffusers for keys missing in a config.json, where they differ from ours."""
    UNKNOWN_TO_DIFFUSERS: ClassVar[tuple[str, ...]] = (
        "decoder_block_out_channels",
        "attention_type",
        "dropout",
        "resample_with_conv",
        "double_z",
        "z_channels",
        "stem_channels",
    )

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "decoder_block_out_channels", "latents_mean", "latents_std"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        for name in ("encoder_attention", "decoder_attention"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        # Normalise, so that equal networks have equal configurations.
        for name, same in (
            ("decoder_block_out_channels", self.block_out_channels),
            ("z_channels", self.latent_channels),
            ("stem_channels", next(iter(self.block_out_channels), None)),
        ):
            if getattr(self, name) == same:
                object.__setattr__(self, name, None)
        self._check()

    def _check(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{self.NAME}: {name} must be positive, not {getattr(self, name)}")
        if self.z_channels is not None and self.z_channels < 1:
            raise SettingsError(f"{self.NAME}: z_channels must be positive, not {self.z_channels}")
        for name in ("block_out_channels", "decoder_block_out_channels", "stem_channels"):
            given = getattr(self, name)
            widths = () if given is None else (given,) if name == "stem_channels" else given
            if any(c < 1 or c % self.norm_num_groups for c in widths) or not self.block_out_channels:
                raise SettingsError(
                    f"{self.NAME}: {name} {widths} must be multiples of norm_num_groups ({self.norm_num_groups})"
                )
        levels = len(self.block_out_channels)
        if len(self.decoder_widths) != levels:
            raise SettingsError(
                f"{self.NAME}: block_out_channels and decoder_block_out_channels differ in length, "
                f"{levels} and {len(self.decoder_widths)}"
            )
        for name in ("encoder_attention", "decoder_attention"):
            if beyond := [level for level in getattr(self, name) if not 0 <= level < levels]:
                raise SettingsError(f"{self.NAME}: {name} {beyond} beyond the levels 0 to {levels - 1}")
        for name in ("latents_mean", "latents_std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.latent_channels:
                raise SettingsError(f"{self.NAME}: {name} has {len(given)} values for {self.latent_channels} channels")
        if self.attention_type not in ATTENTION_TYPES:
            kinds = ", ".join(ATTENTION_TYPES)
            raise SettingsError(f"{self.NAME}: attention_type is one of {kinds}, not {self.attention_type!r}")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"{self.NAME}: dropout is at least 0 and below 1, not {self.dropout}")
        if not self.scaling_factor:
            raise SettingsError(f"{self.NAME}: scaling_factor must not be 0")
        if self.z_channels is not None and not (self.use_quant_conv and self.use_post_quant_conv):
            raise SettingsError(f"{self.NAME}: z_channels that are not latent_channels need both quant convolutions")

    @property
    def downsampling(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder."""
        return self.decoder_block_out_channels or self.block_out_channels

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """Read a config.json of diffusers or of `to_dict`.

        Raises:
            SettingsError: an unsupported or invalid configuration.
        """
        if config.get("act_fn", "silu") not in ("silu", "swish"):
            raise SettingsError(f"{cls.NAME}: act_fn {config['act_fn']!r} not supported; only 'silu'")
        given = {key: value for key, value in config.items() if key in cls.__dataclass_fields__ and value is not None}
        given = {**cls.ABSENT, **given}
        try:
            levels = len(given.get("block_out_channels", cls.block_out_channels))
            given["encoder_attention"] = _attention_levels(cls.NAME, config, "down_block_types", DOWN, levels)
            turned = _attention_levels(cls.NAME, config, "up_block_types", UP, levels)
            given["decoder_attention"] = tuple(sorted(levels - 1 - block for block in turned))
            return cls(**given)
        except TypeError as error:
            raise SettingsError(f"{cls.NAME}: invalid configuration ({error})") from error

    @classmethod
    def from_ddconfig(cls: type[C], ddconfig: Mapping[str, Any], embed_dim: int | None = None, **settings: Any) -> C:
        """Read a `ddconfig` of latent-diffusion, or a whole configuration that contains one.

        Args:
            ddconfig: see `networks.ddconfig.kl_settings`.
            embed_dim: latent channels; None: `embed_dim` beside the ddconfig, else z_channels.
            settings: further fields, such as `scaling_factor` (default 1).

        Raises:
            SettingsError: a key is missing, unknown or not supported.
        """
        try:
            return cls(**{"scaling_factor": 1.0, **kl_settings(ddconfig, embed_dim), **settings})
        except TypeError as error:
            raise SettingsError(f"{cls.NAME}: invalid ddconfig ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json for diffusers.

        For a network that diffusers lacks, `_class_name` is `AutoencoderKLExtended`, which diffusers refuses, and
        `_not_in_diffusers` lists the reasons. `dropout` is not one: diffusers ignores it with a warning.
        """
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        beyond = [
            name for name in self.UNKNOWN_TO_DIFFUSERS if getattr(self, name) != self.__dataclass_fields__[name].default
        ]
        for name in ("encoder_attention", "decoder_attention", *self.UNKNOWN_TO_DIFFUSERS):
            if name not in beyond:
                del values[name]
        levels = range(len(self.block_out_channels))
        head: dict[str, Any] = {"_class_name": self.NAME}
        if reasons := [name for name in beyond if name != "dropout"]:
            head = {"_class_name": f"{self.NAME}Extended", "_not_in_diffusers": reasons}
        return {
            **head,
            "act_fn": "silu",
            "down_block_types": [DOWN[level in self.encoder_attention] for level in levels],
            "up_block_types": [UP[level in self.decoder_attention] for level in reversed(levels)],
            **values,
        }


def _attention_levels(
    network: str, config: Mapping[str, Any], key: str, kinds: Sequence[str], levels: int
) -> tuple[int, ...]:
    """Indices of the blocks with attention in a list of diffusers' block names."""
    blocks = config.get(key) or [kinds[0]] * levels
    if unknown := set(blocks) - set(kinds):
        raise SettingsError(
            f"{network}: {key} {first_few(sorted(map(str, unknown)))} not supported; only {', '.join(kinds)}"
        )
    if len(blocks) != levels:
        raise SettingsError(f"{network}: {len(blocks)} {key} for {levels} block_out_channels")
    return tuple(i for i, kind in enumerate(blocks) if kind == kinds[1])


def _attention(config: AutoencoderKLConfig, width: int) -> nn.Module:
    if config.attention_type == "linear":
        return LinearAttention(width)
    return Attention(width, config.norm_num_groups)


def _stage(config: AutoencoderKLConfig, widths: Sequence[int], attention: bool, **resample: Any) -> Stage:
    """A level: residual blocks from each width to the next, each followed by optional attention."""
    resnets = [ResnetBlock(a, b, config.norm_num_groups, dropout=config.dropout) for a, b in pairwise(widths)]
    attentions = [_attention(config, width) for width in widths[1:]] if attention else []
    return Stage(resnets, attentions, **resample)


def _mid_block(config: AutoencoderKLConfig, width: int) -> MidBlock:
    attention = _attention(config, width) if config.mid_block_add_attention else None
    return MidBlock(width, config.norm_num_groups, attention=attention, dropout=config.dropout)


class Encoder(nn.Module):
    """Pixels to latent moments: (B, H, W, in) -> (B, H/f, W/f, 2 * z); z channels without variances."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels = config.block_out_channels
        previous = config.stem_channels or channels[0]
        self.conv_in = Conv2d(config.in_channels, previous, 3, padding=1)
        self.down_blocks = []
        for level, width in enumerate(channels):
            widths = [previous] + [width] * config.layers_per_block
            down = Downsample(width, conv=config.resample_with_conv) if level < len(channels) - 1 else None
            self.down_blocks.append(_stage(config, widths, level in config.encoder_attention, down=down))
            previous = width
        self.mid_block = _mid_block(config, previous)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, previous)
        self.conv_out = Conv2d(
            previous, (1 + config.double_z) * (config.z_channels or config.latent_channels), 3, padding=1
        )

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for step in chain.from_iterable(block.steps() for block in self.down_blocks):
            x = step(x)
        x = self.mid_block(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class Decoder(nn.Module):
    """Latents to pixels: (B, h, w, z) -> (B, f*h, f*w, out)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels = config.decoder_widths
        previous = channels[-1]
        self.conv_in = Conv2d(config.z_channels or config.latent_channels, previous, 3, padding=1)
        self.mid_block = _mid_block(config, previous)
        self.up_blocks = []
        for level in reversed(range(len(channels))):
            widths = [previous] + [channels[level]] * (config.layers_per_block + 1)
            up = Upsample(channels[level], conv=config.resample_with_conv) if level else None
            self.up_blocks.append(_stage(config, widths, level in config.decoder_attention, up=up))
            previous = channels[level]
        self.conv_norm_out = GroupNorm(config.norm_num_groups, previous)
        self.conv_out = Conv2d(previous, config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(z))
        for step in chain.from_iterable(block.steps() for block in self.up_blocks):
            x = step(x)
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class AutoencoderKL(ScaledLatents):
    """Encoder and decoder with a diagonal Gaussian posterior; images in [-1, 1], latents unscaled.

    A new network is in evaluation mode; `train()` enables dropout.
    """

    def __init__(self, config: AutoencoderKLConfig | None = None):
        super().__init__()
        self.config: AutoencoderKLConfig = config or AutoencoderKLConfig()
        config = self.config
        z, latent, times = config.z_channels or config.latent_channels, config.latent_channels, 1 + config.double_z
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(times * z, times * latent, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(latent, z, 1)
        self.eval()

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C) in [-1, 1] -> posterior over (B, H/f, W/f, latent)."""
        moments = self.encoder(pixels)
        moments = self.quant_conv(moments) if "quant_conv" in self else moments
        return DiagonalGaussian.from_moments(moments) if self.config.double_z else DiagonalGaussian.point(moments)

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, latent) unscaled -> (B, f*h, f*w, C), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents) if "post_quant_conv" in self else latents)
