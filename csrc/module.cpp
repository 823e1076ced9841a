// The Python module effdet_kernels._C. Each op's bind.cpp adds its functions.
#include <pybind11/pybind11.h>

namespace effdet {
void bind_cpu(pybind11::module_& module);
void bind_gradients(pybind11::module_& module);
#define EFFDET_OP(name) void bind_##name(pybind11::module_& module);
#include "ops.inc"
#undef EFFDET_OP
}  // namespace effdet

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of effdet_kernels; addresses and sizes in, a status out.";
  module.attr("BUILT_WITH_CUDA") = static_cast<bool>(EFFDET_BUILT_WITH_CUDA);
  effdet::bind_cpu(module);
  effdet::bind_gradients(module);
#define EFFDET_OP(name) effdet::bind_##name(module);
#include "ops.inc"
#undef EFFDET_OP
}
