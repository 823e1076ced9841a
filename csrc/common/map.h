// A map as kernels see it: channels next to each other, other strides in elements.
#pragma once

#include <cstdint>

namespace effdet {

struct Map {
  const void* data;
  std::int64_t height, width;
  std::int64_t batch_stride, row_stride, pixel_stride;
};

constexpr std::int64_t kMaxKernel = 15;  // side of a convolution's kernel

}  // namespace effdet
