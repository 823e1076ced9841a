// Activations and their derivatives on floats, of which effdet_kernels/ops/_activations.py is the definition.
#pragma once

#include "common/activation_codes.h"
#include "cuda/platform.h"

namespace effdet::cuda {

// 2^x and 1 / x as the GPU approximates them: at most 2 units in the last place off, subnormals are 0.
__device__ __forceinline__ float power_of_2(float x) {
#ifndef EFFDET_EMULATED
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
__device__ __forceinline__ float reciprocal(float x) {
#ifndef EFFDET_EMULATED
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
__device__ __forceinline__ float exponential(float x) {
  return power_of_2(x * 1.4426950408889634f);
}
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + exponential(-x));
}

// tanh(softplus(x)) = n / (n + 2) with n = e (e + 2), e = exp(x); 1 beyond 20.
__device__ __forceinline__ float mish_ratio(float x) {
  const float e = exponential(x > 20.0f ? 20.0f : x);
  const float n = e * (e + 2.0f);
  return n * reciprocal(n + 2.0f);
}

// x in [0, 6]; a NaN stays.
__device__ __forceinline__ float clamped6(float x) {
  return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x;
}

constexpr int kAny = -1;

// Activates `kCount` values: by the activation kAct, or where that is kAny by `act`, of which all threads have the
// same.
template <int kAct, int kCount>
__device__ __forceinline__ void activate(float (&x)[kCount], int act) {
  if constexpr (kAct != kAny) act = kAct;
  const auto each = [&](auto function) {
    EFFDET_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = function(x[i]);
  };
  switch (act) {
    case kSwish:
      return each([](float v) { return v * sigmoid(v); });
    case kRelu:
      return each([](float v) { return v < 0.0f ? 0.0f : v; });
    case kRelu6:
      return each([](float v) { return clamped6(v); });
    case kHardSwish:
      return each([](float v) { return v * clamped6(v + 3.0f) * (1.0f / 6.0f); });
    case kLeakyRelu:
      return each([](float v) { return v < 0.0f ? 0.01f * v : v; });
    case kMish:
      return each([](float v) { return v * mish_ratio(v); });
    default:
      return;
  }
}

template <int kCount>
__device__ __forceinline__ void activate(float (&x)[kCount], int act) {
  activate<kAny>(x, act);
}

// The same of an even number of values, for results of 16 bits: two swishes share a reciprocal, which costs more
// instructions and fewer approximations, of which a multiprocessor makes 16 a clock. A sigmoid is at least 2^-63.
template <int kAct, int kCount>
__device__ __forceinline__ void activate_pairs(float (&x)[kCount], int act) {
  static_assert(kCount % 2 == 0);
  if constexpr (kAct == kSwish) {
    EFFDET_UNROLL
    for (int i = 0; i < kCount; i += 2) {
      const float a = 1.0f + power_of_2(fminf(x[i] * -1.4426950408889634f, 63.0f));  // 63 for a NaN
      const float b = 1.0f + power_of_2(fminf(x[i + 1] * -1.4426950408889634f, 63.0f));
      const float both = reciprocal(a * b);
      x[i] *= both * b;
      x[i + 1] *= both * a;
    }
  } else {
    activate<kAct>(x, act);
  }
}

// Turns `kCount` arguments of the activation into its derivatives there, at a kink what torch takes.
template <int kCount>
__device__ __forceinline__ void slopes(float (&x)[kCount], int act) {
  const auto each = [&](auto function) {
    EFFDET_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = function(x[i]);
  };
  switch (act) {
    case kSwish:
      return each([](float v) {
        const float s = sigmoid(v);
        return s * (1.0f + v * (1.0f - s));
      });
    case kRelu:
      return each([](float v) { return v > 0.0f ? 1.0f : 0.0f; });
    case kRelu6:
      return each([](float v) { return v > 0.0f && v < 6.0f ? 1.0f : 0.0f; });
    case kHardSwish:
      return each([](float v) { return v <= -3.0f ? 0.0f : v >= 3.0f ? 1.0f : (2.0f * v + 3.0f) * (1.0f / 6.0f); });
    case kLeakyRelu:
      return each([](float v) { return v > 0.0f ? 1.0f : 0.01f; });
    case kMish:
      return each([](float v) {
        const float t = mish_ratio(v);
        return t + v * (1.0f - t * t) * sigmoid(v);
      });
    default:
      return each([](float) { return 1.0f; });
  }
}

}  // namespace effdet::cuda
