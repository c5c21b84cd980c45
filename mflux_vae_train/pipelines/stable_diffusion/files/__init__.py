"""Files of Stable Diffusion: folders in diffusers' layout, single files, and the hub."""
