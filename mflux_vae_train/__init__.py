"""Trainers above `mflux_vae`: DreamBooth on diffusion pipelines, and autoencoders.

    settings        dataclass fields with help text -> flags and YAML
    training        the loop, the step (accumulation, clipping, update), hooks, EMA, learning-rate schedules
    optimizers      registry: name -> builder and the settings it reads
    checkpointing   state of named objects, checkpoints, the lock of a run folder
    distributed     several processes: collectives, signals, loss of a peer
    monitoring      progress bar, trackers, HTML report
    lora            adapters: layers, targets, PEFT and kohya files
    pipelines       what a trainable pipeline offers (protocol, capabilities, noise), and the pipelines
    evaluation      networks and figures that judge drawn pictures
    dreambooth      `mflux-train-dreambooth`: data -> optimization -> planning -> reporting
    vae             `mflux-vae train`: data, losses, objective, sampler
    tiny_world      programs that make the embedded pipelines `tiny` and `tiny-sd`

Imports: `mflux_vae` <- core (the first seven) <- `dreambooth`, `vae`; `mflux_vae` <- `pipelines` <- `evaluation` <-
`dreambooth`. `tests/test_architecture.py` checks them.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (a checkout that pip did not install)
    print("mflux_vae_train: error: needs Python 3.10 or newer, this is %s" % sys.version.split()[0], file=sys.stderr)  # noqa: UP031
    raise SystemExit(2)
