// Dtype codes shared with effdet_kernels/_native.py.
#pragma once

#include <cstdint>

namespace effdet {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// The bits of numbers that C++ has no type for.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline std::int64_t size_of(int dtype) {
  return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
}

}  // namespace effdet
