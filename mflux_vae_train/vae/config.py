"""Settings of the autoencoder trainer. Each field is a flag, a YAML key and a line of ``--help``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae.utils.formatting import first_few
from mflux_vae_train.optimizers import registry
from mflux_vae_train.settings.fields import check_fields, flag
from mflux_vae_train.training import awake

OPTIMIZER_FLAGS = {"adam_beta1": "beta1", "adam_beta2": "beta2", "weight_decay": "weight_decay"}
"""Flag -> option of an optimizer, see `optimizers.registry`."""


@dataclass(frozen=True, kw_only=True)
class VAETrainingSettings:
    """All settings of the autoencoder trainer. Defaults are those of the preset `mnist`.

    An update is one optimizer step. An epoch is one pass over the training images.

    Attributes:
        MAIN: flags that ``--help`` shows.
        REPLACES, EXCLUSIVE: settings with several names, see `settings.origins`.

    Raises:
        SettingsError: a value has the wrong type or is out of range, or two settings exclude each other.
    """

    MAIN: ClassVar[Sequence[str]] = (
        *("experiment_name", "output_dir", "data", "image_size", "in_channels", "network", "hidden_dims", "latent_dim"),
        *("init_from", "loss_type", "beta", "batch_size", "num_epochs", "learning_rate", "dry_run"),
    )
    REPLACES: ClassVar[Sequence[tuple[Sequence[str], Sequence[str]]]] = (
        (("max_filters",), ("hidden_dims",)),
        (("hidden_dims",), ("max_filters",)),
        (("init_from",), ("network_config", "init")),
        (("network_config",), ("init_from",)),
    )
    EXCLUSIVE: ClassVar[Sequence[tuple[str, str]]] = (("max_filters", "hidden_dims"),)

    experiment_name: str | None = flag(
        "name of the run (default: built from data, widths and latent size)", None, group="output"
    )
    output_dir: str = flag(
        "parent folder; the run is written to checkpoints/<experiment_name> in it", ".", aliases=("outdir",), path=True
    )

    data: str = flag(
        '"digits" (synthetic, no download), a folder of images, of MNIST files or of video frames, an .npz file, an IDX'
        " file, or the name of a data set registered by an installed package",
        "digits",
        aliases=("data_path",),
        group="data",
        path=True,
    )
    data_kind: str | None = flag(
        "kind of --data (default: detected)",
        None,
        choices=("digits", "folder", "frames", "mnist", "npz", "registered"),
    )
    data_list: str | None = flag("text or JSON file with the names of the videos to use (frames)", None, path=True)
    data_count: int = flag(
        "number of images to generate (digits, registered)", 1200, least=2, aliases=("digits_count",)
    )
    image_size: int = flag("height and width of the training images in pixels", 28, least=4)
    in_channels: int = flag("image channels: 1 (grey) or 3 (RGB)", 1, aliases=("nimg_channels",))
    val_share: float = flag(
        "fraction of the images held out for validation if the data has no test split", 0.1, above=0, below=1
    )
    augment_flip: bool = flag("flip training images horizontally with probability 0.5", False)
    augment_shift: int = flag("shift training images by at most this many pixels", 0, least=0)

    network: str = flag(
        "flat: vector latents; kl: Stable Diffusion's AutoencoderKL; plain: residual blocks without normalization",
        "flat",
        choices=("flat", "kl", "plain"),
        group="network",
    )
    hidden_dims: tuple[int, ...] = flag(
        "channels of each level; each level halves the resolution", (32, 64, 128, 256), least=1
    )
    max_filters: int | None = flag("use --hidden_dims M/4 M/2 M", None, least=4)
    latent_dim: int = flag(
        "length of a latent vector, or channels of a spatial latent", 128, least=1, aliases=("latent_dims",)
    )
    batch_norm: bool = flag("use batch normalization (flat)", True)
    upsampling: str = flag(
        "transposed convolution, or nearest-neighbour upsampling and a convolution (flat)",
        "transposed",
        choices=("transposed", "repeat"),
    )
    last_conv: bool = flag("add a convolution after the last level (flat)", True)
    output: str = flag("activation of the decoder's output (flat)", "sigmoid", choices=("sigmoid", "tanh", "linear"))
    layers_per_block: int = flag("residual blocks per level (kl)", 2, least=1)
    network_config: str | None = flag(
        "config.json, or YAML file with a ddconfig, that replaces the flags above", None, path=True
    )
    init: str = flag(
        "initial weights; orthogonal: orthogonal kernels, zero residual branches and a narrow posterior; small networks"
        " then train in minutes",
        "default",
        choices=("default", "orthogonal"),
    )
    init_from: str | None = flag("autoencoder to start from: folder, weights file or hub id", None, path=True)
    train: str = flag(
        "train all weights, or only the decoder: latents then stay unchanged", "all", choices=("all", "decoder")
    )

    loss_type: str = flag(
        "vae: beta * KL; beta_vae: beta rises from --beta_start to --beta_end; tc: beta * total correlation",
        "vae",
        choices=("vae", "beta_vae", "tc"),
        group="loss",
    )
    reconstruction_loss_type: str = flag("reconstruction error", "mse", choices=("mse", "l1", "bce"))
    reduction: str = flag("sum or mean of the reconstruction error over an image", "sum", choices=("sum", "mean"))
    beta: float = flag("weight of KL (vae) or of total correlation (tc)", 1.0, least=0, aliases=("kld_weight",))
    beta_start: float = flag("initial beta (beta_vae)", 0.0, least=0)
    beta_end: float = flag("final beta, from update --beta_steps on (beta_vae)", 1.0, least=0)
    beta_steps: int = flag("updates until --beta_end, or per cycle (beta_vae)", 1000, least=1)
    beta_cyclical: bool = flag("repeat the rise of beta in the first half of each cycle (beta_vae)", False)
    gamma: float = flag("weight of the dimension-wise KL (tc)", 1.0, least=0)
    free_bits: float = flag("KL per latent dimension, in nats, below which it is not penalized", 0.0, least=0)
    lpips: tuple[str, ...] | None = flag(
        "weights of LPIPS (VGG16 and linear layers), one or two files; adds the perceptual distance to the loss",
        None,
        path=True,
    )
    lpips_weight: float = flag("weight of LPIPS", 1.0, least=0)
    disc_start: int | None = flag("first update with a patch discriminator (default: no discriminator)", None, least=0)
    disc_weight: float = flag("weight of the adversarial loss", 0.5, least=0)

    batch_size: int = flag("images per micro-batch", 128, least=1, aliases=("batchsize",), group="optimization")
    gradient_accumulation_steps: int = flag("micro-batches per update", 1, least=1)
    num_epochs: int = flag("number of epochs", 100, least=1, aliases=("epochs",))
    optimizer: str = flag(registry.help_text(registry.with_given_rate()), "adamw", choices=registry.with_given_rate())
    learning_rate: float = flag("peak learning rate", 1e-3, above=0, aliases=("lr",))
    lr_scheduler: str = flag(
        "schedule after warm-up; exponential: times --lr_gamma every epoch; step: every --lr_step_epochs",
        "constant",
        choices=("constant", "linear", "cosine", "exponential", "step"),
    )
    lr_gamma: float = flag("factor of the exponential and step schedules", 0.95, above=0, most=1)
    lr_step_epochs: int = flag("epochs per step of the step schedule", 30, least=1)
    lr_warmup_steps: int = flag("updates of linear warm-up", 0, least=0)
    weight_decay: float = flag("weight decay", 1e-4, least=0)
    adam_beta1: float = flag("decay rate of the first moment", 0.9, least=0, below=1)
    adam_beta2: float = flag("decay rate of the second moment", 0.999, least=0, below=1)
    max_grad_norm: float | None = flag("clip gradients to this global norm (none: no clipping)", 1.0, above=0)
    ema_decay: float = flag(
        "decay of the moving average of the weights, which is saved instead of them (0: off)", 0.0, least=0, below=1
    )
    mixed_precision: bool = flag("compute in bfloat16, keep float32 weights (Metal and CUDA)", False)
    gradient_checkpointing: bool = flag("recompute blocks in the backward pass: less memory, more time", False)

    val_every: int = flag("epochs between validations", 1, least=1, group="monitoring and resuming")
    early_stopping: int | None = flag(
        "stop after this many validations without a lower loss (default: never)", None, least=1
    )
    samples_every: int | None = flag(
        "epochs between grids of reconstructions and samples (none: only at the end)", 10, least=1
    )
    log_images_every_n_steps: int | None = flag("updates between additional grids, for long epochs", None, least=1)
    save_every: int = flag("epochs between checkpoints", 1, least=1)
    save_every_n_steps: int | None = flag("updates between additional checkpoints, for long epochs", None, least=1)
    tensorboard: bool = flag("write TensorBoard events (extra: tensorboard)", False)
    resume_from_checkpoint: str | None = flag(
        "latest, or a checkpoint to go back to: its name in the run folder, or a path", None, path=True
    )
    allow_changes: bool = flag("resume even if data, initial weights or settings have changed", False)
    seed: int = flag("random seed", 0, least=0, below=2**32)
    cpu: bool = flag("run on the CPU", False)
    caffeinate: bool = flag(awake.HELP, True)
    dry_run: bool = flag("print the plan, compute the loss of one batch, write nothing", False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.in_channels not in (1, 3):
            raise SettingsError(f"--in_channels is {self.in_channels}; 1 or 3 is allowed")
        if self.network_config and self.init_from:
            raise SettingsError("--network_config, --init_from: mutually exclusive; give one")
        if self.lpips and len(self.lpips) > 2:
            raise SettingsError(f"--lpips: {len(self.lpips)} files given; at most 2 are allowed")
        if self.init_from and self.init != "default":
            raise SettingsError(f"--init {self.init}, --init_from: mutually exclusive; give one")
        if self.max_filters is not None and self.max_filters % 4:
            raise SettingsError(f"--max_filters is {self.max_filters}; a multiple of 4 is allowed")
        if self.experiment_name is not None and not self.experiment_name.strip("./ "):
            raise SettingsError(f"--experiment_name is {self.experiment_name!r}; give a name with other characters")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        largest = self.max_filters
        return self.hidden_dims if largest is None else (largest // 4, largest // 2, largest)

    @property
    def name(self) -> str:
        """Name of the run."""
        data = self.data.rstrip("/").rpartition("/")[2].partition(".")[0]
        return self.experiment_name or f"vae_{data}_filters_{max(self.widths):04}_dims_{self.latent_dim:04}"


_VANILLA_256 = {
    "image_size": 256,
    "in_channels": 3,
    "hidden_dims": (64, 128, 256, 512, 1024),
    "latent_dim": 256,
    "output": "tanh",
    "reduction": "mean",
    "beta": 1e-4,
    "batch_size": 64,
    "num_epochs": 200,
    "optimizer": "adam",
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "lr_scheduler": "exponential",
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mnist": {},
    "beta": {"loss_type": "beta_vae", "beta_end": 4.0},
    "tc": {"loss_type": "tc", "beta": 4.0},
    "mlx-mnist": {
        "image_size": 64,
        "hidden_dims": (16, 32, 64),
        "latent_dim": 8,
        "upsampling": "repeat",
        "last_conv": False,
        "num_epochs": 50,
        "weight_decay": 0.01,
        "max_grad_norm": None,
    },
    # latent-diffusion's first stage: L1 + LPIPS + 1e-6 KL, then a discriminator; learning rate 4.5e-6 per image
    "kl-f8": {
        "network": "kl",
        "image_size": 256,
        "in_channels": 3,
        "hidden_dims": (128, 256, 512, 512),
        "latent_dim": 4,
        "reconstruction_loss_type": "l1",
        "beta": 1e-6,
        "disc_start": 50001,
        "batch_size": 1,
        "gradient_accumulation_steps": 12,
        "optimizer": "adam",
        "learning_rate": 5.4e-5,
        "adam_beta1": 0.5,
        "adam_beta2": 0.9,
        "weight_decay": 0.0,
        "max_grad_norm": None,
        "gradient_checkpointing": True,
    },
    "vanilla-256": _VANILLA_256,
    "plain": {
        "network": "plain",
        "image_size": 64,
        "in_channels": 3,
        "hidden_dims": (64, 128, 256, 512),
        "latent_dim": 4,
        "reduction": "mean",
        "beta": 1e-6,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "ema_decay": 0.999,
    },
}
"""Common recipes: settings that differ from `mnist`."""


def preset(name: str, **changes: Any) -> VAETrainingSettings:
    """Settings of a preset with changes.

    Raises:
        SettingsError: unknown preset or setting.
    """
    if name not in PRESETS:
        hint = did_you_mean(str(name), PRESETS) or ";"
        raise SettingsError(f"unknown preset {name!r}{hint} allowed are {', '.join(PRESETS)}")
    return settings_from_dict({**PRESETS[name], **changes})


def settings_from_dict(values: Mapping[str, Any]) -> VAETrainingSettings:
    """Settings from a dictionary; missing ones have their default.

    Raises:
        SettingsError: unknown name, or see `VAETrainingSettings`.
    """
    known = {name: f.name for f in dataclasses.fields(VAETrainingSettings) for name in (f.name, *f.metadata["aliases"])}
    if unknown := [name for name in values if name not in known]:
        hint = "".join(did_you_mean(str(name), known) for name in unknown[:3]) or "; --help lists all"
        raise SettingsError(f"unknown settings: {first_few([*map(repr, unknown)], 3, 60)}{hint}")
    return VAETrainingSettings(**{known[name]: value for name, value in values.items()})


def get_default_config() -> dict[str, Any]:
    """Settings of the preset `mnist` as a dictionary for `VAETrainer`."""
    return dataclasses.asdict(preset("mnist"))


def get_beta_vae_config() -> dict[str, Any]:
    """Settings of the preset `beta` as a dictionary for `VAETrainer`."""
    return dataclasses.asdict(preset("beta"))
