"""Weights: files, key tables and strict loading.

Equal to the bit
----------------
- a network, and the copy that opens from its saved float32 weights, in any naming;
- a network with an adapter, and the same network with the saved adapter read back;
- a quantised pipeline, and the copy that opens from its folder;
- an uninterrupted training, and the same training resumed from its checkpoints;
- two runs of the same command or call.

This holds on CPUs and Metal, on one machine with the same BLAS library, number of cores and BLAS threads
(`OMP_NUM_THREADS`, `MKL_NUM_THREADS`, `OPENBLAS_NUM_THREADS`), instruction set (`MKL_ENABLE_INSTRUCTIONS`), MLX version
and device, with or without the native extension, and for the same batches, image sizes and settings. A change of any of
these may change the last bits; tests compare such results with a tolerance. With CUDA the last bits differ from run to
run (from MLX's source: cuDNN adds the gradients of attention in no fixed order).

The rounding of a sum depends on its order. A BLAS chooses the order by instruction set, threads, sizes and strides, so
a transposed view computes other bits than a copy of it. Weights therefore enter networks in MLX's row-major order:
key tables copy what they transpose (`Rule.read`), and so do `load_adapter`, `EMA` and, for the weights it trains,
`Step`. The copies are lazy: `eval_each` holds one array in both orders, `mx.eval` may hold all of them.

Weights that a caller puts into a network are used in the order in which they lie, so a saved copy of views may differ
from the original in the last bits.
"""
