"""DreamBooth beside the scripts of diffusers; `python -m benchmarks.diffusers_scripts`."""
