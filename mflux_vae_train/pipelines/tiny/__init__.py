"""The embedded pipeline: a small FLUX and the procedural world it was trained on."""
