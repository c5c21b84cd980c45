// Operations of this extension on MLX arrays; results are float32. All but `sum_of_squares` and `adamw` are
// differentiable, convolutions and linear layers twice.
#pragma once

#include <array>
#include <optional>

#include "operations/primitive.h"

namespace mflux {

/// Elementwise activation.
mx::array activate(const mx::array& x, Activation kind, float slope = 0);

/// x twice. Use it for an x that an operation reads twice, so that gradients are rounded alike under `mx.checkpoint`.
std::pair<mx::array, mx::array> fork(const mx::array& x);

/// activation(gate) * other; without `other`, of the halves of `gate`, the first of which is the gate if `gate_first`.
mx::array glu(const mx::array& gate, const std::optional<mx::array>& other, Activation kind, bool gate_first);

/// x + gate * y; the gate is (width,), or (batch, 1, width) for x (batch, ..., width).
mx::array gated(const mx::array& x, const mx::array& gate, const mx::array& y);

/// Layer norm (or RMS norm) over the last axis of (..., width), then * (scale + offset) + shift.
///
/// Scale and shift: (width,), or (batch, 1, width) for x (batch, ..., width), or none.
mx::array norm(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift,
               float eps, bool rms, float offset);

/// Softmax over the last axis.
mx::array softmax(const mx::array& x);

/// x @ weight.T + bias: (..., k), (n, k) -> (..., n).
mx::array linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias);

/// softmax(q k^T * scale + mask) v; the matrix of scores is never stored.
///
/// q: (batch, queries, heads, width); k, v: (batch, keys, key_heads, ...), heads is a multiple of key_heads.
/// mask: broadcast to (batch, heads, queries, keys).
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v, float scale,
                    const std::optional<mx::array>& mask);

/// Convolution of NHWC images with weights (o, kh, kw, c): conv(u) + bias + residual, where u is x * scale + shift (both
/// (batch, c)), then SiLU if `silu`, then each pixel twice in both directions if `doubled`.
///
/// padding: top, bottom, left, right; zeros around u.
mx::array conv2d(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                 const std::optional<mx::array>& residual, const std::optional<mx::array>& scale,
                 const std::optional<mx::array>& shift, bool silu, bool doubled, int stride, std::array<int, 4> padding);

/// x * scale + shift per channel, (batch, c), then SiLU if `silu`.
mx::array affine(const mx::array& x, const std::optional<mx::array>& scale, const std::optional<mx::array>& shift,
                 bool silu);

/// `conv2d`'s gradient of x as an operation: x (batch, h, w, c), weight (o, kh, kw, c) -> (batch, *size, o).
///
/// padding: top, left; taken away from the result, as torch's ConvTranspose2d does.
mx::array conv_transpose2d(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias, int stride,
                           std::array<int, 2> padding, std::array<int, 2> size);

/// activation(group norm of x (batch, ..., c) * scale + shift); scale, shift: (c,).
mx::array group_norm(const mx::array& x, int groups, const mx::array& scale, const mx::array& shift, float eps,
                     Activation activation, float slope);

/// Factor and offset (batch, c) for `conv2d` and `affine`, so that they normalize x. Gradients include the statistics.
std::pair<mx::array, mx::array> group_norm_affine(const mx::array& x, int groups, const mx::array& scale,
                                                  const mx::array& shift, float eps);

/// activation(batch norm of x (..., c) * scale + shift); also mean and biased variance (c,), which are constants.
std::tuple<mx::array, mx::array, mx::array> batch_norm(const mx::array& x, const mx::array& scale,
                                                       const mx::array& shift, float eps, Activation activation,
                                                       float slope);

/// Sums over all axes but the last.
mx::array channel_sum(const mx::array& x);

/// RMS norm of the heads of each part (batch, positions, heads, width), then rotary embedding of all of them, joined
/// along the positions: x * cos + swapped(x) * sin. Neighbouring channels are swapped, or if `halves` (i, i + width / 2).
///
/// weights: (width,) of each part. cos, sin: (positions, 1, width) or (batch, positions, 1, width), without gradients;
/// the first sine of a pair is negated.
mx::array norm_rotary(const Arrays& parts, const Arrays& weights, const mx::array& cos, const mx::array& sin, float eps,
                      bool halves);

/// A (inputs, rank), B (rank, outputs) and scale.
using Lora = std::tuple<mx::array, mx::array, float>;

/// x @ weight.T + bias + scale * (x @ A) @ B.
mx::array lora_linear(const mx::array& x, const mx::array& weight, const std::optional<mx::array>& bias,
                      const Lora& lora);

/// The same with weights of `mx.quantize`, 4 or 8 bits, which are dequantized by tiles; LoRA is optional.
mx::array quantized_linear(const mx::array& x, const mx::array& weight, const mx::array& scales,
                           const mx::array& biases, int group_size, int bits, const std::optional<mx::array>& bias,
                           const std::optional<Lora>& lora);

/// Sum of the squares of all numbers in all arrays. It has no gradient.
mx::array sum_of_squares(const Arrays& arrays);

/// AdamW on all parameters, with gradients g = gradients * scale:
/// weights * decay - rate * m / (sqrt(v * correction) + eps), rounded as in this formula.
///
/// scale, decay, rate, correction: single numbers; the last two contain the corrections of both moments' bias.
/// Returns weights, first and second moments; sums of squares (2,) of the change of weights and of weights before.
std::tuple<Arrays, Arrays, Arrays, mx::array> adamw(const Arrays& weights, const Arrays& gradients, const Arrays& m,
                                                    const Arrays& v, const mx::array& scale, const mx::array& decay,
                                                    const mx::array& rate, const mx::array& correction, double beta1,
                                                    double beta2, double eps);

}  // namespace mflux
