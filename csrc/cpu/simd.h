// Vectors of the instruction set that a simd.cpp is compiled for. GCC and Clang vector extensions do the arithmetic;
// intrinsics only what they cannot say. No function of std: is called, so that none is emitted for this set.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#define EFFDET_INLINE inline __attribute__((always_inline))

namespace effdet {
namespace EFFDET_ISA {

using std::int64_t;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 8;  // of a matrix product's tile: kRows x 3 accumulators, 3 of b and one of a
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kRows = 4;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif
#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

// The type that T is accumulated in.
template <typename T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<BFloat16> {
  using type = float;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
using VecI = VectorOf<std::int32_t>::type;
using VecU = VectorOf<std::uint32_t>::type;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc<T>));

template <typename T>
EFFDET_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
EFFDET_INLINE T most(T a, T b) {
  return a > b ? a : b;
}
EFFDET_INLINE int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
EFFDET_INLINE int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

template <typename T>
EFFDET_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}
template <typename To, typename From>
EFFDET_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Loads and stores of one vector; T in memory, Acc<T> in the vector.
EFFDET_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
EFFDET_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
EFFDET_INLINE Vec<float> load(const BFloat16* p) {
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  Half h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(__builtin_convertvector(h, VecU) << 16);
}
EFFDET_INLINE void store(float* p, Vec<float> v) {
  std::memcpy(p, &v, sizeof(v));
}
EFFDET_INLINE void store(double* p, Vec<double> v) {
  std::memcpy(p, &v, sizeof(v));
}
EFFDET_INLINE void store(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &h, sizeof(h));
#else
  typedef std::uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  const VecU u = bit_cast<VecU>(v);
  const VecU even = u + 0x7fffu + ((u >> 16) & 1u);           // round to nearest, ties to even
  const VecU bits = (v == v ? even : (u | 0x400000u)) >> 16;  // a NaN stays one
  const Half h = __builtin_convertvector(bits, Half);
  std::memcpy(p, &h, sizeof(h));
#endif
}

// The first n of a vector's elements, 0 <= n <= lanes; load_n gives zeros beyond them.
template <typename T>
EFFDET_INLINE Vec<Acc<T>> load_n(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  alignas(64) T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
EFFDET_INLINE void store_n(T* p, Vec<Acc<T>> v, int64_t n) {
  if (n >= kLanes<T>) return store(p, v);
  alignas(64) T buffer[kLanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#if defined(__AVX512F__)
template <>
EFFDET_INLINE Vec<float> load_n<float>(const float* p, int64_t n) {
  if (n >= 16) return load(p);
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
}
template <>
EFFDET_INLINE void store_n<float>(float* p, Vec<float> v, int64_t n) {
  if (n >= 16) return store(p, v);
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
}
#endif

EFFDET_INLINE float widen(float x) {
  return x;
}
EFFDET_INLINE double widen(double x) {
  return x;
}
EFFDET_INLINE float widen(BFloat16 x) {
  return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

// Maximum in which a NaN on either side stays.
template <typename V>
EFFDET_INLINE V nan_max(V a, V b) {
  return ((a > b) | (a != a)) ? a : b;
}

// Whether any element of a comparison's result is true.
template <typename M>
EFFDET_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(bit_cast<__m256i>(mask), bit_cast<__m256i>(mask));
#else
  std::uint64_t words[2];
  std::memcpy(words, &mask, sizeof(mask));
  return (words[0] | words[1]) != 0;
#endif
}

// The lanes in which a comparison's result is true, a bit for each.
template <typename M>
EFFDET_INLINE unsigned lanes_of(M mask) {
  constexpr int kElement = static_cast<int>(sizeof(mask[0]));
#if defined(__AVX512DQ__)
  if constexpr (kElement == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  if constexpr (kElement == 8) return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
#elif defined(__AVX2__)
  if constexpr (kElement == 4) return static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
  if constexpr (kElement == 8) return static_cast<unsigned>(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
#endif
  unsigned lanes = 0;
  if (any(mask))
    for (int i = 0; i < static_cast<int>(sizeof(M)) / kElement; ++i) lanes |= static_cast<unsigned>(mask[i] != 0) << i;
  return lanes;
}

// The largest of a vector's elements, none of which is a NaN.
template <typename T, int kBytes = kVectorBytes>
struct Largest {
  typedef T V __attribute__((vector_size(kBytes)));
  static EFFDET_INLINE T of(V v) {
    if constexpr (kBytes == 2 * sizeof(T)) {
      return most(v[0], v[1]);
    } else {
      typedef T Half __attribute__((vector_size(kBytes / 2)));
      Half halves[2];
      std::memcpy(halves, &v, sizeof(v));
      return Largest<T, kBytes / 2>::of(halves[0] > halves[1] ? halves[0] : halves[1]);
    }
  }
};

// 1 / x for x in [1, 1e38]; within 1 ulp or so for float.
EFFDET_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> r = _mm512_maskz_rcp14_ps(0xffff, x);  // the plain one warns in GCC 12
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}
EFFDET_INLINE Vec<double> reciprocal(Vec<double> x) {
  return 1.0 / x;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
