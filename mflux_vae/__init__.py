"""Images to latents and back, for image-diffusion pipelines in MLX."""

from mflux_vae import runtime as runtime  # first: it opens a fast BLAS
