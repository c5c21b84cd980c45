#include "compute/conv.h"

#include <algorithm>
#include <vector>

#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

/// Rows [first, first + rows) and columns [left, left + columns) of what the kernel sees, zeros outside the image.
void read_window(const Conv& conv, const ConvArrays& in, int64_t image, int64_t first, int64_t rows, int64_t left,
                 int64_t columns, float* to) {
  const int64_t c = conv.c, width = conv.seen_width(), height = conv.seen_height();
  const float *scale = conv.affine ? in.scale + image * c : nullptr, *shift = conv.affine ? in.shift + image * c : nullptr;
  const int64_t begin = std::clamp<int64_t>(left, 0, width), end = std::clamp<int64_t>(left + columns, begin, width);
  for (int64_t r = 0; r < rows; r++) {
    float* line = to + r * columns * c;
    const int64_t y = first + r;
    if (y < 0 || y >= height || begin == end) {
      std::fill_n(line, columns * c, 0.f);
      continue;
    }
    std::fill_n(line, (begin - left) * c, 0.f);
    std::fill_n(line + (end - left) * c, (left + columns - end) * c, 0.f);
    float* out = line + (begin - left) * c;
    const float* from = in.x + (image * conv.height + (y >> conv.doubled)) * conv.width * c;
    if (!conv.doubled) {
      if (conv.affine || conv.silu) {
        kernels()->affine(from + begin * c, scale, shift, conv.silu, out, end - begin, c);
      } else {
        std::copy_n(from + begin * c, (end - begin) * c, out);
      }
      continue;
    }
    for (int64_t x = begin; x < end; x++, out += c) {
      if (x > begin && (x & 1)) {
        std::copy_n(out - c, c, out);
      } else if (conv.affine || conv.silu) {
        kernels()->affine(from + (x >> 1) * c, scale, shift, conv.silu, out, 1, c);
      } else {
        std::copy_n(from + (x >> 1) * c, c, out);
      }
    }
  }
}

// ---- Winograd

constexpr int64_t TILE = 4;
constexpr int64_t PAD = 16;  // numbers between the 36 matrices: powers of two would share lines of the cache
constexpr int64_t BUDGET = 96 * 1024;  // numbers of both transforms of a block of tiles

void winograd(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, nr = kernel.tile_columns, panels = up(o, nr) / nr, step = panels * nr * c + PAD;
  const Floats weights = floats(36 * step);
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      kernel.winograd_weights(in.weight, conv.turned, c, o, panel * nr, weights.get() + panel * nr * c, step);
    }
  });
  // blocks are parts of a row of tiles, or several rows of one image
  const int64_t across = up(conv.out_width, TILE) / TILE, down = up(conv.out_height, TILE) / TILE;
  const int64_t least = 2 * kernel.tile_rows, most = std::max(4 * least, BUDGET / (36 * (c + o)) / kernel.tile_rows * kernel.tile_rows);
  int64_t tiles_x = std::min(across, most), tiles_y = std::clamp<int64_t>(most / across, 1, down);
  tiles_x = up(across, up(across, tiles_x) / tiles_x) / (up(across, tiles_x) / tiles_x);  // equal parts of a row
  const auto slowest = [&](int64_t height) {  // tiles of the thread with the most blocks, in whole rows of the product
    const int64_t blocks = conv.batch * (up(down, height) / height) * (up(across, tiles_x) / tiles_x);
    return up(blocks, threads()) / threads() * up(height * tiles_x, kernel.tile_rows);
  };
  for (int64_t height = tiles_y - 1; height > 0 && height * tiles_x >= least; height--) {
    if (slowest(height) < slowest(tiles_y)) {
      tiles_y = height;
    }
  }
  while (conv.batch * (up(down, tiles_y) / tiles_y) * (up(across, tiles_x) / tiles_x) < threads() && tiles_x * tiles_y > least) {
    if (tiles_y > 1) {
      tiles_y = (tiles_y + 1) / 2;
    } else {
      tiles_x = (tiles_x + 1) / 2;
    }
  }
  const int64_t blocks_x = up(across, tiles_x) / tiles_x, blocks_y = up(down, tiles_y) / tiles_y;
  parallel_for(conv.batch * blocks_y * blocks_x, 1, [&](int64_t begin, int64_t end) {
    const int64_t tiles = tiles_x * tiles_y, columns = tiles_x * TILE + 2, rows = tiles_y * TILE + 2;
    const Floats window = floats(rows * columns * c), v = floats(36 * (tiles * c + PAD)), m = floats(36 * (tiles * o + PAD));
    for (int64_t block = begin; block < end; block++) {
      const int64_t image = block / (blocks_y * blocks_x), by = block / blocks_x % blocks_y * tiles_y,
                    bx = block % blocks_x * tiles_x;
      const int64_t height = std::min(tiles_y, down - by), width = std::min(tiles_x, across - bx);
      const int64_t seen = width * TILE + 2, count = height * width, v_step = count * c + PAD, m_step = count * o + PAD;
      read_window(conv, in, image, by * TILE - conv.top, height * TILE + 2, bx * TILE - conv.left, seen, window.get());
      for (int64_t t = 0; t < count; t++) {
        kernel.winograd_input(window.get() + (t / width * TILE * seen + t % width * TILE) * c, seen * c, c,
                              v.get() + t * c, v_step);
      }
      for (int64_t xi = 0; xi < 36; xi++) {
        kernel.product(v.get() + xi * v_step, c, weights.get() + xi * step, m.get() + xi * m_step, o, count, o, c,
                       false, nullptr);
      }
      for (int64_t t = 0; t < count; t++) {
        const int64_t row = (by + t / width) * TILE, column = (bx + t % width) * TILE;
        const int64_t at = ((image * conv.out_height + row) * conv.out_width + column) * o;
        kernel.winograd_output(m.get() + t * o, m_step, o, y + at, conv.out_width * o, o,
                               std::min(TILE, conv.out_height - row), std::min(TILE, conv.out_width - column), in.bias,
                               in.residual ? in.residual + at : nullptr);
      }
    }
  });
}

/// For few tiles and many channels: threads take output channels, whose transformed weights never leave the cache.
void winograd_by_outputs(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, nr = kernel.tile_columns, panels = up(o, nr) / nr;
  const int64_t across = up(conv.out_width, TILE) / TILE, down = up(conv.out_height, TILE) / TILE;
  const int64_t tiles = conv.batch * down * across, v_step = tiles * c + PAD, m_step = tiles * nr + PAD, step = nr * c + PAD;
  const Floats v = floats(36 * v_step);
  parallel_for(conv.batch * down, 1, [&](int64_t begin, int64_t end) {
    const int64_t columns = across * TILE + 2;
    const Floats window = floats(6 * columns * c);
    for (int64_t line = begin; line < end; line++) {
      read_window(conv, in, line / down, line % down * TILE - conv.top, 6, -conv.left, columns, window.get());
      for (int64_t t = 0; t < across; t++) {
        kernel.winograd_input(window.get() + t * TILE * c, columns * c, c, v.get() + (line * across + t) * c, v_step);
      }
    }
  });
  parallel_for(panels, 1, [&](int64_t begin, int64_t end) {
    const Floats weights = floats(36 * step), m = floats(36 * m_step);
    for (int64_t left = begin * nr; left < std::min(end * nr, o); left += nr) {
      const int64_t count = std::min(nr, o - left);
      kernel.winograd_weights(in.weight, conv.turned, c, o, left, weights.get(), step);
      for (int64_t xi = 0; xi < 36; xi++) {
        kernel.product(v.get() + xi * v_step, c, weights.get() + xi * step, m.get() + xi * m_step, nr, tiles, count, c,
                       false, nullptr);
      }
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = t / across % down * TILE, column = t % across * TILE;
        const int64_t at = ((t / (across * down) * conv.out_height + row) * conv.out_width + column) * o + left;
        kernel.winograd_output(m.get() + t * nr, m_step, count, y + at, conv.out_width * o, o,
                               std::min(TILE, conv.out_height - row), std::min(TILE, conv.out_width - column),
                               in.bias ? in.bias + left : nullptr, in.residual ? in.residual + at : nullptr);
      }
    }
  });
}

// ---- products of windows

/// Weights (o, kh, kw, c) or turned ones as (kh * kw * c, o) in panels.
Floats packed_weights(const Conv& conv, const float* weight) {
  const Kernels& kernel = *kernels();
  const int64_t taps = conv.kh * conv.kw, depth = taps * conv.c, nr = kernel.tile_columns;
  Floats packed = floats(up(conv.o, nr) * depth);
  Floats plain;
  Matrix matrix{weight, 1, depth};
  if (conv.turned) {
    plain = floats(depth * conv.o);
    for (int64_t tap = 0; tap < taps; tap++) {
      for (int64_t k = 0; k < conv.c; k++) {
        std::copy_n(weight + (k * taps + taps - 1 - tap) * conv.o, conv.o, plain.get() + (tap * conv.c + k) * conv.o);
      }
    }
    matrix = {plain.get(), conv.o, 1};
  }
  kernel.pack(matrix, depth, conv.o, packed.get());
  return packed;
}

/// Windows are read in place: their rows are parts of the rows of a product.
void direct(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, depth = conv.kh * conv.kw * c;
  const Floats weights = packed_weights(conv, in.weight);
  const int64_t pixels = std::clamp<int64_t>(up(64 * 1024 / depth, kernel.tile_rows), kernel.tile_rows, 240);
  const int64_t span = std::min(pixels, conv.out_width);  // of one row
  const int64_t rows = std::max<int64_t>(1, std::min(pixels / span, conv.out_height));
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
  const int64_t c = conv.c, o = conv.o, taps = conv.kh * conv.kw, n = taps * o, nr = kernel.tile_columns;
  const Floats plain = floats(n * c), packed = floats(up(n, nr) * c);  // (tap, o, c)
  for (int64_t tap = 0; tap < taps; tap++) {
    for (int64_t i = 0; i < o; i++) {
      for (int64_t k = 0; k < c; k++) {
        plain[(tap * o + i) * c + k] =
            conv.turned ? in.weight[(k * taps + taps - 1 - tap) * o + i] : in.weight[(i * taps + tap) * c + k];
      }
    }
  }
  kernel.pack({plain.get(), 1, c}, c, n, packed.get());
  const int64_t span = std::min<int64_t>(conv.out_width, 128), seen = span + conv.kw - 1;
  const int64_t rows = std::clamp<int64_t>(64 * 1024 / (seen * (c + n)) - conv.kh + 1, 1, conv.out_height);
  const int64_t blocks_x = up(conv.out_width, span) / span, blocks_y = up(conv.out_height, rows) / rows;
  parallel_for(conv.batch * blocks_y * blocks_x, 1, [&](int64_t begin, int64_t end) {
    const Floats window = floats(seen * (rows + conv.kh - 1) * c), parts = floats(seen * (rows + conv.kh - 1) * n);
    for (int64_t block = begin; block < end; block++) {
      const int64_t image = block / (blocks_y * blocks_x), first = block / blocks_x % blocks_y * rows,
                    left = block % blocks_x * span;
      const int64_t height = std::min(rows, conv.out_height - first), width = std::min(span, conv.out_width - left);
      const int64_t columns = width + conv.kw - 1, lines = height + conv.kh - 1;
      read_window(conv, in, image, first - conv.top, lines, left - conv.left, columns, window.get());
      kernel.product(window.get(), c, packed.get(), parts.get(), n, lines * columns, n, c, false, nullptr);
      for (int64_t r = 0; r < height; r++) {
        const int64_t at = ((image * conv.out_height + first + r) * conv.out_width + left) * o;
        for (int64_t i = 0; i < width * o; i++) {
          y[at + i] = (in.bias ? in.bias[i % o] : 0.f) + (in.residual ? in.residual[at + i] : 0.f);
        }
        for (int64_t tap = 0; tap < taps; tap++) {
          const float* from = parts.get() + ((r + tap / conv.kw) * columns + tap % conv.kw) * n + tap * o;
          for (int64_t x = 0; x < width; x++) {
            for (int64_t i = 0; i < o; i++) {
              y[at + x * o + i] += from[x * n + i];
            }
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
  const int64_t tiles = conv.batch * up(conv.out_height, TILE) * up(conv.out_width, TILE) / (TILE * TILE);
  if (plain && conv.kh == 1 && conv.kw == 1 && conv.stride == 1) {
    const Matrix weight = conv.turned ? Matrix{in.weight, conv.o, 1} : Matrix{in.weight, 1, conv.c};
    gemm({in.x, conv.c, 1}, weight, y, conv.batch * conv.height * conv.width, conv.o, conv.c,
         {.bias = in.bias, .residual = in.residual});
  } else if (conv.kh == 3 && conv.kw == 3 && conv.stride == 1 && conv.c >= 16 && conv.o >= 12 && tiles >= 16) {
    const int64_t all = conv.batch * up(conv.out_height, TILE) / TILE * (up(conv.out_width, TILE) / TILE);
    (all <= 128 && conv.c * conv.o >= 128 * 128 ? winograd_by_outputs : winograd)(conv, in, y);
  } else if (conv.stride == 1 && conv.o <= 4 && conv.c >= 16 && conv.kh * conv.kw > 1) {
    summed(conv, in, y);
  } else {
    direct(conv, in, y);
  }
}

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
  constexpr int64_t DEPTH = 256, WIDE = 64, JOBS = 16, MOST = 1 << 20;
  const int64_t chunks = up(pixels, DEPTH) / DEPTH;
  const Floats turned = floats(chunks * o * DEPTH);  // (chunk, o, DEPTH)
  parallel_for(chunks, 1 + 16384 / (DEPTH * o), [&](int64_t begin, int64_t end) {
    constexpr int64_t BLOCK = 16;
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t depth = std::min(DEPTH, pixels - chunk * DEPTH);
      const float* from = dy + chunk * DEPTH * o;
      float* to = turned.get() + chunk * DEPTH * o;
      for (int64_t k = 0; k < depth; k += BLOCK) {
        for (int64_t i = 0; i < o; i++) {
          for (int64_t j = k; j < std::min(k + BLOCK, depth); j++) {
            to[i * DEPTH + j] = from[j * o + i];
          }
        }
      }
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
