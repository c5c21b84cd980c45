"""DreamBooth: a pipeline learns a subject from a few pictures. `train.DreamBooth` is the way in from Python.

Nothing is imported here, so that ``mflux-train-dreambooth --help`` answers at once.
"""
