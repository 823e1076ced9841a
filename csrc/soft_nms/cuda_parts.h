// What the CUDA kernel of soft_nms is made of: scores that compare as integers, the decay, shared memory.
#pragma once

#include "cuda/memory.h"
#include "cuda/number.h"
#include "soft_nms/cuda_params.h"

namespace effdet::cuda {

constexpr int kThreads = 512;  // and the candidates of a chunk
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroups = 128;           // classes modulo this
constexpr int kLevels = 4 * kThreads;  // of scores, among which the order is not known
constexpr int kChunks = kWarp;         // at most: a lane for each
static_assert(kMostCandidates <= kChunks * kThreads);
static_assert(kMostCandidates <= 1 << 16, "places are 16-bit numbers");

// A score as an integer in the order of the numbers; -0 is 0. kGone: of no candidate, less than any.
constexpr unsigned kGone = 0;
constexpr unsigned kZero = 0x80000000u;
__device__ __forceinline__ unsigned key_of(float score) {
  const unsigned bits = __float_as_uint(__fadd_rn(score, 0.0f));
  return bits & kZero ? ~bits : bits | kZero;
}
__device__ __forceinline__ float score_of(unsigned key) {
  return __uint_as_float(key & kZero ? key ^ kZero : ~key);
}
// What the key of a candidate will never be above.
__device__ __forceinline__ unsigned bound_of(unsigned key) {
  return key > kZero ? key : kZero;
}

// x_min, y_min, x_max, y_max
__device__ __forceinline__ float area(const float4& box) {
  return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y));
}

// The key of a candidate after a pick of its class. Operations are the reference's, in its order, none of them fused.
template <Method kMethod>
__device__ __forceinline__ unsigned decayed(unsigned key, const float4& box, const float4& pick,
                                            const SoftNmsCudaParams& p) {
  const float width = fmaxf(__fsub_rn(fminf(pick.z, box.z), fmaxf(pick.x, box.x)), 0.0f);
  const float height = fmaxf(__fsub_rn(fminf(pick.w, box.w), fmaxf(pick.y, box.y)), 0.0f);
  const float intersection = __fmul_rn(width, height);
  if (!(intersection > 0.0f)) return key;
  const float total = __fsub_rn(__fadd_rn(area(pick), area(box)), intersection);
  if (!(total > 0.0f)) return key;
  const float overlap = __fdiv_rn(intersection, total);
  float factor = 0.0f;
  if constexpr (kMethod == Method::kGaussian) {
    factor = exp2f(overlap * overlap * p.rate);
  } else {
    if (!(overlap > p.iou_threshold)) return key;
    if constexpr (kMethod == Method::kLinear) factor = 1.0f - overlap;
  }
  const float score = score_of(key) * factor;
  return factor != 0.0f && score > p.score_threshold ? key_of(score) : kGone;
}

// Of the lanes that tie, the one whose index is the lowest: its bit.
__device__ __forceinline__ unsigned first_of(bool ties, int index) {
  unsigned lanes = __ballot_sync(kAll, ties);
  if (lanes & (lanes - 1)) {
    const int lowest = __reduce_min_sync(kAll, ties ? index : 0x7fffffff);
    lanes = __ballot_sync(kAll, ties && index == lowest);
  }
  return lanes;
}
__device__ __forceinline__ int lane_of(unsigned bit) {
  return kWarp - 1 - __clz(static_cast<int>(bit));
}
// The sum over the lanes before this one.
__device__ __forceinline__ int sum_before(int value) {
  int sum = value;
  EFFDET_UNROLL
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const int other = __shfl_up_sync(kAll, sum, by);
    sum += lane_id() >= static_cast<int>(by) ? other : 0;
  }
  return sum - value;
}

struct Candidate {
  float4 box;
  int index, place, group;
  unsigned key;
};

// What a warp has for the next pick: its best candidate.
struct alignas(16) Offer {
  unsigned key;
  int index, place, group;
};

// The candidates of a chunk that a warp has.
struct Tile {
  int first, size;          // places
  int low, high;            // groups
  unsigned key;             // of the best candidate; kGone: none is left
  int index, place, group;  // of the best candidate
};

// The block's shared memory; `count` candidates, `picks` at most.
struct Memory {
  float4* boxes;             // [count] by place, or null
  unsigned* keys;            // [count] by index; of candidates in chunks that take part, after all picks
  int* levels;               // [kLevels] where a level's next candidate goes
  int* groups;               // [kGroups] the same of the groups of a chunk
  Offer* offers;             // [2, kWarps], in turns
  float4* offered_boxes;     // [2, kWarps]
  uint4* censuses;           // [kWarps]
  int* sums;                 // [kWarps]
  std::uint16_t* order;      // [count] indices, by place
  std::uint16_t* picks;      // [picks] places
  unsigned char* in_groups;  // [count] by place, of chunks that take part

  __device__ __forceinline__ void take(Shared& from, int count, int picks_, bool with_boxes) {
    boxes = with_boxes ? from.take<float4>(count) : nullptr;
    keys = from.take<unsigned>(count);
    levels = from.take<int>(kLevels);
    groups = from.take<int>(kGroups);
    offers = from.take<Offer>(2 * kWarps);
    offered_boxes = from.take<float4>(2 * kWarps);
    censuses = from.take<uint4>(kWarps);
    sums = from.take<int>(kWarps);
    order = from.take<std::uint16_t>(count);
    picks = from.take<std::uint16_t>(picks_);
    in_groups = from.take<unsigned char>(count);
  }
};

inline std::size_t shared_bytes(int count, int picks, bool with_boxes) {
  return Shared::rounded((with_boxes ? sizeof(float4) : 0) * count) + Shared::rounded(sizeof(unsigned) * count) +
         sizeof(int) * (kLevels + kGroups + kWarps) + 5 * sizeof(uint4) * kWarps +
         Shared::rounded(sizeof(std::uint16_t) * count) + Shared::rounded(sizeof(std::uint16_t) * picks) +
         Shared::rounded(count);
}

}  // namespace effdet::cuda
