// Arguments of batch_norm_act and of its backward, checked by bind.cpp; the op is documented in
// effdet_kernels/ops/batch_norm_act/op.py, the mathematics in the README beside it.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

// Maps [batch, pixels, channels] of `dtype`; vectors [channels] of the accumulator's type.
struct BatchNormParams {
  const void* x;
  const void* grad;  // backward only: of y
  const void* weight;
  const void* bias;
  void* y;            // dense; backward: the gradient of x, or null
  void* mean;         // forward: written, but read if `given`; read by the backward
  void* variance;     // likewise, biased
  void* grad_weight;  // backward only: written; if `given` read, as averages over all values, of whatever images
  void* grad_bias;    // likewise
  void* partial;      // workspace, batch_norm_workspace() bytes
  std::int64_t batch, pixels, channels;
  std::int64_t x_batch_stride, x_pixel_stride, grad_batch_stride, grad_pixel_stride;
  double eps;
  int dtype, act, given;

  template <typename F>
  void pointers(F&& f) {
    f(x), f(grad), f(weight), f(bias), f(y), f(mean), f(variance), f(grad_weight), f(grad_bias), f(partial);
  }
};

// Pixels of one image whose statistics are taken together: about 64 KiB of float32, so that a second look finds them in
// the cache.
inline std::int64_t norm_block(std::int64_t channels) {
  const std::int64_t pixels = 16384 / channels;
  return pixels < 16 ? 16 : pixels > 256 ? 256 : pixels;
}

// Three numbers per block and channel, and the reciprocal deviation per channel.
inline std::int64_t batch_norm_workspace(std::int64_t batch, std::int64_t pixels, std::int64_t channels) {
  const std::int64_t block = norm_block(channels), blocks = batch * ((pixels + block - 1) / block);
  return (3 * blocks + 1) * channels * static_cast<std::int64_t>(sizeof(double));
}

EFFDET_PER_ISA(Status, batch_norm_act, (const BatchNormParams&, int threads))
EFFDET_PER_ISA(Status, batch_norm_act_backward, (const BatchNormParams&, int threads))

}  // namespace effdet
