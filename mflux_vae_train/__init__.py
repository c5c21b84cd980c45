"""Training above `mflux_vae`: DreamBooth on diffusion pipelines, and the pipelines it trains."""
