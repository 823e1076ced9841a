// How CUDA kernels are bound: `<name>_cuda(fields, stream)`, in _C and in the emulation's module alike.
#pragma once

#include "common/bind.h"

namespace effdet::cuda {

// A map whose channels are read in 16-byte vectors: the address and all strides are multiples of them.
inline Map as_vector_map(const Fields& f, const char* name, const pybind11::handle& value) {
  const Map map = f.as_map(name, value);
  const std::int64_t unit = 16 / size_of(f.dtype());
  if (reinterpret_cast<std::uintptr_t>(map.data) % 16 != 0 || map.batch_stride % unit != 0 ||
      map.row_stride % unit != 0 || map.pixel_stride % unit != 0)
    throw std::invalid_argument(std::string(name) + ": the address or a stride is not a multiple of 16 bytes");
  return map;
}
inline Map vector_map(const Fields& f, const char* name) {
  return as_vector_map(f, name, f.get(name));
}

inline int count(const Fields& f, const char* name, std::int64_t smallest = 1) {
  return static_cast<int>(f.integer(name, smallest, std::numeric_limits<int>::max() / 2));
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
