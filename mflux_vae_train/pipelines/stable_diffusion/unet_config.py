"""Configuration of diffusers' UNet2DConditionModel, as far as Stable Diffusion 1, 2 and XL use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.loading.config_check import JSONConfig

C = TypeVar("C", bound="UNetConfig")

Depths = int | tuple[int | tuple[int, ...], ...]
"""Transformer blocks: the same after each resnet, by level, or by level and resnet."""

TIME_IDS = 6
"""Numbers of SDXL's size conditioning: original height and width, crop's top and left, target height and width."""

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MID = {None: False, "UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True}
"""Kinds of blocks: whether they have attention."""

_OTHER_INPUTS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an InstructPix2Pix model, which edits images",
    9: "an inpainting model",
}
"""Inputs of models that take an image beside the noisy latents."""

_REQUIRED: Mapping[str, object] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": False,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""Options of diffusers with their only supported value. null stands for the default, as in old files."""

_MOST = 1000
"""More layers are a mistake in a file."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """The layers at one resolution, on the way down, in the middle or on the way up.

    Attributes:
        channels: of the outputs.
        skips: additional input channels of each resnet, from the way down; empty elsewhere.
        depths: transformer blocks after each resnet; empty without attention.
        resamples: whether down- or upsampling follows.
    """

    channels: int
    layers: int
    heads: int
    skips: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    resamples: bool = False


@dataclass(frozen=True, kw_only=True)
class UNetConfig(JSONConfig):
    """config.json of diffusers' UNet2DConditionModel; the defaults are diffusers'.

    Attributes:
        attention_head_dim: number of heads, in spite of its name (diffusers issue 2011).
        transformer_layers_per_block, reverse_transformer_layers_per_block: on the way down and in the middle, and on
            the way up; None: the reverse of the first.
        mid_block_type: None leaves out the middle.
        addition_embed_type: "text_time" for SDXL's pooled prompt and sizes, or None.
        projection_class_embeddings_input_dim: width of the pooled prompt plus 6 * addition_time_embed_dim.
        sample_size: side of the latents that the model was trained with; not used here.
    """

    kinds: ClassVar[dict[str, object]] = {"_class_name": "UNet2DConditionModel"}

    sample_size: int | tuple[int, ...] | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Read a parsed config.json, also of an old version of diffusers.

        Raises:
            SettingsError: another kind of model, or an unsupported option.
        """
        given = {name: value for name, value in values.items() if value is not None or name == "mid_block_type"}
        for name, value in given.items():
            required = _REQUIRED.get(name, value)
            alike = isinstance(value, list) and all(item == required for item in value)
            if value != required and not alike:
                raise _unsupported(f"{name} {value!r} is not supported", f"supported is {required!r}")
        width = given.get("cross_attention_dim")
        if isinstance(width, list) and len(set(map(str, width))) == 1:
            given["cross_attention_dim"] = width[0]
        return super().from_dict(given)

    def __post_init__(self) -> None:
        if (inputs := self.in_channels) != self.out_channels:
            kind = _OTHER_INPUTS.get(inputs, "another kind of model")
            raise _unsupported(f"{inputs} input and {self.out_channels} output channels are those of {kind}")
        self._check_addition()
        levels = len(self.block_out_channels)
        for name, kinds in (("down_block_types", _DOWN), ("up_block_types", _UP)):
            found = getattr(self, name)
            if unknown := [kind for kind in found if kind not in kinds]:
                raise _unsupported(f"{unknown[0]!r} in {name} is not supported", f"known are {', '.join(kinds)}")
            if len(found) != levels:
                raise _unsupported(f"{len(found)} {name} for {levels} block_out_channels")
        if self.mid_block_type not in _MID:
            raise _unsupported(f"mid_block_type {self.mid_block_type!r} is not supported")
        depths = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block or 1
        if not all(0 <= count <= _MOST for value in (*depths, self.layers_per_block) for count in _numbers(value)):
            raise _unsupported(f"the numbers of layers must be between 0 and {_MOST}")
        every = [*self.down, *([] if self.mid is None else [self.mid]), *self.up]
        if any(level.channels % self.norm_num_groups for level in every):
            raise _unsupported(f"block_out_channels must be multiples of norm_num_groups {self.norm_num_groups}")
        if any(level.depths and level.channels % level.heads for level in every):
            raise _unsupported("block_out_channels must be multiples of attention_head_dim, the number of heads")

    def _check_addition(self) -> None:
        if self.addition_embed_type not in (None, "text_time"):
            raise _unsupported(f"addition_embed_type {self.addition_embed_type!r} is not supported")
        if self.addition_embed_type is None:
            return
        width, size = self.projection_class_embeddings_input_dim, self.addition_time_embed_dim
        if width is None or size is None or width <= TIME_IDS * size:
            raise _unsupported("text_time needs addition_time_embed_dim and projection_class_embeddings_input_dim")
        if width == self.cross_attention_dim + (TIME_IDS - 1) * size:  # one encoder, an aesthetic score for the target
            raise _unsupported("its sizes are those of SDXL's refiner, which is not supported", "give the base model")

    @property
    def time_width(self) -> int:
        """Width of the embedded timestep."""
        return 4 * self.block_out_channels[0]

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled prompt; None if the model takes none."""
        if self.addition_embed_type is None:
            return None
        assert self.projection_class_embeddings_input_dim is not None and self.addition_time_embed_dim is not None
        return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

    @property
    def down(self) -> list[Level]:
        """Levels on the way down."""
        last = len(self.block_out_channels) - 1
        return [
            Level(
                channels=channels,
                layers=layers,
                heads=heads,
                depths=_depths(depths, layers) if _DOWN[kind] else (),
                resamples=index < last,
            )
            for index, (kind, channels, layers, heads, depths) in enumerate(
                zip(
                    self.down_block_types,
                    self.block_out_channels,
                    self._by_level("layers_per_block"),
                    self._by_level("attention_head_dim"),
                    self._by_level("transformer_layers_per_block"),
                    strict=True,
                )
            )
        ]

    @property
    def mid(self) -> Level | None:
        """The middle: a resnet; with attention, a transformer and a second resnet, too."""
        if self.mid_block_type is None:
            return None
        heads, depths = (self._by_level(name)[-1] for name in ("attention_head_dim", "transformer_layers_per_block"))
        attends = _MID[self.mid_block_type]
        return Level(
            channels=self.block_out_channels[-1],
            layers=1 + attends,
            heads=heads,
            depths=_depths(depths, 1, exact=False) if attends else (),
        )

    @property
    def up(self) -> list[Level]:
        """Levels on the way up."""
        reverse = self.reverse_transformer_layers_per_block
        by_level = self._by_level("transformer_layers_per_block")[::-1]
        if reverse is not None:
            by_level = self._by_level("reverse_transformer_layers_per_block")
        skips = self._skips()
        levels = []
        for index, down in enumerate(reversed(self.down)):
            layers = down.layers + 1
            levels.append(
                Level(
                    channels=down.channels,
                    layers=layers,
                    heads=down.heads,
                    skips=tuple(skips.pop() for _ in range(layers)),
                    depths=_depths(by_level[index], layers) if _UP[self.up_block_types[index]] else (),
                    resamples=index < len(self.block_out_channels) - 1,
                )
            )
        return levels

    def _skips(self) -> list[int]:
        """Channels of the arrays that the way up takes from the way down, in the order of the way down."""
        channels = [self.block_out_channels[0]]
        for level in self.down:
            channels += [level.channels] * (level.layers + level.resamples)
        return channels

    def _by_level(self, name: str) -> tuple[Any, ...]:
        value, levels = getattr(self, name), len(self.block_out_channels)
        if not isinstance(value, tuple):
            return (value,) * levels
        if len(value) != levels:
            raise _unsupported(f"{len(value)} {name} for {levels} block_out_channels")
        return value


def _depths(value: int | tuple[int, ...], resnets: int, *, exact: bool = True) -> tuple[int, ...]:
    """Transformer blocks after each of some resnets."""
    if not isinstance(value, tuple):
        return (value,) * resnets
    if len(value) < resnets or (exact and len(value) > resnets):
        raise _unsupported(
            f"transformer_layers_per_block {list(value)} is for {len(value)} of {resnets} resnets",
            "reverse_transformer_layers_per_block gives those on the way up",
        )
    return value[:resnets]


def _numbers(value: Depths) -> Iterator[int]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    else:
        yield value


def _unsupported(problem: str, fix: str = "give a text-to-image model of Stable Diffusion 1, 2 or XL") -> SettingsError:
    return SettingsError(f"UNet config: {problem}; {fix}")
