#include <algorithm>
#include <utility>
#include <vector>

#include "compute/conv.h"
#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/winograd.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

/// For few output channels: windows of dy are copied, not of x.
void weight_gradient_by_inputs(const Conv& conv, const float* x, const float* dy, float* dweight) {
  constexpr int64_t DEPTH = 256;
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, taps = conv.kh * conv.kw, rows = taps * o, each = 1 << conv.doubled;
  const int64_t pixels = conv.batch * conv.height * conv.width;
  const Floats sums = floats(rows * c);  // (tap, o, c)
  parallel_sum(up(pixels, DEPTH) / DEPTH, 1, rows * c, sums.get(), [&](int64_t begin, int64_t end, float* partial) {
    const Floats windows = floats(rows * DEPTH), packed = floats(DEPTH * up(c, kernel.tile_columns));
    for (int64_t first = begin * DEPTH; first < std::min(pixels, end * DEPTH); first += DEPTH) {
      const int64_t depth = std::min(DEPTH, pixels - first);
      for (int64_t tap = 0; tap < taps; tap++) {
        const int64_t up_by = tap / conv.kw - conv.top, left_by = tap % conv.kw - conv.left;
        for (int64_t p = 0; p < depth; p++) {
          const int64_t pixel = first + p, column = pixel % conv.width * each - left_by,
                        row = pixel / conv.width % conv.height * each - up_by, image = pixel / (conv.width * conv.height);
          for (int64_t i = 0; i < o; i++) {
            float sum = 0;
            for (int64_t y = std::max<int64_t>(row, 0); y < std::min(row + each, conv.out_height); y++) {
              const float* line = dy + (image * conv.out_height + y) * conv.out_width * o + i;
              for (int64_t at = std::max<int64_t>(column, 0); at < std::min(column + each, conv.out_width); at++) {
                sum += line[at * o];
              }
            }
            windows[(tap * o + i) * DEPTH + p] = sum;
          }
        }
      }
      kernel.pack({x + first * c, c, 1}, depth, c, packed.get());
      kernel.product(windows.get(), DEPTH, packed.get(), partial, c, rows, c, depth, true, nullptr);
    }
  });
  for (int64_t row = 0; row < rows; row++) {
    std::copy_n(sums.get() + row * c, c, dweight + (row % o * taps + row / o) * c);
  }
}

}  // namespace

void weight_gradient(const Conv& conv, const float* x, const float* dy, float* dweight) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, nr = kernel.tile_columns, line = conv.kw * c, length = conv.kh * line;
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width, size = o * length;
  if (pixels == 0) {
    std::fill_n(dweight, size, 0.f);
    return;
  }
  if (conv.stride == 1 && o <= 4 && c >= 16 && conv.kh * conv.kw > 1) {
    weight_gradient_by_inputs(conv, x, dy, dweight);
    return;
  }
  if (winograd_pays(conv, 32)) {
    winograd_weight_gradient(conv, x, dy, dweight);
    return;
  }
  constexpr int64_t DEPTH = 256, WIDE = 64, JOBS = 16, MOST = 1 << 20;
  const int64_t chunks = up(pixels, DEPTH) / DEPTH;
  const Floats turned = floats(chunks * o * DEPTH);  // (chunk, o, DEPTH)
  parallel_for(chunks, 1 + 16384 / (DEPTH * o), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t depth = std::min(DEPTH, pixels - chunk * DEPTH);
      kernel.transpose(dy + chunk * DEPTH * o, o, depth, o, turned.get() + chunk * DEPTH * o, DEPTH);
    }
  });
  // Jobs are columns of the result: parts of a row of the kernel, or all rows if they are short; and parts of the pixels.
  const int64_t rows = length <= WIDE ? conv.kh : 1, slices = rows > 1 ? 1 : up(line, WIDE) / WIDE;
  const int64_t slice = rows > 1 ? length : std::min(line, up((line + slices - 1) / slices, nr));
  const int64_t columns = conv.kh / rows * slices;
  const int64_t wanted = std::clamp<int64_t>(JOBS / columns, 1, std::min(chunks, 1 + MOST / size));
  const int64_t share = (chunks + wanted - 1) / wanted, parts = (chunks + share - 1) / share;
  const Floats partial = floats((parts - 1) * size + 1);
  parallel_for(columns * parts, 1, [&](int64_t begin, int64_t end) {
    const Floats seen = floats(DEPTH * slice), packed = floats(DEPTH * up(slice, nr));
    for (int64_t job = begin; job < end; job++) {
      const int64_t part = job / columns, top = job % columns / slices, left = job % slices * slice;
      const int64_t count = std::min(slice, rows * line - left), each = count / rows;
      if (count <= 0) {
        continue;
      }
      float* out = (part ? partial.get() + (part - 1) * size : dweight) + top * line + left;
      for (int64_t chunk = part * share; chunk < std::min(chunks, (part + 1) * share); chunk++) {
        const int64_t first = chunk * DEPTH, depth = std::min(DEPTH, pixels - first);
        int64_t column = first % conv.out_width, row = first / conv.out_width % conv.out_height,
                image = first / (conv.out_width * conv.out_height);
        float* to = seen.get();
        for (int64_t p = 0; p < depth; p++) {
          const int64_t start = (column * conv.stride - conv.left) * c + left;
          const int64_t low = std::clamp<int64_t>(-start, 0, each), high = std::clamp(conv.seen_width() * c - start, low, each);
          for (int64_t r = 0; r < rows; r++, to += each) {
            const int64_t y = row * conv.stride + top + r - conv.top;
            if (y < 0 || y >= conv.seen_height()) {
              std::fill_n(to, each, 0.f);
              continue;
            }
            const float* from = x + (image * conv.height + (y >> conv.doubled)) * conv.width * c;
            std::fill_n(to, low, 0.f);
            if (conv.doubled) {
              for (int64_t i = low, length; i < high; i += length) {
                const int64_t at = start + i, pixel = at / c, channel = at % c;
                length = std::min(c - channel, high - i);
                std::copy_n(from + pixel / 2 * c + channel, length, to + i);
              }
            } else {
              std::copy_n(from + start + low, high - low, to + low);
            }
            std::fill_n(to + high, each - high, 0.f);
          }
          if (++column == conv.out_width) {
            column = 0;
            if (++row == conv.out_height) {
              row = 0;
              image++;
            }
          }
        }
        kernel.pack({seen.get(), count, 1}, depth, count, packed.get());
        kernel.product(turned.get() + first * o, DEPTH, packed.get(), out, length, o, count, depth,
                       chunk > part * share, nullptr);
      }
    }
  });
  parallel_for(parts > 1 ? size : 0, 8192, [&](int64_t begin, int64_t end) {
    for (int64_t part = 0; part < parts - 1; part++) {
      for (int64_t i = begin; i < end; i++) {
        dweight[i] += partial[part * size + i];
      }
    }
  });
}

void input_gradient(const Conv& conv, const float* weight, const float* dy, const float* bias, float* dx) {
  // Pixels of dx with the same remainders by the stride see the same taps: each group is a convolution of dy.
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, stride = conv.stride, nr = kernel.tile_columns;
  const Epilogue last{.bias = bias};
  for (int64_t py = 0; py < std::min(stride, conv.height); py++) {
    for (int64_t px = 0; px < std::min(stride, conv.width); px++) {
      std::vector<std::pair<int64_t, int64_t>> taps;
      for (int64_t r = 0; r < conv.kh; r++) {
        for (int64_t s = 0; s < conv.kw; s++) {
          if ((py + conv.top - r) % stride == 0 && (px + conv.left - s) % stride == 0) {
            taps.emplace_back(r, s);
          }
        }
      }
      const int64_t rows = (conv.height - py + stride - 1) / stride, columns = (conv.width - px + stride - 1) / stride;
      const int64_t depth = int64_t(taps.size()) * o, pixels = rows * columns;
      const Floats plain = floats(depth * c + 1), packed = floats(depth * up(c, nr) + 1);
      parallel_for(depth, 1 + 16384 / c, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          const auto [r, s] = taps[i / o];
          std::copy_n(weight + ((i % o * conv.kh + r) * conv.kw + s) * c, c, plain.get() + i * c);
        }
      });
      parallel_for(up(c, nr) / nr, 1 + 16384 / (nr * (depth + 1)), [&](int64_t begin, int64_t end) {
        kernel.pack({plain.get() + begin * nr, c, 1}, depth, std::min(end * nr, c) - begin * nr,
                    packed.get() + begin * nr * depth);
      });
      const int64_t span = std::min(pixels, std::clamp<int64_t>(64 * 1024 / (depth + c), kernel.tile_rows, 240));
      const int64_t blocks = up(pixels, span) / span;
      parallel_for(conv.batch * blocks, 1, [&](int64_t begin, int64_t end) {
        const Floats lines = floats(span * depth + 1), out = floats(span * c);
        for (int64_t block = begin; block < end; block++) {
          const int64_t image = block / blocks, first = block % blocks * span, count = std::min(span, pixels - first);
          for (int64_t p = 0; p < count; p++) {
            const int64_t y = (first + p) / columns * stride + py + conv.top, x = (first + p) % columns * stride + px + conv.left;
            for (size_t tap = 0; tap < taps.size(); tap++) {
              const auto [r, s] = taps[tap];
              const int64_t row = (y - r) / stride, column = (x - s) / stride;
              float* to = lines.get() + p * depth + int64_t(tap) * o;
              if (y < r || x < s || row >= conv.out_height || column >= conv.out_width) {
                std::fill_n(to, o, 0.f);
              } else {
                std::copy_n(dy + ((image * conv.out_height + row) * conv.out_width + column) * o, o, to);
              }
            }
          }
          kernel.product(lines.get(), depth, packed.get(), out.get(), c, count, c, depth, false, &last);
          for (int64_t p = 0; p < count; p++) {
            const int64_t y = (first + p) / columns * stride + py, x = (first + p) % columns * stride + px;
            std::copy_n(out.get() + p * c, c, dx + ((image * conv.height + y) * conv.width + x) * c);
          }
        }
      });
    }
  }
}

}  // namespace mflux
