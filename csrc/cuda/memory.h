// Vectors in memory, shared memory, asynchronous copies into it.
#pragma once

#include "cuda/platform.h"

namespace effdet::cuda {

// A vector load or store: `at` is a multiple of its size.
template <typename V, typename T>
__device__ __forceinline__ V load(const T* at EFFDET_CALLER) {
#ifdef EFFDET_EMULATED
  emu::check_aligned(at, sizeof(V), where);
#endif
  return *reinterpret_cast<const V*>(at);
}
template <typename V, typename T>
__device__ __forceinline__ void store(T* at, const V& value EFFDET_CALLER) {
#ifdef EFFDET_EMULATED
  emu::check_aligned(at, sizeof(V), where);
#endif
  *reinterpret_cast<V*>(at) = value;
}

// Hands out the block's dynamic shared memory, array by array; every thread takes the same ones in the same order.
class Shared {
 public:
  template <typename T>
  __device__ __forceinline__ T* take(int count EFFDET_CALLER) {
    const std::size_t bytes = rounded(count * sizeof(T));
#ifndef EFFDET_EMULATED
    extern __shared__ __align__(16) unsigned char memory[];
    void* at = memory + taken_;
#else
    void* at = emu::take_shared(taken_, arrays_++, count * sizeof(T), where);
#endif
    taken_ += bytes;
    return static_cast<T*>(at);
  }

  // What an array takes of it.
  __host__ __device__ static constexpr std::size_t rounded(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

 private:
  std::size_t taken_ = 0;
#ifdef EFFDET_EMULATED
  std::size_t arrays_ = 0;
#endif
};

// Begins to copy 16 bytes into shared memory, or zeros where `exists` is false (then nothing is read).
__device__ __forceinline__ void begin_copy16(void* to, const void* from, bool exists EFFDET_CALLER) {
#ifndef EFFDET_EMULATED
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
#else
  emu::begin_copy(to, from, exists ? 16 : 0, exists ? 0 : 16, where);
#endif
}

// The copies that this thread has begun since the last call are a group.
__device__ __forceinline__ void end_copies() {
#ifndef EFFDET_EMULATED
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::end_copy_group();
#endif
}

// Waits for all groups of this thread but the newest `kLeft`; what other threads copied is there after a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#ifndef EFFDET_EMULATED
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  emu::wait_for_copies(kLeft);
#endif
}

}  // namespace effdet::cuda
