// Which pixel of a max-pool's window is its maximum, for a vector of channels: the first of equal ones in row-major
// order, or the last NaN, as torch has it.
#pragma once

#include "weighted_fusion/places.h"

namespace effdet::cuda {

// A tap, 0 to 8, per channel, in as many bits as a channel has. No tap:
constexpr uint4 kNoWinners{~0u, ~0u, ~0u, ~0u};

template <typename T>
__device__ __forceinline__ unsigned winner_of(const uint4& winners, int k) {
  const unsigned words[4] = {winners.x, winners.y, winners.z, winners.w};
  if constexpr (sizeof(T) == 4) return words[k];
  return k % 2 == 0 ? words[k / 2] & 0xffff : words[k / 2] >> 16;
}

// All bits of a number set where two are equal.
template <typename T>
__device__ __forceinline__ unsigned equal(unsigned a, unsigned b) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(a) == __uint_as_float(b) ? ~0u : 0u;
#ifdef __CUDA_ARCH__
  unsigned mask;
  if constexpr (std::is_same_v<T, Float16>) {
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
    return mask;
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
    return mask;
  }
#endif
#endif
  if constexpr (sizeof(T) == 2) {
    const float2 x = widen_pair<T>(a), y = widen_pair<T>(b);
    return (x.x == y.x ? 0xffffu : 0u) | (x.y == y.y ? 0xffff0000u : 0u);
  }
}

template <typename T>
__device__ __forceinline__ bool any_nan(const uint4& x) {
  return (equal<T>(x.x, x.x) & equal<T>(x.y, x.y) & equal<T>(x.z, x.z) & equal<T>(x.w, x.w)) != ~0u;
}

// Of windows without NaN, all of whose taps before the last row and column are in the map; `best` their maxima.
template <typename T>
__device__ __forceinline__ uint4 first_winners(const uint4& best, const WindowRow& above, const WindowRow& middle,
                                               const WindowRow& below) {
  constexpr unsigned kEach = sizeof(T) == 4 ? 1u : 0x00010001u;
  const WindowRow* const rows[3] = {&above, &middle, &below};
  uint4 winners{8 * kEach, 8 * kEach, 8 * kEach, 8 * kEach};
  const auto take = [](unsigned& winner, unsigned value, unsigned largest, unsigned tap) {
    const unsigned mask = equal<T>(value, largest);
    winner = (mask & tap) | (~mask & winner);
  };
  EFFDET_UNROLL
  for (int tap = 7; tap >= 0; --tap) {
    const uint4& value = rows[tap / 3]->pixels[tap % 3];
    const unsigned code = static_cast<unsigned>(tap) * kEach;
    take(winners.x, value.x, best.x, code);
    take(winners.y, value.y, best.y, code);
    take(winners.z, value.z, best.z, code);
    take(winners.w, value.w, best.w, code);
  }
  return winners;
}

// Of any window, from memory; (top, left) may be outside of the map.
template <typename T>
__device__ uint4 winners_by_rule(const Map& map, const T* x, int top, int left) {
  float best[kVector<T>];
  unsigned winners[kVector<T>];
  bool found = false;
  EFFDET_NO_UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    const int row = top + tap / 3, column = left + tap % 3;
    if (row < 0 || row >= map.height || column < 0 || column >= map.width) continue;
    float values[kVector<T>];
    widen_vector<T>(load<uint4>(x + row * map.row_stride + column * map.pixel_stride), values);
    EFFDET_UNROLL
    for (int k = 0; k < kVector<T>; ++k) {
      if (!found || values[k] > best[k] || values[k] != values[k]) {
        best[k] = values[k];
        winners[k] = static_cast<unsigned>(tap);
      }
    }
    found = true;
  }
  if constexpr (sizeof(T) == 4) return {winners[0], winners[1], winners[2], winners[3]};
  if constexpr (sizeof(T) == 2)
    return {winners[0] | winners[1] << 16, winners[2] | winners[3] << 16, winners[4] | winners[5] << 16,
            winners[6] | winners[7] << 16};
}

}  // namespace effdet::cuda
