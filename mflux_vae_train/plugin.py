"""What a host loads from the entry-point group ``mflux.plugins`` under the name ``dreambooth``.

A host, any program that owns a diffusion pipeline, trains its own object with three lines:

    (entry,) = importlib.metadata.entry_points(group="mflux.plugins", name="dreambooth")
    DreamBooth = entry.load()
    DreamBooth(pipeline).train(DreamBooth.Settings(model="mine", ...))

The contract:

- `pipeline` has the members of `DiffusionPipeline`; nothing is inherited, `PluginError` says what lacks.
- `DreamBooth.Settings` has a field for every flag of ``mflux-train-dreambooth``; what is None, the pipeline's
  `recommended` decides. `model` is only a label here.
- `train` returns an `TrainingResult` with the path of the adapter, in PEFT's naming under the pipeline's
  `adapter_prefix`. Called again with the same settings it continues an interrupted run.
- Mistakes in what was given raise `InputError`, failures `RunError`; both are `DreamBooth.Error`, with
  messages of one line. SIGINT and SIGTERM end a run with `Interrupted`, a KeyboardInterrupt, after a checkpoint.
- What happens goes to the logger ``mflux_vae_train``; only a progress bar is printed, and on terminals only.
"""

from __future__ import annotations

from mflux_vae.errors import InputError, MfluxVaeError, PluginError, RunError
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth, TrainingResult
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline, Recommended

__all__ = [
    "Conditioning",
    "DiffusionPipeline",
    "DreamBooth",
    "DreamBoothSettings",
    "InputError",
    "Interrupted",
    "MfluxVaeError",
    "PluginError",
    "Recommended",
    "RunError",
    "TrainingResult",
]
