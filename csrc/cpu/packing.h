// Weights in the order in which kernels read them (cpu/gemm.h, cpu/depthwise.h): packed once for a network's plan, else
// in each call.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

// A convolution's weight [out, in, kernel_rows, kernel_columns] of any strides, in elements.
struct WeightParams {
  const void* weight;
  void* packed;
  std::int64_t out, in, rows, columns;
  std::int64_t out_stride, in_stride, row_stride, column_stride;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(weight), f(packed);
  }
};

// A vector [count] in the accumulator's type of `dtype`, padded with zeros to whole vectors.
struct VectorParams {
  const void* vector;
  void* packed;
  std::int64_t count, stride;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(vector), f(packed);
  }
};

// Bytes of a packed dense weight: `segments` kernel rows of `length` elements of k.
EFFDET_PER_ISA(std::int64_t, packed_dense_bytes,
               (int dtype, std::int64_t out, std::int64_t segments, std::int64_t length))
EFFDET_PER_ISA(std::int64_t, packed_depthwise_bytes, (int dtype, std::int64_t channels, std::int64_t taps))
EFFDET_PER_ISA(Status, pack_dense, (const WeightParams&, int threads))
EFFDET_PER_ISA(Status, pack_depthwise, (const WeightParams&, int threads))
EFFDET_PER_ISA(Status, pack_vector, (const VectorParams&, int threads))

}  // namespace effdet
