#include "compute/workspace.h"
#include "operations/ops.h"

namespace mflux {
namespace {

constexpr int64_t BLOCK = 48;  // queries whose scores are computed together: a multiple of the tiles' rows
constexpr int64_t BACK_BLOCK = 2 * BLOCK;

struct AttentionOptions {
  int64_t batch, queries, keys, heads, key_heads, width, value_width;
  float scale;
  bool masked;
  int64_t mask_strides[4];  // batch, head, query, key; 0 where it is broadcast

  bool operator==(const AttentionOptions&) const = default;
};

/// Pointers of one head.
struct Head {
  const float *q, *k, *v, *mask;
  int64_t q_row, k_row, v_row, out_row, out;  // strides of rows, and the offset of the output

  Head(const AttentionOptions& o, const std::vector<const float*>& in, int64_t index) {
    const int64_t b = index / o.heads, h = index % o.heads, kv = h * o.key_heads / o.heads;
    q_row = o.heads * o.width;
    k_row = o.key_heads * o.width;
    v_row = o.key_heads * o.value_width;
    out_row = o.heads * o.value_width;
    q = in[0] + b * o.queries * q_row + h * o.width;
    k = in[1] + b * o.keys * k_row + kv * o.width;
    v = in[2] + b * o.keys * v_row + kv * o.value_width;
    out = b * o.queries * out_row + h * o.value_width;
    mask = o.masked ? in[3] + b * o.mask_strides[0] + h * o.mask_strides[1] : nullptr;
  }

  const float* mask_row(const AttentionOptions& o, int64_t query) const {
    return mask ? mask + query * o.mask_strides[2] : nullptr;
  }
};

Floats packed(Matrix matrix, int64_t k, int64_t n) {
  const int64_t nr = kernels()->tile_columns;
  Floats panels = floats((n + nr - 1) / nr * nr * k);
  kernels()->pack(matrix, k, n, panels.get());
  return panels;
}

/// Parts of the queries that are computed apart where there are few heads: it depends on shapes alone, and so do results.
int64_t query_parts(const AttentionOptions& o, int64_t jobs) {
  return std::clamp<int64_t>((16 + jobs - 1) / jobs, 1, std::max<int64_t>(o.queries / (4 * BLOCK), 1));
}

/// Call `work(job, part, begin, end)` for parts of the queries of each job.
template <class F>
void each_part(const AttentionOptions& o, int64_t jobs, F&& work) {
  const int64_t parts = query_parts(o, jobs), blocks = (o.queries + BLOCK - 1) / BLOCK;
  parallel_for(jobs * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t part = i % parts, first = part * blocks / parts * BLOCK, last = (part + 1) * blocks / parts * BLOCK;
      work(i / parts, part, first, std::min(last, o.queries));
    }
  });
}

void forward(const AttentionOptions& o, const std::vector<const float*>& in, float* y, float* stats) {
  const Kernels& kernel = *kernels();
  each_part(o, o.batch * o.heads, [&](int64_t index, int64_t, int64_t begin, int64_t end) {
    const Floats scores = floats(BLOCK * o.keys);
    const Head head(o, in, index);
    const Floats k = packed({head.k, 1, head.k_row}, o.width, o.keys);
    const Floats v = packed({head.v, head.v_row, 1}, o.keys, o.value_width);
    for (int64_t first = begin; first < end; first += BLOCK) {
      const int64_t rows = std::min(BLOCK, end - first);
      kernel.product(head.q + first * head.q_row, head.q_row, k.get(), scores.get(), o.keys, rows, o.keys, o.width,
                     false, nullptr);
      for (int64_t i = 0; i < rows; i++) {
        kernel.attend(scores.get() + i * o.keys, head.mask_row(o, first + i), o.mask_strides[3], o.scale,
                      stats + 2 * (index * o.queries + first + i), o.keys);
      }
      kernel.product(scores.get(), o.keys, v.get(), y + head.out + first * head.out_row, head.out_row, rows,
                     o.value_width, o.keys, false, nullptr);
    }
  });
}

/// Inputs: q, k, v, [mask], y, stats, dy. Jobs are the heads of keys, whose gradients sum over heads of queries.
void backward(const AttentionOptions& o, const std::vector<const float*>& in, float* dq, float* dk, float* dv) {
  const Kernels& kernel = *kernels();
  const float *y = in[3 + o.masked], *stats = in[4 + o.masked], *dy = in[5 + o.masked];
  const int64_t shared = o.heads / o.key_heads, jobs = o.batch * o.key_heads, parts = query_parts(o, jobs);
  const int64_t k_size = jobs * o.keys * o.width, v_size = jobs * o.keys * o.value_width;
  // gradients of keys and values of all parts but the first
  const Floats more_k = floats((parts - 1) * k_size), more_v = floats((parts - 1) * v_size);
  each_part(o, jobs, [&](int64_t job, int64_t part, int64_t begin, int64_t end) {
    // rows of scores are read across, so a power of two must not separate them
    const int64_t row = o.keys + 16;
    const Floats p = floats(BACK_BLOCK * row), ds = floats(BACK_BLOCK * row);
    const auto add_turned = [&](const float* from, int64_t rows, const float* panels, float* to, int64_t to_row,
                                int64_t width, bool add) {  // to += from.T @ panels
      kernel.product_parts({from, 1}, {.parts = 1, .length = rows, .a_step = row}, panels, {to, to_row}, o.keys, width, add,
                           nullptr);
    };
    float *const to_k = part ? more_k.get() + (part - 1) * k_size : dk, *const to_v = part ? more_v.get() + (part - 1) * v_size : dv;
    for (int64_t one = 0; one < shared; one++) {
      const int64_t index = job / o.key_heads * o.heads + job % o.key_heads * shared + one;
      const Head head(o, in, index);
      const int64_t k_at = head.k - in[1], v_at = head.v - in[2], q_at = head.q - in[0];
      const Floats k = packed({head.k, 1, head.k_row}, o.width, o.keys);
      const Floats k_rows = packed({head.k, head.k_row, 1}, o.keys, o.width);
      const Floats v = packed({head.v, 1, head.v_row}, o.value_width, o.keys);
      for (int64_t first = begin; first < end; first += BACK_BLOCK) {
        const int64_t rows = std::min(BACK_BLOCK, end - first);
        const float *q = head.q + first * head.q_row, *d = dy + head.out + first * head.out_row;
        kernel.product(q, head.q_row, k.get(), p.get(), row, rows, o.keys, o.width, false, nullptr);
        kernel.product(d, head.out_row, v.get(), ds.get(), row, rows, o.keys, o.value_width, false, nullptr);
        for (int64_t i = 0; i < rows; i++) {
          const float dot = kernel.dot(d + i * head.out_row, y + head.out + (first + i) * head.out_row, o.value_width);
          kernel.attend_back(p.get() + i * row, ds.get() + i * row, head.mask_row(o, first + i),
                             o.mask_strides[3], o.scale, stats + 2 * (index * o.queries + first + i), dot, o.keys);
        }
        kernel.product(ds.get(), row, k_rows.get(), dq + q_at + first * head.q_row, head.q_row, rows, o.width, o.keys,
                       false, nullptr);
        const bool add = first > begin || one > 0;
        add_turned(ds.get(), rows, packed({q, head.q_row, 1}, rows, o.width).get(), to_k + k_at, head.k_row, o.width, add);
        add_turned(p.get(), rows, packed({d, head.out_row, 1}, rows, o.value_width).get(), to_v + v_at, head.v_row,
                   o.value_width, add);
      }
    }
  });
  const auto add_parts = [&](const float* more, int64_t size, float* to) {
    parallel_for(parts > 1 ? size : 0, 16384, [&](int64_t begin, int64_t end) {
      for (int64_t part = 0; part < parts - 1; part++) {
        for (int64_t i = begin; i < end; i++) {
          to[i] += more[part * size + i];
        }
      }
    });
  };
  add_parts(more_k.get(), k_size, dk);
  add_parts(more_v.get(), v_size, dv);
}

class AttentionBack : public Operation<AttentionBack, AttentionOptions> {
 public:
  static constexpr const char* NAME = "mflux::AttentionBack";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays& inputs) override {
    return {inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  }

 protected:
  Work bind(const Arrays&) override {
    return [o = options_](auto& in, auto& out) { backward(o, in, out[0], out[1], out[2]); };
  }
};

/// q (batch, queries, heads, width), k, v (batch, keys, key_heads, ...), [mask] -> y as q, and what `attend` knows of each row.
class Attention : public Operation<Attention, AttentionOptions> {
 public:
  static constexpr const char* NAME = "mflux::Attention";
  using Operation::Operation;

  std::vector<mx::Shape> output_shapes(const Arrays&) override {
    const AttentionOptions& o = options_;
    return {{int(o.batch), int(o.queries), int(o.heads), int(o.value_width)}, {int(o.batch), int(o.heads), int(o.queries), 2}};
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    Arrays inputs(primals);
    inputs.insert(inputs.end(), {outputs[0], outputs[1], ready(cotangents[0])});
    const Arrays all = AttentionBack(options_, stream()).apply(inputs);
    Arrays wanted;
    for (int argument : argnums) {
      wanted.push_back(argument < 3 ? all[argument] : mask_gradient(primals, cotangents[0], outputs));
    }
    return wanted;
  }

 protected:
  Work bind(const Arrays&) override {
    return [o = options_](auto& in, auto& out) { forward(o, in, out[0], out[1]); };
  }

 private:
  /// In MLX's operations, with the matrix of scores: masks are constants in most models.
  mx::array mask_gradient(const Arrays& primals, const mx::array& dy, const Arrays& outputs) const {
    const mx::array &q = primals[0], &mask = primals[3];
    const int shared = int(options_.heads / options_.key_heads);
    const auto by_head = [](const mx::array& x) { return mx::transpose(x, {0, 2, 1, 3}); };
    const mx::array k = mx::repeat(primals[1], shared, 2), v = mx::repeat(primals[2], shared, 2);
    const mx::array scores = mx::matmul(by_head(q) * mx::array(options_.scale), mx::transpose(k, {0, 2, 3, 1}));
    const Arrays stats = mx::split(outputs[1], 2, -1);
    const mx::array weights = mx::exp(scores + mask - stats[0] - stats[1]);
    const mx::array of_weights = mx::matmul(by_head(dy), mx::transpose(v, {0, 2, 3, 1}));
    const mx::array dot = mx::sum(by_head(dy * outputs[0]), -1, true);
    std::vector<int> broadcast;
    for (int axis = 0; axis < 4; axis++) {
      if (axis < 4 - int(mask.ndim()) || mask.shape(axis - 4 + int(mask.ndim())) == 1) {
        broadcast.push_back(axis);
      }
    }
    return mx::reshape(mx::sum(weights * (of_weights - dot), broadcast, true), mask.shape());
  }
};

}  // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    const std::optional<mx::array>& mask) {
  require(q.ndim() == 4 && k.ndim() == 4 && v.ndim() == 4 && k.shape(0) == q.shape(0) && v.shape(0) == q.shape(0) &&
              k.shape(2) > 0 && q.shape(2) % k.shape(2) == 0 && k.shape(3) == q.shape(3) && v.shape(1) == k.shape(1) &&
              v.shape(2) == k.shape(2),
          "attention: shapes of queries, keys and values do not fit");
  AttentionOptions options{.batch = q.shape(0), .queries = q.shape(1), .keys = k.shape(1), .heads = q.shape(2),
                  .key_heads = k.shape(2), .width = q.shape(3), .value_width = v.shape(3), .scale = scale,
                  .masked = mask.has_value(), .mask_strides = {}};
  Arrays inputs{ready(q), ready(k), ready(v)};
  if (mask) {
    const mx::Shape full{q.shape(0), q.shape(2), q.shape(1), k.shape(1)};
    mx::broadcast_to(*mask, full);  // checks the shape
    int64_t stride = 1;
    for (int axis = 3, of_mask = mask->ndim() - 1; of_mask >= 0; axis--, of_mask--) {
      options.mask_strides[axis] = mask->shape(of_mask) == 1 ? 0 : stride;
      stride *= mask->shape(of_mask);
    }
    inputs.push_back(ready(*mask));
  }
  return Attention(options).apply(inputs)[0];
}

}  // namespace mflux
