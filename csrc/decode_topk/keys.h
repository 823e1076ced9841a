// Numbers as unsigned integers in their order, and the larger of numbers as they lie in memory.
#pragma once

#include <type_traits>

#include "cuda/number.h"

namespace effdet::cuda {

// The key of a number: NaN has infinity's, -0 has that of 0; 0 is no number's key.
template <typename T>
using Key = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint16_t>;
template <typename T>
constexpr int kKeyBits = 8 * static_cast<int>(sizeof(T));
template <typename T>
constexpr unsigned kZeroKey = 1u << (kKeyBits<T> - 1);
template <typename T>
constexpr unsigned kInfinity = std::is_same_v<T, float>      ? 0x7f800000u
                               : std::is_same_v<T, BFloat16> ? 0x7f80u
                                                             : 0x7c00u;
template <typename T>
constexpr unsigned kLowestKey = kZeroKey<T> - kInfinity<T>;  // of -infinity
template <typename T>
constexpr unsigned kHighestKey = kZeroKey<T> + kInfinity<T>;

__device__ __forceinline__ unsigned bits_of(float x) {
  return __float_as_uint(x);
}
template <typename T>
__device__ __forceinline__ unsigned bits_of(T x) {
  return x.bits;
}

template <typename T>
__device__ __forceinline__ unsigned key_of(unsigned bits) {
  const unsigned magnitude = bits & (kZeroKey<T> - 1);
  if (magnitude > kInfinity<T>) return kHighestKey<T>;
  return bits & kZeroKey<T> ? kZeroKey<T> - magnitude : kZeroKey<T> + magnitude;
}

// The bits of a key's number, in all of a word.
template <typename T>
__device__ __forceinline__ unsigned word_of(unsigned key) {
  const unsigned bits = key < kZeroKey<T> ? kZeroKey<T> | (kZeroKey<T> - key) : key - kZeroKey<T>;
  return sizeof(T) == 4 ? bits : bits | bits << 16;
}

// The larger ones of a word's numbers, one or two; NaN is larger than all.
template <typename T>
__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
#ifndef EFFDET_EMULATED
  unsigned c;
  if constexpr (std::is_same_v<T, float>) {
    asm("max.NaN.f32 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#else
  const auto of_two = [](unsigned x, unsigned y) { return key_of<T>(x) >= key_of<T>(y) ? x : y; };
  if constexpr (sizeof(T) == 4) {
    return of_two(a, b);
  } else {
    return of_two(a & 0xffffu, b & 0xffffu) | of_two(a >> 16, b >> 16) << 16;
  }
#endif
}

// Which of a word's numbers are not less than those of another: bits 0 to 15, and 16 to 31; a NaN is not less.
template <typename T>
__device__ __forceinline__ unsigned not_less(unsigned a, unsigned b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned mask;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("set.geu.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  } else {
    asm("set.geu.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  }
  return mask;
#else
  const float2 x = widen_pair<T>(a), y = widen_pair<T>(b);
  return (x.x < y.x ? 0u : 0xffffu) | (x.y < y.y ? 0u : 0xffff0000u);
#endif
}

// Which numbers of a vector are at least those of `word`, a bit each.
template <typename T>
__device__ __forceinline__ unsigned at_least(const uint4& vector, unsigned word) {
  const unsigned words[4] = {vector.x, vector.y, vector.z, vector.w};
  unsigned mask = 0;
  if constexpr (sizeof(T) == 4) {
    EFFDET_UNROLL
    for (int i = 0; i < 4; ++i) mask |= __uint_as_float(words[i]) < __uint_as_float(word) ? 0u : 1u << i;
    return mask;
  } else {
    EFFDET_UNROLL
    for (int i = 0; i < 4; ++i) mask |= not_less<T>(words[i], word) & (1u << 2 * i | 2u << (2 * i + 16));
    return (mask | mask >> 16) & 0xffu;
  }
}

// Element i of a vector, its bits.
template <typename T>
__device__ __forceinline__ unsigned element_of(const uint4& vector, int i) {
  if constexpr (sizeof(T) == 4) {
    return i < 2 ? (i == 0 ? vector.x : vector.y) : i == 2 ? vector.z : vector.w;
  } else {
    const unsigned word = i < 4 ? (i < 2 ? vector.x : vector.y) : i < 6 ? vector.z : vector.w;
    return word >> 16 * (i % 2) & 0xffffu;
  }
}

}  // namespace effdet::cuda
