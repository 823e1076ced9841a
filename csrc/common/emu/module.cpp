// The Python module _emulated: the CUDA kernels of all ops on the emulator. Test-only.
#include <pybind11/pybind11.h>

#include "common/emu/emu.h"

namespace effdet::cuda {
#define EFFDET_OP(name)
#define EFFDET_CUDA_OP(name) void bind_cuda_##name(pybind11::module_& module);
#include "ops.inc"
#undef EFFDET_CUDA_OP
}  // namespace effdet::cuda

PYBIND11_MODULE(_emulated, module) {
  module.doc() = "CUDA kernels of effdet_kernels on a CPU; addresses and sizes in, a status out.";
  module.def("set_order", [](std::uint64_t order) { effdet::emu::order = order; });
  module.def("set_shared_limit", [](std::size_t bytes) { effdet::emu::shared_limit = bytes; });
#define EFFDET_CUDA_OP(name) effdet::cuda::bind_cuda_##name(module);
#include "ops.inc"
#undef EFFDET_CUDA_OP
#undef EFFDET_OP
}
