#include <cuda_runtime.h>

#include <array>
#include <atomic>

#include "cuda/device.h"

namespace effdet::cuda {

bool overlaps() {
  constexpr int kMostDevices = 64;
  static std::array<std::atomic<int>, kMostDevices> major{};  // 0: not asked yet
  int device = 0, found = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return false;
  found = major[device].load(std::memory_order_relaxed);
  if (found == 0) {
    if (cudaDeviceGetAttribute(&found, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    major[device].store(found, std::memory_order_relaxed);
  }
  return found >= 9;
}

Versions versions() {
  Versions found{};
  cudaRuntimeGetVersion(&found.runtime);
  cudaDriverGetVersion(&found.driver);
  return found;
}

const char* error_name(int code) {
  return cudaGetErrorName(static_cast<cudaError_t>(code));
}
const char* error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace effdet::cuda
