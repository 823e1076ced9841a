// What every .cu file includes first: CUDA, or for a C++ compiler its emulation (csrc/common/emu).
#pragma once

#include <cstdint>

#ifndef EFFDET_EMULATED
#include <cuda_runtime.h>
#define EFFDET_UNROLL _Pragma("unroll")
#define EFFDET_NO_UNROLL _Pragma("unroll 1")
#define EFFDET_CALLER  // a last parameter that takes the place of the call, for the emulator's messages
#else
#include "common/emu/emu.h"
#define EFFDET_UNROLL
#define EFFDET_NO_UNROLL
#define EFFDET_CALLER , Where where = Where::here()
#endif

namespace effdet::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAll = ~0u;  // all threads of a warp

__device__ __forceinline__ int lane_id() {
  return static_cast<int>(threadIdx.x % kWarp);
}
__device__ __forceinline__ int warp_id() {
  return static_cast<int>(threadIdx.x / kWarp);
}

// Rounded up.
__host__ __device__ constexpr int divided(int count, int by) {
  return (count + by - 1) / by;
}
__host__ __device__ constexpr std::int64_t divided(std::int64_t count, std::int64_t by) {
  return (count + by - 1) / by;
}

// A kernel of a chain may start before the one before it has ended: all of it that was written is there after this.
// Every kernel calls it before it reads or writes global memory.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the chain may start, as far as there is room for it.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace effdet::cuda
