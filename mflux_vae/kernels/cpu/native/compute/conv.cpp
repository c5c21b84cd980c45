#include "compute/conv.h"

#include <algorithm>
#include <array>
#include <vector>

#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/window.h"
#include "compute/winograd.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

/// How far apart images, rows and pixels of a result are.
struct Places {
  int64_t image, row, pixel;

  int64_t of(const Pixel& at) const { return at.image * image + at.row * row + at.column * pixel; }
};

/// For few pixels and many weights: a product that copies windows, and packs weights just before they are multiplied.
void by_windows(const Conv& conv, const ConvArrays& in, const Packer& weights, float* y, const Places& places) {
  const int64_t row = conv.width * conv.c, pixels = conv.batch * conv.out_height * conv.out_width;
  const int64_t rows = conv.affine || conv.silu ? conv.batch * conv.height : 0;  // of x to activate
  const Floats activated = floats(rows * row);
  Conv once = conv;
  once.doubled = false;
  parallel_for(rows, 1 + GRAIN / (row + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      read_window(once, in, i / conv.height, i % conv.height, 1, 0, conv.width, activated.get() + i * row);
    }
  });
  std::vector<int64_t> at;
  for (Pixel pixel(conv.out_height, conv.out_width, 0); int64_t(at.size()) < pixels; pixel.next()) {
    at.push_back(places.of(pixel));
  }
  gemm(window_reader(conv, rows ? activated.get() : in.x), weights, {y, 0, at.data()}, pixels, conv.o,
       conv.kh * conv.kw * conv.c, {.bias = in.bias, .residual = in.residual});
}

/// Windows are read in place: their rows are parts of the rows of a product.
void direct(const Conv& conv, const ConvArrays& in, const Packer& packer, float* y, const Places& places) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, depth = conv.kh * conv.kw * c;
  const Floats weights = floats(up(o, kernel.tile_columns) * depth);
  parallel_panels(o, 16384 / std::max<int64_t>(depth, 1), [&](int64_t first, int64_t count) {
    packer(0, depth, first, count, weights.get() + first * depth);
  });
  // blocks are parts of a row of pixels, several rows, or several images
  const int64_t fit = up(64 * 1024 / std::max<int64_t>(depth, 1), kernel.tile_rows);
  const int64_t pixels = std::clamp<int64_t>(fit, kernel.tile_rows, 240), span = std::min(pixels, conv.out_width);
  const auto equal = [](int64_t size, int64_t most, int64_t others) {  // parts, as many for each thread
    const int64_t parts = up(size, most) / most;
    const bool few = others * parts < 8 * threads() && others % threads() != 0;
    const int64_t count = few ? up(parts, threads()) : parts;
    return up(size, count) / count;
  };
  const int64_t rows = equal(conv.out_height, std::max<int64_t>(pixels / span, 1), conv.batch);
  const bool whole = span == conv.out_width && rows == conv.out_height;
  const int64_t images = whole ? equal(conv.batch, std::max<int64_t>(pixels / (rows * span), 1), 1) : 1;
  const int64_t blocks_x = up(conv.out_width, span) / span, blocks_y = up(conv.out_height, rows) / rows;
  parallel_for(up(conv.batch, images) / images * blocks_y * blocks_x, 1, [&](int64_t begin, int64_t end) {
    const int64_t seen_x = (span - 1) * conv.stride + conv.kw, seen_y = (rows - 1) * conv.stride + conv.kh;
    const Floats window = floats(images * seen_x * seen_y * c);
    std::vector<int64_t> from(images * rows * span), to(from.size());
    std::array<int64_t, 3> known{};  // the shape for which these are
    for (int64_t block = begin; block < end; block++) {
      const int64_t image = block / (blocks_y * blocks_x) * images, first = block / blocks_x % blocks_y * rows,
                    left = block % blocks_x * span;
      const int64_t count = std::min(images, conv.batch - image), height = std::min(rows, conv.out_height - first),
                    width = std::min(span, conv.out_width - left);
      const int64_t lines = (height - 1) * conv.stride + conv.kh, columns = (width - 1) * conv.stride + conv.kw;
      for (int64_t i = 0; i < count; i++) {
        read_window(conv, in, image + i, first * conv.stride - conv.top, lines, left * conv.stride - conv.left, columns,
                    window.get() + i * lines * columns * c);
      }
      const int64_t seen = count * height * width;
      if (const std::array shape{count, height, width}; known != shape) {
        Pixel at(height, width, 0);
        for (int64_t i = 0; i < seen; i++, at.next()) {
          from[i] = ((at.image * lines + at.row * conv.stride) * columns + at.column * conv.stride) * c;
          to[i] = places.of(at);
        }
        known = shape;
      }
      const int64_t at = image * places.image + first * places.row + left * places.pixel;
      const Epilogue last{.bias = in.bias, .residual = in.residual ? in.residual + at : nullptr};
      kernel.product_parts({window.get(), 0, from.data()}, {conv.kh, conv.kw * c, columns * c}, weights.get(),
                           {y + at, 0, to.data()}, seen, o, false, &last);
    }
  });
}

void product_of_windows(const Conv& conv, const ConvArrays& in, const Packer& weights, float* y, const Places& places) {
  constexpr int64_t MANY = 1 << 20;  // weights
  const int64_t pixels = conv.batch * conv.out_height * conv.out_width;
  const bool few = pixels <= SOME_ROWS && conv.kh * conv.kw * conv.c * conv.o > MANY;
  (few ? by_windows : direct)(conv, in, weights, y, places);
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
    const int64_t row = conv.out_width * conv.o;
    product_of_windows(conv, in, weight_packer(conv, in.weight), y, {conv.out_height * row, row, conv.o});
  }
}

void input_gradient(const Conv& conv, const float* weight, const float* dy, const float* bias, float* dx) {
  // Pixels of dx with the same remainders by the stride see the same taps: each group is a convolution of dy.
  const int64_t c = conv.c, o = conv.o, stride = conv.stride;
  // taps of pixels with a remainder, the last first: pixel i * stride + remainder sees dy from i - before on
  const auto taps = [stride](int64_t remainder, int64_t padding, int64_t size, int64_t& before) {
    std::vector<int64_t> found;
    for (int64_t tap = size - 1; tap >= 0; tap--) {
      if ((remainder + padding - tap) % stride == 0) {
        before = found.empty() ? (tap - remainder - padding) / stride : before;
        found.push_back(tap);
      }
    }
    return found;
  };
  for (int64_t py = 0; py < std::min(stride, conv.height); py++) {
    for (int64_t px = 0; px < std::min(stride, conv.width); px++) {
      Conv group{.batch = conv.batch, .height = conv.out_height, .width = conv.out_width, .c = o, .o = c, .stride = 1,
                 .out_height = (conv.height - py + stride - 1) / stride,
                 .out_width = (conv.width - px + stride - 1) / stride};
      const auto down = taps(py, conv.top, conv.kh, group.top), across = taps(px, conv.left, conv.kw, group.left);
      group.kh = down.size();
      group.kw = across.size();
      std::vector<int64_t> found;
      for (int64_t r : down) {
        for (int64_t s : across) {
          found.push_back(r * conv.kw + s);
        }
      }
      product_of_windows(group, {.x = dy, .weight = weight, .bias = bias}, turned_packer(conv, weight, found),
                         dx + (py * conv.width + px) * c,
                         {conv.height * conv.width * c, stride * conv.width * c, stride * c});
    }
  }
}

}  // namespace mflux
