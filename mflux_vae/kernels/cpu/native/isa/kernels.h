// Kernels on rows of contiguous float32, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace mflux {

enum class Activation : int { none, silu, gelu, gelu_tanh, quick_gelu, sigmoid, tanh, leaky_relu };

/// What a matrix product adds to each result.
struct Epilogue {
  const float* bias = nullptr;  // (n,)
  const float* residual = nullptr;  // (m, n), as far apart as the result
};

/// A matrix in memory: element (i, j) is at data[i * rows + j * columns].
struct Matrix {
  const float* data;
  int64_t rows, columns;  // strides
};

/// Rows of numbers: row i begins at data[i * step], or at data[at[i]] if `at` is given.
template <class T>
struct Rows {
  T* data;
  int64_t step;
  const int64_t* at = nullptr;

  T* operator[](int64_t i) const { return data + (at ? at[i] : i * step); }
  /// From row `top` and number `left` on.
  Rows part(int64_t top, int64_t left) const {
    return {data + (at ? 0 : top * step) + left, step, at ? at + top : nullptr};
  }
};

/// What a product sums over: `parts` of `length`.
struct Terms {
  int64_t parts, length;
  int64_t a_part = 0, a_step = 1;  // numbers of a row of a between parts, and between terms
  int64_t b_part = 0, b_step = 0;  // numbers of b between their rows; b_step 0: b is from `pack`
};

struct Kernels {
  /// y = activation(x); `slope` of leaky_relu.
  void (*activate)(Activation, const float* x, float* y, int64_t count, float slope);
  /// dx = dy * activation'(x).
  void (*activate_back)(Activation, const float* x, const float* dy, float* dx, int64_t count, float slope);

  /// Rows of `width`: y = (x - mean) * rstd * (scale + offset) + shift, without the mean if `rms`. `stats` gets mean and rstd of
  /// each row. Scale and shift are (groups, width), each for rows / groups rows, or null.
  void (*norm)(bool rms, const float* x, const float* scale, float offset, const float* shift, float* y, float* stats,
               int64_t begin, int64_t end, int64_t width, int64_t rows_per_group, float eps);
  /// dx of rows [begin, end); adds their sums dy * x^ and dy to dscale and dshift (width,), if not null.
  void (*norm_back)(bool rms, const float* x, const float* scale, float offset, const float* dy, const float* stats, float* dx,
                    float* dscale, float* dshift, int64_t begin, int64_t end, int64_t width, int64_t rows_per_group);

  /// Rows of `width`: y = exp(x - max) / sum.
  void (*softmax)(const float* x, float* y, int64_t begin, int64_t end, int64_t width);
  void (*softmax_back)(const float* y, const float* dy, float* dx, int64_t begin, int64_t end, int64_t width);

  /// Rows and columns of a result that the widest inner loop computes.
  int64_t tile_rows, tile_columns;
  /// Columns of a panel that begins where `rest` columns are left: `tile_columns`, or as many vectors as the last one needs.
  int64_t (*panel_columns)(int64_t rest);
  /// Panels of columns of b (k, n); missing columns are zero.
  void (*pack)(Matrix b, int64_t k, int64_t n, float* packed);
  /// to (n, m), rows `step` apart = from (m, n), rows `ld` apart.
  void (*transpose)(const float* from, int64_t ld, int64_t m, int64_t n, float* to, int64_t step);
  /// c (m, n) = a (m, k) b, or += if `add`; b from `pack`; then the epilogue, if any.
  void (*product)(const float* a, int64_t lda, const float* b, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
                  bool add, const Epilogue* last);
  /// The same with rows anywhere. If b is not packed, less than a vector is read beyond its n columns.
  void (*product_parts)(Rows<const float> a, const Terms& terms, const float* b, Rows<float> c, int64_t m, int64_t n,
                        bool add, const Epilogue* last);

  /// c (m, n) = a (m, k) b^T, or += if `add`, for few rows of a and b (n, k) not packed; then the epilogue.
  void (*dot_products)(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m,
                       int64_t n, int64_t k, bool add, const Epilogue& last);

  // see attention.inc
  void (*attend)(float* x, const float* mask, int64_t mask_step, float scale, float* stats, int64_t count);
  void (*attend_back)(float* x, float* dp, const float* mask, int64_t mask_step, float scale, const float* stats, float dot,
                      int64_t count);
  float (*dot)(const float* a, const float* b, int64_t count);

  // see group_norm.inc
  void (*channel_sums)(const float* x, int64_t count, int64_t c, float* sums);
  void (*channel_squares)(const float* x, const float* mean, int64_t count, int64_t c, float* sums);
  void (*center_scale)(Activation kind, float slope, const float* x, const float* mean, const float* scale,
                       const float* shift, float* y, int64_t count, int64_t c);
  void (*center_scale_back)(Activation kind, float slope, const float* x, const float* mean, const float* scale,
                            const float* shift, const float* dy, float* dz, float* sums, int64_t count, int64_t c);
  void (*center_dx)(const float* x, const float* mean, const float* scale, const float* slope, const float* offset,
                    const float* dz, float* dx, int64_t count, int64_t c);
  void (*rotate)(bool halves, const float* x, const float* cos, const float* sin, bool inverse, float* y, int64_t heads,
                 int64_t width);
  void (*dequantize)(const uint32_t* words, const float* scales, const float* biases, int64_t bits, int64_t group,
                     int64_t begin, int64_t end, float* out);

  // see conv.inc
  void (*affine)(const float* x, const float* scale, const float* shift, bool silu, float* y, int64_t count, int64_t c);
  void (*affine_back)(const float* x, const float* scale, const float* shift, bool silu, const float* dy, float* dx,
                      float* dscale, float* dshift, int64_t count, int64_t c);
  void (*winograd_input)(const float* x, int64_t row, int64_t c, int64_t count, float* v, int64_t step);
  void (*winograd_output_back)(const float* y, int64_t row, int64_t rows, int64_t columns, int64_t o, float* m,
                               int64_t step);
  void (*winograd_weights_back)(const float* u, int64_t step, int64_t c, float* dw);
  void (*winograd_output)(const float* m, int64_t step, int64_t o, float* y, int64_t row, int64_t pixel,
                          int64_t rows, int64_t columns, const float* bias, const float* residual);
  void (*winograd_weights)(const float* w, bool turned, int64_t c, int64_t o, int64_t left, float* packed,
                           int64_t step);
};

/// Of this machine's processor; null if it lacks AVX2.
const Kernels* kernels();

extern const Kernels avx2_kernels, avx512_kernels;

}  // namespace mflux
