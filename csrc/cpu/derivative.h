// Derivatives of the activations, as torch's backward has them.
#pragma once

#include "cpu/activation.h"

namespace effdet {
namespace EFFDET_ISA {

template <typename T>
__attribute__((noinline)) Vec<T> other_derivative(Vec<T> x, int act) {
  const Vec<T> zero{}, one = splat<T>(1);
  switch (act) {
    case kRelu:
      return x > zero ? one : (x != x ? x : zero);
    case kRelu6:
      return ((x > zero) & (x < splat<T>(6))) ? one : (x != x ? x : zero);
    case kHardSwish: {
      const Vec<T> middle = x / T(3) + T(0.5);
      const Vec<T> inner = x < splat<T>(-3) ? zero : middle;
      return x > splat<T>(3) ? one : inner;
    }
    case kLeakyRelu:
      return x > zero ? one : (x != x ? x : splat<T>(T(0.01)));
    case kMish: {  // t + x (1 - t^2) sigmoid(x), t = tanh(softplus(x)) = n / (n + 2); 1 - t^2 = 4 (n + 1) / (n + 2)^2
      const Vec<T> largest = splat<T>(Exponents<T>::kLargest);
      const Vec<T> e = exponential(upper(lower(x, -largest), splat<T>(T(sizeof(T) == 4 ? 20 : 40))));
      const Vec<T> n = e * (e + T(2)), ratio = n / (n + T(2));
      const Vec<T> slope = ratio + x * (T(4) * (n + T(1)) / ((n + T(2)) * (n + T(2)))) * sigmoid<T>(x);
      const Vec<T> low = x < -largest ? zero : slope;
      return x > splat<T>(T(sizeof(T) == 4 ? 20 : 40)) ? one : low;
    }
  }
  return one;
}

template <typename T>
EFFDET_INLINE Vec<T> derivative(Vec<T> x, int act) {
  if (act == kNone) return splat<T>(1);
  if (act == kSwish) {
    const Vec<T> s = sigmoid<T>(x);
    return s + x * s * (T(1) - s);
  }
  return other_derivative<T>(x, act);
}

}  // namespace EFFDET_ISA
}  // namespace effdet
