"""FLUX.1: transformer, schedule and pipeline, driven by the configurations in a diffusers folder."""
