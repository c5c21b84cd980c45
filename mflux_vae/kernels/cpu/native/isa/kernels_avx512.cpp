#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#define MFLUX_ISA avx512
#define MFLUX_TABLE avx512_kernels
#define LANES 16
#define SUMS 24
#include "isa/kernels.inc"
