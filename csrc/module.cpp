// The Python module effdet_kernels._C. Each op's bind.cpp adds its functions.
#include <pybind11/pybind11.h>

namespace effdet {
void bind_cpu(pybind11::module_& module);
void bind_gradients(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
#define EFFDET_CUDA_OP(name)
#define EFFDET_OP(name) void bind_##name(pybind11::module_& module);
#include "ops.inc"
#undef EFFDET_OP
#undef EFFDET_CUDA_OP
#define EFFDET_OP(name)
namespace cuda {
#define EFFDET_CUDA_OP(name) void bind_cuda_##name(pybind11::module_& module);
#include "ops.inc"
#undef EFFDET_CUDA_OP
}  // namespace cuda
#undef EFFDET_OP
}  // namespace effdet

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of effdet_kernels; addresses and sizes in, a status out.";
  module.attr("BUILT_WITH_CUDA") = static_cast<bool>(EFFDET_BUILT_WITH_CUDA);
#ifdef _OPENMP
  module.attr("BUILT_WITH_OPENMP") = true;
#else
  module.attr("BUILT_WITH_OPENMP") = false;
#endif
  effdet::bind_cpu(module);
  effdet::bind_gradients(module);
#define EFFDET_CUDA_OP(name)
#define EFFDET_OP(name) effdet::bind_##name(module);
#include "ops.inc"
#undef EFFDET_OP
#undef EFFDET_CUDA_OP
#if EFFDET_BUILT_WITH_CUDA
  module.attr("CUDA_RELEASE") = EFFDET_CUDA_RELEASE;
  effdet::bind_cuda(module);
#define EFFDET_OP(name)
#define EFFDET_CUDA_OP(name) effdet::cuda::bind_cuda_##name(module);
#include "ops.inc"
#undef EFFDET_CUDA_OP
#undef EFFDET_OP
#endif
}
