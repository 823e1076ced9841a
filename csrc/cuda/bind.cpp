#include <pybind11/pybind11.h>

#include <string>

#include "cuda/device.h"

namespace effdet {

void bind_cuda(pybind11::module_& module) {
  module.def("cuda_versions", [] {
    const cuda::Versions found = cuda::versions();
    return pybind11::make_tuple(found.runtime, found.driver);
  });
  module.def("cuda_error",
             [](int code) { return std::string(cuda::error_name(code)) + ": " + cuda::error_text(code); });
}

}  // namespace effdet
