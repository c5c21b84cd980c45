#include "compute/conv.h"

#include <algorithm>
#include <vector>

#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/window.h"
#include "compute/winograd.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

/// For narrow images, of which `direct` fills no block, and for long windows: a product that copies parts of the matrix of
/// windows.
void by_windows(const Conv& conv, const ConvArrays& in, float* y) {
  const int64_t c = conv.c, o = conv.o, depth = conv.kh * conv.kw * c, pixels = conv.out_height * conv.out_width;
  const Packer weights = weight_packer(conv, in.weight);
  if (!conv.affine && !conv.silu) {
    gemm(window_reader(conv, in.x), weights, y, conv.batch * pixels, o, depth, {.bias = in.bias, .residual = in.residual});
    return;
  }
  const Floats activated = floats(conv.height * conv.width * c);
  for (int64_t image = 0; image < conv.batch; image++) {
    const float *x = in.x + image * conv.height * conv.width * c,
                *scale = conv.affine ? in.scale + image * c : nullptr, *shift = conv.affine ? in.shift + image * c : nullptr;
    parallel_for(conv.height * conv.width, 1 + GRAIN / (c + 1), [&](int64_t begin, int64_t end) {
      kernels()->affine(x + begin * c, scale, shift, conv.silu, activated.get() + begin * c, end - begin, c);
    });
    const int64_t at = image * pixels * o;
    gemm(window_reader(conv, activated.get()), weights, y + at, pixels, o, depth,
         {.bias = in.bias, .residual = in.residual ? in.residual + at : nullptr});
  }
}

/// Windows are read in place: their rows are parts of the rows of a product.
void direct(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, depth = conv.kh * conv.kw * c;
  const Packer packer = weight_packer(conv, in.weight);
  const Floats weights = floats(up(o, kernel.tile_columns) * depth);
  parallel_panels(o, 16384 / depth, [&](int64_t first, int64_t count) {
    packer(0, depth, first, count, weights.get() + first * depth);
  });
  const int64_t pixels = std::clamp<int64_t>(up(64 * 1024 / depth, kernel.tile_rows), kernel.tile_rows, 240);
  const int64_t span = std::min(pixels, conv.out_width), rows = std::min(pixels / span, conv.out_height);
  const int64_t blocks_x = up(conv.out_width, span) / span, blocks_y = up(conv.out_height, rows) / rows;
  parallel_for(conv.batch * blocks_y * blocks_x, 1, [&](int64_t begin, int64_t end) {
    const int64_t seen_x = (span - 1) * conv.stride + conv.kw, seen_y = (rows - 1) * conv.stride + conv.kh;
    const Floats window = floats(seen_x * seen_y * c);
    for (int64_t block = begin; block < end; block++) {
      const int64_t image = block / (blocks_y * blocks_x), first = block / blocks_x % blocks_y * rows,
                    left = block % blocks_x * span;
      const int64_t height = std::min(rows, conv.out_height - first), width = std::min(span, conv.out_width - left);
      const int64_t columns = (width - 1) * conv.stride + conv.kw;
      read_window(conv, in, image, first * conv.stride - conv.top, (height - 1) * conv.stride + conv.kh,
                  left * conv.stride - conv.left, columns, window.get());
      for (int64_t r = 0; r < height; r++) {
        const int64_t at = ((image * conv.out_height + first + r) * conv.out_width + left) * o;
        const Epilogue last{.bias = in.bias, .residual = in.residual ? in.residual + at : nullptr};
        kernel.product_parts(window.get() + r * conv.stride * columns * c, conv.stride * c, conv.kh, conv.kw * c,
                             columns * c, weights.get(), y + at, o, width, o, false, &last);
      }
    }
  });
}

/// For few output channels: one product computes each pixel's part in the windows around it, then windows are summed.
void summed(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, taps = conv.kh * conv.kw, nr = kernel.tile_columns;
  const Floats weights = floats(taps * o * c);  // (tap, o, c)
  for (int64_t tap = 0; tap < taps; tap++) {
    for (int64_t i = 0; i < o; i++) {
      for (int64_t k = 0; k < c; k++) {
        weights[(tap * o + i) * c + k] =
            conv.turned ? in.weight[(k * taps + taps - 1 - tap) * o + i] : in.weight[(i * taps + tap) * c + k];
      }
    }
  }
  const int64_t span = std::min<int64_t>(conv.out_width, 128), seen = span + conv.kw - 1;
  const int64_t rows = std::clamp<int64_t>(64 * 1024 / (seen * (c + taps * o)) - conv.kh + 1, 1, conv.out_height);
  const int64_t blocks_x = up(conv.out_width, span) / span, blocks_y = up(conv.out_height, rows) / rows;
  parallel_for(conv.batch * blocks_y * blocks_x, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = seen * (rows + conv.kh - 1);
    const Floats window = floats(most * c), packed = floats(up(most, nr) * c), parts = floats(taps * o * most);
    std::vector<float> sums(span);
    for (int64_t block = begin; block < end; block++) {
      const int64_t image = block / (blocks_y * blocks_x), first = block / blocks_x % blocks_y * rows,
                    left = block % blocks_x * span;
      const int64_t height = std::min(rows, conv.out_height - first), width = std::min(span, conv.out_width - left);
      const int64_t columns = width + conv.kw - 1, lines = height + conv.kh - 1, pixels = lines * columns;
      read_window(conv, in, image, first - conv.top, lines, left - conv.left, columns, window.get());
      kernel.pack({window.get(), 1, c}, c, pixels, packed.get());
      kernel.product(weights.get(), c, packed.get(), parts.get(), pixels, taps * o, pixels, c, false, nullptr);
      for (int64_t r = 0; r < height; r++) {
        const int64_t at = ((image * conv.out_height + first + r) * conv.out_width + left) * o;
        for (int64_t i = 0; i < o; i++) {
          std::fill_n(sums.data(), width, in.bias ? in.bias[i] : 0.f);
          for (int64_t tap = 0; tap < taps; tap++) {
            const float* from = parts.get() + (tap * o + i) * pixels + (r + tap / conv.kw) * columns + tap % conv.kw;
            for (int64_t x = 0; x < width; x++) {
              sums[x] += from[x];
            }
          }
          for (int64_t x = 0; x < width; x++) {
            y[at + x * o + i] = sums[x] + (in.residual ? in.residual[at + x * o + i] : 0.f);
          }
        }
      }
    }
  });
}

}  // namespace

void convolve(const Conv& conv, const ConvArrays& in, float* y) {
  const bool plain = !conv.affine && !conv.silu && !conv.doubled && conv.top == 0 && conv.left == 0 &&
                     conv.out_height == conv.height && conv.out_width == conv.width;
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  if (plain && conv.kh == 1 && conv.kw == 1 && conv.stride == 1) {
    const Matrix weight = conv.turned ? Matrix{in.weight, conv.o, 1} : Matrix{in.weight, 1, conv.c};
    gemm({in.x, conv.c, 1}, weight, y, pixels, conv.o, conv.c, {.bias = in.bias, .residual = in.residual});
  } else if (winograd_pays(conv, 16)) {
    winograd(conv, in, y);
  } else if (conv.stride == 1 && conv.o <= 4 && conv.c >= 16 && conv.kh * conv.kw > 1) {
    summed(conv, in, y);
  } else {
    const int64_t depth = conv.kh * conv.kw * conv.c;
    const bool narrow = conv.out_width < 3 * kernels()->tile_rows, deep = depth > 4096 && !conv.affine && !conv.silu;
    (depth == 0 || narrow || deep ? by_windows : direct)(conv, in, y);
  }
}

}  // namespace mflux
