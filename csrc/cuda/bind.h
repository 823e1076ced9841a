// How CUDA kernels are bound: `<name>_cuda(fields, stream)`, in _C and in the emulation's module alike.
#pragma once

#include "common/bind.h"

namespace effdet::cuda {

constexpr std::int64_t kMostInside = std::numeric_limits<std::int32_t>::max() - (1 << 16);  // offset in an image

// A map whose channels are read in 16-byte vectors: the address and all strides are multiples of them.
inline Map as_vector_map(const Fields& f, const char* name, const pybind11::handle& value) {
  const Map map = f.as_map(name, value);
  const std::int64_t unit = 16 / size_of(f.dtype());
  if (reinterpret_cast<std::uintptr_t>(map.data) % 16 != 0 || map.batch_stride % unit != 0 ||
      map.row_stride % unit != 0 || map.pixel_stride % unit != 0)
    throw std::invalid_argument(std::string(name) + ": the address or a stride is not a multiple of 16 bytes");
  const auto last = (map.height - 1) * map.row_stride + (map.width - 1) * map.pixel_stride;
  if (map.row_stride < 0 || map.pixel_stride < 0 || last > kMostInside)
    throw std::invalid_argument(std::string(name) + ": an image has more than 2^31 elements");
  return map;
}
inline Map vector_map(const Fields& f, const char* name) {
  return as_vector_map(f, name, f.get(name));
}

// Refuses a dense map whose offsets in an image do not fit in 32 bits.
inline void dense_map(std::int64_t channels, std::int64_t height, std::int64_t width) {
  if (height * width > kMostInside / channels) throw std::invalid_argument("an image has more than 2^31 elements");
}

inline int count(const Fields& f, const char* name, std::int64_t smallest = 1) {
  return static_cast<int>(f.integer(name, smallest, std::numeric_limits<int>::max() / 4));
}

template <typename Params>
void bind_kernel(pybind11::module_& module, const char* name, Params (*read)(const Fields&),
                 int (*kernel)(const Params&, void* stream)) {
  module.def((std::string(name) + "_cuda").c_str(),
             [read, kernel](const pybind11::dict& fields, std::uintptr_t stream) {
               const Params params = read(Fields(fields, kFloat16));
               const pybind11::gil_scoped_release released;
               return kernel(params, reinterpret_cast<void*>(stream));
             });
}

}  // namespace effdet::cuda
