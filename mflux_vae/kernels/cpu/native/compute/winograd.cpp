#include "compute/winograd.h"

#include <algorithm>

#include "compute/gemm.h"
#include "compute/pool.h"
#include "compute/window.h"
#include "compute/workspace.h"

namespace mflux {
namespace {

constexpr int64_t TILE = 4;
constexpr int64_t PAD = 16;  // numbers between the 36 matrices: powers of two would share lines of the cache

int64_t tiles_across(const Conv& conv) { return up(conv.out_width, TILE) / TILE; }
int64_t tiles_down(const Conv& conv) { return up(conv.out_height, TILE) / TILE; }

/// For many tiles: threads take blocks of them.
void by_tiles(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, step = up(o, kernel.tile_columns) * c + PAD;
  const Floats weights = floats(36 * step);
  parallel_panels(o, 1, [&](int64_t first, int64_t count) {
    each_panel(count, [&](int64_t left, int64_t, int64_t) {
      kernel.winograd_weights(in.weight, conv.turned, c, o, first + left, weights.get() + (first + left) * c, step);
    });
  });
  // blocks are parts of a row of tiles, or several rows of one image
  const int64_t across = tiles_across(conv), down = tiles_down(conv);
  constexpr int64_t BUDGET = 96 * 1024;  // numbers of both transforms of a block
  const int64_t least = 3 * kernel.tile_rows, fit = BUDGET / (36 * (c + o)) / kernel.tile_rows * kernel.tile_rows;
  const int64_t most = std::max((c + o < 512 ? 4 : 6) * least, fit);
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
        kernel.winograd_input(window.get() + (t / width * TILE * seen + t % width * TILE) * c, seen * c, c, c,
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
void by_outputs(const Conv& conv, const ConvArrays& in, float* y) {
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, nr = kernel.tile_columns;
  const int64_t across = tiles_across(conv), down = tiles_down(conv);
  const int64_t tiles = conv.batch * down * across, v_step = tiles * c + PAD, m_step = tiles * nr + PAD, step = nr * c + PAD;
  const Floats v = floats(36 * v_step);
  parallel_for(conv.batch * down, 1, [&](int64_t begin, int64_t end) {
    const int64_t columns = across * TILE + 2;
    const Floats window = floats(6 * columns * c);
    for (int64_t line = begin; line < end; line++) {
      read_window(conv, in, line / down, line % down * TILE - conv.top, 6, -conv.left, columns, window.get());
      for (int64_t t = 0; t < across; t++) {
        kernel.winograd_input(window.get() + t * TILE * c, columns * c, c, c, v.get() + (line * across + t) * c, v_step);
      }
    }
  });
  parallel_panels(o, 1, [&](int64_t first, int64_t columns) {
    const Floats weights = floats(36 * step), m = floats(36 * m_step);
    each_panel(columns, [&](int64_t inside, int64_t count, int64_t) {
      const int64_t left = first + inside;
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
    });
  });
}

}  // namespace

bool winograd_pays(const Conv& conv, int64_t tiles) {
  return conv.kh == 3 && conv.kw == 3 && conv.stride == 1 && conv.c >= 16 && conv.o >= 12 &&
         conv.batch * tiles_across(conv) * tiles_down(conv) >= tiles;
}

void winograd(const Conv& conv, const ConvArrays& in, float* y) {
  const bool few = conv.batch * tiles_across(conv) * tiles_down(conv) <= 128;
  (few && conv.c * conv.o >= 128 * 128 ? by_outputs : by_tiles)(conv, in, y);
}

void winograd_weight_gradient(const Conv& conv, const float* x, const float* dy, float* dweight) {
  constexpr int64_t HELD = 3 << 20, TILES = 192;  // numbers of both transforms at once, but at least this many tiles
  constexpr int64_t ROWS = 120, DEPTH = 256;  // of a product
  const Kernels& kernel = *kernels();
  const int64_t c = conv.c, o = conv.o, blocks = up(o, ROWS) / ROWS;
  const int64_t across = tiles_across(conv), down = tiles_down(conv), lines = conv.batch * down;
  const int64_t held = std::min(lines, up(std::max(HELD / (36 * (c + o)), TILES), across) / across);  // rows of tiles
  // numbers beyond c in the last panel of v stay unset: they reach columns that are not stored
  const int64_t v_step = held * across * up(c, kernel.tile_columns) + PAD, m_step = held * across * o + PAD, u_step = o * c + PAD;
  const Floats v = floats(36 * v_step), m = floats(36 * m_step), u = floats(36 * u_step);
  for (int64_t first = 0; first < lines; first += held) {
    const int64_t count = std::min(held, lines - first), tiles = count * across;
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      const int64_t columns = across * TILE + 2;
      const Floats window = floats(6 * columns * c);
      for (int64_t line = begin; line < end; line++) {
        const int64_t image = (first + line) / down, row = (first + line) % down * TILE;
        read_window(conv, {.x = x}, image, row - conv.top, 6, -conv.left, columns, window.get());
        for (int64_t t = 0; t < across; t++) {
          const int64_t tile = line * across + t;
          each_panel(c, [&](int64_t left, int64_t inputs, int64_t width) {
            kernel.winograd_input(window.get() + t * TILE * c + left, columns * c, c, inputs,
                                  v.get() + left * tiles + tile * width, v_step);
          });
          kernel.winograd_output_back(dy + ((image * conv.out_height + row) * conv.out_width + t * TILE) * o,
                                   conv.out_width * o, std::min(TILE, conv.out_height - row),
                                   std::min(TILE, conv.out_width - t * TILE), o, m.get() + tile * o, m_step);
        }
      }
    });
    parallel_for(36 * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; job++) {
        const int64_t xi = job / blocks, top = job % blocks * ROWS, rows = std::min(ROWS, o - top);
        for (int64_t from = 0; from < tiles; from += DEPTH) {
          const int64_t depth = std::min(DEPTH, tiles - from);
          const Rows<const float> columns{m.get() + xi * m_step + from * o + top, 1};
          each_panel(c, [&](int64_t left, int64_t inputs, int64_t width) {
            kernel.product_parts(columns, {.parts = 1, .length = depth, .a_step = o},
                                 v.get() + xi * v_step + left * tiles + from * width,
                                 {u.get() + xi * u_step + top * c + left, c}, rows, inputs, first + from > 0, nullptr);
          });
        }
      }
    });
  }
  parallel_for(o, 1 + 4096 / c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      kernel.winograd_weights_back(u.get() + i * c, u_step, c, dweight + i * 9 * c);
    }
  });
}

}  // namespace mflux
