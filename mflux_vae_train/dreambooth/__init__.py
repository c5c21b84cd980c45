"""DreamBooth: teach a diffusion pipeline a subject from a few images. Start reading at `train.DreamBooth.train`.

Imports nothing, so that ``mflux-train-dreambooth --help`` is fast.
"""
