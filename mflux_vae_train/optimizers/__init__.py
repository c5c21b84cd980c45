"""Optimizers behind MLX's interface; `registry` lists them for both training commands.

Learning rates are arrays in the state, which the training step sets for each update. All optimizers compute in float32,
and keep a float32 master copy of parameters in half precision.
"""
