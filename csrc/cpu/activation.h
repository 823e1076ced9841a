// Activations on vectors: those of effdet_kernels/ops/_activations.py.
#pragma once

#include "common/activation_codes.h"
#include "cpu/simd.h"

namespace effdet {
namespace EFFDET_ISA {

// e^x for x in [-87, 88]; a NaN stays, whatever its bits. Cody and Waite's reduction to |r| <= ln(2)/2, a polynomial of
// degree 7 (Cephes' expf).
EFFDET_INLINE Vec<float> exponential(Vec<float> x) {
  const float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec<float> t = x * 1.44269504088896341f + kMagic;
  const Vec<float> n = t - kMagic;
  const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<float> y = bit_cast<Vec<float>>(bit_cast<VecI>(p) + (bit_cast<VecI>(t) << 23));
  return x == x ? y : x;  // the sum of bits can be that of a number
}
EFFDET_INLINE Vec<double> exponential(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

// x, but at least (at most) `bound`; a NaN stays.
template <typename V>
EFFDET_INLINE V lower(V x, V bound) {
  return x < bound ? bound : x;
}
template <typename V>
EFFDET_INLINE V upper(V x, V bound) {
  return x > bound ? bound : x;
}
#if defined(__AVX512F__)  // one instruction, which gives its second operand where one is a NaN
template <>
EFFDET_INLINE Vec<float> lower(Vec<float> x, Vec<float> bound) {
  return _mm512_maskz_max_ps(0xffff, bound, x);
}
template <>
EFFDET_INLINE Vec<float> upper(Vec<float> x, Vec<float> bound) {
  return _mm512_maskz_min_ps(0xffff, bound, x);
}
#elif defined(__AVX2__)
template <>
EFFDET_INLINE Vec<float> lower(Vec<float> x, Vec<float> bound) {
  return _mm256_max_ps(bound, x);
}
template <>
EFFDET_INLINE Vec<float> upper(Vec<float> x, Vec<float> bound) {
  return _mm256_min_ps(bound, x);
}
#endif

template <typename T>
struct Exponents;  // where e^x neither overflows nor leaves the normal numbers
template <>
struct Exponents<float> {
  static constexpr float kLargest = 87.0f;
};
template <>
struct Exponents<double> {
  static constexpr double kLargest = 700.0;
};

// 1 / (1 + e^-x), 0 below the range of e^-x, where it is less than the smallest normal number or so.
template <typename T>
EFFDET_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> most_ = splat<T>(Exponents<T>::kLargest);
  const Vec<T> e = exponential(upper(lower(-x, -most_), most_));
  const Vec<T> s = reciprocal(e + T(1));
  return x < -most_ ? Vec<T>{} : s;
}

#if defined(__AVX512F__)
// 1 / (1 + e^-x): e^-x = 2^n 2^r with n the integer nearest to -x / ln 2, which is taken in two parts, so that r is
// exact to rounding; 2^r by a polynomial of degree 6 (relative error 1.6e-8, found by iterated least squares), the
// reciprocal by one Newton step.
template <>
EFFDET_INLINE Vec<float> sigmoid<float>(Vec<float> x) {
  constexpr float kHigh = -1.44269502f, kLow = -1.92596299e-8f;  // their sum is -1 / ln 2
  const Vec<float> bounded = upper(x, splat<float>(88.0f));
  const Vec<float> n = _mm512_maskz_roundscale_ps(0xffff, bounded * kHigh, _MM_FROUND_TO_NEAREST_INT);
  const Vec<float> r = bounded * kLow + (bounded * kHigh - n);
  Vec<float> p = r * 1.5353362e-4f + 1.3398875e-3f;
  p = p * r + 9.618437e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 0.24022648f;
  p = p * r + 0.6931472f;
  p = p * r + 1.0f;
  const Vec<float> d = _mm512_maskz_scalef_ps(0xffff, p, n) + 1.0f;
  const Vec<float> s = _mm512_maskz_rcp14_ps(0xffff, d);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat<float>(-87.0f), _CMP_NLE_UQ);  // a NaN too
  return _mm512_maskz_fmadd_ps(normal, 1.0f - d * s, s, s);
}
#endif

// x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2); the ratio is 1 to rounding above 20 (fp64: 40).
template <typename T>
EFFDET_INLINE Vec<T> mish(Vec<T> x) {
  const Vec<T> most_ = splat<T>(Exponents<T>::kLargest);
  const Vec<T> e = exponential(upper(lower(x, -most_), splat<T>(T(sizeof(T) == 4 ? 20 : 40))));
  const Vec<T> n = e * (e + T(2));
  const Vec<T> ratio = n / (n + T(2));
  return x * (x < -most_ ? Vec<T>{} : ratio);
}

template <typename T>
EFFDET_INLINE Vec<T> swish(Vec<T> x) {
  return x * sigmoid<T>(x);
}

// Those that no caller has inline.
template <typename T>
__attribute__((noinline)) Vec<T> other_activation(Vec<T> x, int act) {
  const Vec<T> zero{};
  switch (act) {
    case kHardSwish:
      return x * (upper(lower(x + T(3), zero), splat<T>(6)) / T(6));
    case kLeakyRelu:
      return x < zero ? x * T(0.01) : x;
    case kMish:
      return mish<T>(x);
  }
  return x;
}

template <typename T>
EFFDET_INLINE Vec<T> activate(Vec<T> x, int act) {
  if (act == kNone) return x;
  if (act == kSwish) return swish<T>(x);
  if (act == kRelu) return lower(x, Vec<T>{});
  if (act == kRelu6) return upper(lower(x, Vec<T>{}), splat<T>(6));
  return other_activation<T>(x, act);
}

}  // namespace EFFDET_ISA
}  // namespace effdet
