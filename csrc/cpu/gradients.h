// Gradients that several ops are made of; their backwards in effdet_kernels/ops compose them.
//
// Everything is float or double: a backward of shorter numbers widens them first. Sums over pixels are taken over
// blocks of a size that depends on nothing but shapes, each block by one thread, and added up in the order of the
// blocks: results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/map.h"

namespace effdet {

constexpr std::int64_t kGradientBlock = 256;  // pixels of one image

inline std::int64_t gradient_blocks(std::int64_t batch, std::int64_t pixels) {
  return batch * ((pixels + kGradientBlock - 1) / kGradientBlock);
}

// Of y = act(z * scale + shift): delta = grad * act'(v) * scale, and the sums over all pixels of grad * act'(v) and of
// grad * act'(v) * z. Maps [batch, pixels, channels]; vectors of the accumulator's type.
struct AffineGradientParams {
  const void* grad;
  const void* z;      // null where neither act' nor grad_scale needs it
  const void* scale;  // padded to whole vectors
  const void* shift;
  void* delta;       // dense, or null
  void* grad_scale;  // [channels]; with z
  void* grad_shift;  // [channels]
  void* partial;     // workspace [gradient_blocks, 2, channels] of the accumulator's type
  std::int64_t batch, pixels, channels;
  std::int64_t grad_batch_stride, grad_pixel_stride, z_batch_stride, z_pixel_stride;
  int dtype, act;

  template <typename F>
  void pointers(F&& f) {
    f(grad), f(z), f(scale), f(shift), f(delta), f(grad_scale), f(grad_shift), f(partial);
  }
};

// out[r, c] = sum over images and pixels of a[., r] * b[., c] * gate[image, c]: a weight gradient.
struct ProductGradientParams {
  Map a, b;          // [batch, height, width, rows], [..., columns]
  const void* gate;  // [batch, columns] of the accumulator's type, or null
  void* out;         // [rows, columns], or [columns, rows] if `transposed`, of the accumulator's type
  void* partial;     // workspace [segments, rows, columns]
  std::int64_t batch, rows, columns;
  int dtype, transposed;

  template <typename F>
  void pointers(F&& f) {
    f(a.data), f(b.data), f(gate), f(out), f(partial);
  }
};

// Rows of the maps that one segment takes: about 1024 pixels.
inline std::int64_t segment_rows(std::int64_t width) {
  const std::int64_t rows = 1024 / width;
  return rows < 1 ? 1 : rows;
}
inline std::int64_t product_segments(std::int64_t batch, std::int64_t height, std::int64_t width) {
  const std::int64_t rows = segment_rows(width);
  return batch * ((height + rows - 1) / rows);
}

// Of y = x * gate: grad_x = grad * gate in place of grad, and grad_gate = sums over the pixels of grad * x.
struct GateGradientParams {
  void* grad;  // [batch, pixels, channels], dense; becomes grad_x
  const void* x;
  const void* gate;  // [batch, channels] of the accumulator's type
  void* grad_gate;   // likewise
  void* partial;     // workspace [gradient_blocks, channels]
  std::int64_t batch, pixels, channels, x_batch_stride, x_pixel_stride;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(grad), f(x), f(gate), f(grad_gate), f(partial);
  }
};

// Of a depthwise convolution: out[c, i, j] = sum of grad[h, w] * x[h * stride + i - top, w * stride + j - left].
struct DepthwiseGradientParams {
  Map x, grad;    // [batch, height, width, channels]
  void* out;      // [channels, kernel * kernel] of the accumulator's type
  void* partial;  // workspace [batch * strips, kernel * kernel, channels]
  std::int64_t batch, channels, kernel, stride, left, top;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(x.data), f(grad.data), f(out), f(partial);
  }
};

constexpr std::int64_t kStripRows = 16;  // of grad, whose part of the weight gradient one work item adds up

EFFDET_PER_ISA(Status, affine_gradient, (const AffineGradientParams&, int threads))
EFFDET_PER_ISA(Status, product_gradient, (const ProductGradientParams&, int threads))
EFFDET_PER_ISA(Status, gate_gradient, (const GateGradientParams&, int threads))
EFFDET_PER_ISA(Status, depthwise_gradient, (const DepthwiseGradientParams&, int threads))

}  // namespace effdet
