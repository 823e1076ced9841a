// float, bfloat16 and float16: one at a time, and pairs in 32 bits.
#pragma once

#include <cstring>

#include "common/dtype.h"
#include "cuda/platform.h"

namespace effdet::cuda {

#ifdef EFFDET_EMULATED
inline float from_half(std::uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline std::uint16_t to_half(float x) {
  const auto value = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}
#endif

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(unsigned{x.bits} << 16);
}
__device__ __forceinline__ float widen(Float16 x) {
#ifndef EFFDET_EMULATED
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return from_half(x.bits);
#endif
}

// Rounded to the nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  BFloat16 y;
#ifndef EFFDET_EMULATED
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);
  y.bits = x != x ? 0x7fff : static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return y;
}
template <>
__device__ __forceinline__ Float16 narrow<Float16>(float x) {
  Float16 y;
#ifndef EFFDET_EMULATED
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = to_half(x);
#endif
  return y;
}

// Two 16-bit numbers, the first in the low half.
template <typename T>
__device__ __forceinline__ float2 widen_pair(unsigned pair);
template <>
__device__ __forceinline__ float2 widen_pair<BFloat16>(unsigned pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen_pair<Float16>(unsigned pair) {
  return {widen(Float16{static_cast<std::uint16_t>(pair)}), widen(Float16{static_cast<std::uint16_t>(pair >> 16)})};
}

template <typename T>
__device__ __forceinline__ unsigned narrow_pair(float first, float second);
template <>
__device__ __forceinline__ unsigned narrow_pair<BFloat16>(float first, float second) {
#ifndef EFFDET_EMULATED
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return narrow<BFloat16>(first).bits | unsigned{narrow<BFloat16>(second).bits} << 16;
#endif
}
template <>
__device__ __forceinline__ unsigned narrow_pair<Float16>(float first, float second) {
#ifndef EFFDET_EMULATED
  unsigned pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return narrow<Float16>(first).bits | unsigned{narrow<Float16>(second).bits} << 16;
#endif
}

// The 16 bytes of a vector as floats: 4 of float, 8 of the short types.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void widen_vector(const uint4& vector, float (&values)[kVector<T>]) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
  EFFDET_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = widen_pair<T>(words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 narrow_vector(const float (&values)[kVector<T>]) {
  unsigned words[4];
  EFFDET_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(values[i]);
    } else {
      words[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ bool finite(float x) {
  return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

}  // namespace effdet::cuda
