// Launches: a grid, its shared memory, and that it may start before the kernel before it has ended.
#pragma once

#include <utility>

#include "common/status.h"
#include "cuda/device.h"
#include "cuda/platform.h"

namespace effdet::cuda {

struct Grid {
  std::int64_t blocks = 0;
  int threads = 0;
  std::size_t shared_bytes = 0;
};

constexpr std::int64_t kMostBlocks = 0x7fffffff;

// Bytes of shared memory that a block may have on the current device; 0: the device does not say.
inline std::size_t shared_limit() {
#ifndef EFFDET_EMULATED
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    cudaGetLastError();  // forgets it
    return 0;
  }
  return static_cast<std::size_t>(bytes);
#else
  return emu::shared_limit;
#endif
}

// A negative status is a CUDA error's code.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), const Grid& grid, void* stream, Args&&... args) {
  if (grid.blocks == 0) return kOk;
  if (grid.blocks > kMostBlocks) return kBadSize;
#ifndef EFFDET_EMULATED
  if (grid.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // forgets it
      return -static_cast<int>(error);
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlaps() ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) cudaGetLastError();
  return -static_cast<int>(error);
#else
  (void)stream;
  emu::run(dim3(static_cast<unsigned>(grid.blocks)), dim3(static_cast<unsigned>(grid.threads)), grid.shared_bytes,
           [&] { kernel(Params(args)...); });
  return kOk;
#endif
}

}  // namespace effdet::cuda
