#pragma GCC target("avx2,fma")
#define MFLUX_ISA avx2
#define MFLUX_TABLE avx2_kernels
#define LANES 8
#define SUMS 12
#include "isa/kernels.inc"
