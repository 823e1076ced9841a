// CUDA's vocabulary for a C++ compiler: the .cu files of the ops, built without nvcc, run on a CPU. Test-only.
//
// A thread of a block is a fiber. It runs until it waits for others (a barrier, a warp operation, its end); then the
// next one runs, in an order drawn per launch. Dynamic shared memory starts as NaN. A mistake that the emulator sees
// (a barrier that not all threads reach, a misaligned vector, more shared memory than was asked for) is an exception.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace effdet::emu {

constexpr int kWarp = 32;

struct Where {  // a place in the source
  const char* file;
  int line;
  static Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Of the fiber that runs.
extern thread_local uint3 thread_index, block_index;
extern thread_local dim3 block_size, grid_size;

// How the blocks of a grid, the warps of a block and the threads of a warp are visited: 0 ascending, 1 descending,
// else an order drawn with this seed.
extern thread_local std::uint64_t order;

// Shared memory of a block on the device that is emulated.
extern thread_local std::size_t shared_limit;

[[noreturn]] void fail(const std::string& what, Where where);

// Runs a grid to its end; throws std::runtime_error for what a kernel does wrong.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

// The next `bytes` of the block's shared memory, of which `before` were taken by this thread so far; 16-byte aligned,
// with a zone around it that AddressSanitizer watches.
void* take_shared(std::size_t before, std::size_t arrays, std::size_t bytes, Where where);

void barrier(Where where);

// All 32 threads of a warp give `bytes` (at most 64); returns the warp's 32 values, 64 bytes apart.
const unsigned char* exchange(const void* mine, std::size_t bytes, const char* what, Where where);

template <typename T>
struct Lanes {
  const unsigned char* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots + 64 * lane, sizeof(T));
    return value;
  }
  const T& at(int lane) const { return *reinterpret_cast<const T*>(slots + 64 * lane); }
};

template <typename T>
Lanes<T> exchange(const T& mine, const char* what, Where where) {
  static_assert(sizeof(T) <= 64);
  return {exchange(&mine, sizeof(T), what, where)};
}

inline int lane() {
  return static_cast<int>(thread_index.x) % kWarp;
}

// Copies that have begun: they happen, in order, when their thread waits for them, and not before.
void begin_copy(void* to, const void* from, std::size_t bytes, std::size_t zeros, Where where);
void end_copy_group();
void wait_for_copies(int groups_left);

void check_aligned(const void* address, std::size_t bytes, Where where);

}  // namespace effdet::emu

#define threadIdx ::effdet::emu::thread_index
#define blockIdx ::effdet::emu::block_index
#define blockDim ::effdet::emu::block_size
#define gridDim ::effdet::emu::grid_size

using effdet::emu::Where;

inline void __syncthreads(Where where = Where::here()) {
  effdet::emu::barrier(where);
}

inline void __syncwarp(unsigned mask = ~0u, Where where = Where::here()) {
  if (mask != ~0u) effdet::emu::fail("a warp operation of some threads only", where);
  effdet::emu::exchange(0, "__syncwarp", where);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Where where = Where::here()) {
  if (mask != ~0u) effdet::emu::fail("a warp operation of some threads only", where);
  const auto lanes = effdet::emu::exchange(value, "__shfl_sync", where);
  const int lane = effdet::emu::lane();
  return lanes[lane / width * width + source % width];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Where where = Where::here()) {
  if (mask != ~0u || width != 32) effdet::emu::fail("a warp operation of some threads only", where);
  return effdet::emu::exchange(value, "__shfl_xor_sync", where)[effdet::emu::lane() ^ bits];
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, Where where = Where::here()) {
  if (mask != ~0u || width != 32) effdet::emu::fail("a warp operation of some threads only", where);
  const auto lanes = effdet::emu::exchange(value, "__shfl_up_sync", where);
  const int lane = effdet::emu::lane();
  return lanes[lane < static_cast<int>(by) ? lane : lane - static_cast<int>(by)];
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, Where where = Where::here()) {
  if (mask != ~0u || width != 32) effdet::emu::fail("a warp operation of some threads only", where);
  const auto lanes = effdet::emu::exchange(value, "__shfl_down_sync", where);
  const int lane = effdet::emu::lane();
  return lanes[lane + static_cast<int>(by) > 31 ? lane : lane + static_cast<int>(by)];
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::here()) {
  if (mask != ~0u) effdet::emu::fail("a warp operation of some threads only", where);
  const auto lanes = effdet::emu::exchange(predicate, "__ballot_sync", where);
  unsigned found = 0;
  for (int lane = 0; lane < effdet::emu::kWarp; ++lane) found |= lanes[lane] ? 1u << lane : 0u;
  return found;
}

inline int __any_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, Where where = Where::here()) {
  return __ballot_sync(mask, predicate, where) == ~0u;
}

#define EFFDET_EMU_REDUCE(name, T, step)                                                \
  inline T name(unsigned mask, T value, Where where = Where::here()) {                  \
    if (mask != ~0u) effdet::emu::fail("a warp operation of some threads only", where); \
    const auto lanes = effdet::emu::exchange(value, #name, where);                      \
    T all = lanes[0];                                                                   \
    for (int lane = 1; lane < effdet::emu::kWarp; ++lane) {                             \
      const T next = lanes[lane];                                                       \
      all = step;                                                                       \
    }                                                                                   \
    return all;                                                                         \
  }
EFFDET_EMU_REDUCE(__reduce_max_sync, unsigned, next > all ? next : all)
EFFDET_EMU_REDUCE(__reduce_min_sync, unsigned, next < all ? next : all)
EFFDET_EMU_REDUCE(__reduce_add_sync, unsigned, all + next)
EFFDET_EMU_REDUCE(__reduce_max_sync, int, next > all ? next : all)
EFFDET_EMU_REDUCE(__reduce_min_sync, int, next < all ? next : all)
EFFDET_EMU_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(all) + static_cast<unsigned>(next)))
#undef EFFDET_EMU_REDUCE

// Fibers run one at a time: what is atomic on a GPU is ordinary here.
template <typename T>
T atomicAdd(T* at, T more) {
  const T before = *at;
  *at = before + more;
  return before;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  if (value > before) *at = value;
  return before;
}
template <typename T>
T atomicOr(T* at, T bits) {
  const T before = *at;
  *at = before | bits;
  return before;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
template <typename T>
T __ldg(const T* at) {
  return *at;
}
// Rounded one by one: never part of a fused multiply-add.
inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
using std::fma;
using std::fmaxf;
using std::fminf;
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
