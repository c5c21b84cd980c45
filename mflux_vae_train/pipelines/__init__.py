"""Diffusion pipelines: what a trainer needs of one, how one is found, and those of this package."""
