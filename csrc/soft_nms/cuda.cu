// soft_nms on a GPU: a block has an image. Candidates are put in order of their scores, coarsely, and taken up in
// chunks, a candidate a thread: a chunk takes part once a pick could be in it, and then first catches up with the picks
// that there were. Scores of candidates fall, or rise to 0 at most, so the chunks that wait are beneath what is picked.
// A pick is one barrier: every warp gives its best candidate, every thread finds the best of them. What the design
// costs, and what others would, is in effdet_kernels/ops/soft_nms/README.md.
#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/number.h"
#include "soft_nms/cuda_params.h"

namespace effdet::cuda {
namespace {

constexpr int kThreads = 512;  // the candidates of a chunk
constexpr int kWarps = kThreads / kWarp;
constexpr int kLevels = 4 * kThreads;  // of scores, among which the order is not known
constexpr int kPast = 256;             // picks that a new chunk catches up with at a time
constexpr int kTogether = 4;           // chunks whose loads are in flight at the same time

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

struct Candidate {
  float4 box;         // x_min, y_min, x_max, y_max
  std::int64_t kind;  // its class
  unsigned key;
  int index;
};

__device__ __forceinline__ float area(const float4& box) {
  return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y));
}

// The key of a candidate after a pick of its class. Operations are the reference's, in its order, none of them fused.
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
  if (p.method == Method::kGaussian) {
    factor = exp2f(overlap * overlap * p.rate);
  } else {
    if (!(overlap > p.iou_threshold)) return key;
    if (p.method == Method::kLinear) factor = 1.0f - overlap;
  }
  const float score = score_of(key) * factor;
  return factor != 0.0f && score > p.score_threshold ? key_of(score) : kGone;
}

// Of an image in p.spilled: what its chunks have, without the first.
struct Spilled {
  float4* boxes;
  std::int64_t* kinds;
  uint2* keys;  // and indices
};
constexpr int kSpilledBytes = 32;

// What the warps give for a pick, and then for the next, in turns.
struct Offers {
  uint2* keys;  // [kWarps], and indices
  float4* boxes;
  std::int64_t* kinds;
};

// The lane whose key is the highest; of equal ones the one whose index is the lowest. All lanes get the key.
__device__ __forceinline__ int best_lane(unsigned key, unsigned index, unsigned* best) {
  *best = __reduce_max_sync(kAll, key);
  unsigned lanes = __ballot_sync(kAll, key == *best);
  if (lanes & (lanes - 1)) {
    const unsigned lowest = __reduce_min_sync(kAll, key == *best ? index : ~0u);
    lanes = __ballot_sync(kAll, key == *best && index == lowest);
  }
  return __ffs(static_cast<int>(lanes)) - 1;
}

std::size_t shared_bytes(int count) {
  return Shared::rounded(count * sizeof(unsigned)) + Shared::rounded(count * sizeof(std::uint16_t)) +
         Shared::rounded(kLevels * sizeof(int)) + Shared::rounded(kWarps * sizeof(uint4)) +
         Shared::rounded(kWarps * sizeof(int)) + kPast * (sizeof(float4) + sizeof(std::int64_t)) +
         2 * kWarps * (sizeof(uint2) + sizeof(float4) + sizeof(std::int64_t));
}

__global__ void __launch_bounds__(kThreads) soft_nms_fwd_kernel(const SoftNmsCudaParams p) {
  Shared shared;
  unsigned* const keys = shared.take<unsigned>(p.count);             // of all candidates, before any pick
  std::uint16_t* const order = shared.take<std::uint16_t>(p.count);  // their indices, level by level
  int* const places = shared.take<int>(kLevels);                     // in `order`, where a level's next one goes
  uint4* const censuses = shared.take<uint4>(kWarps);
  int* const sums = shared.take<int>(kWarps);
  float4* const past_boxes = shared.take<float4>(kPast);
  std::int64_t* const past_kinds = shared.take<std::int64_t>(kPast);
  Offers offers{};
  offers.keys = shared.take<uint2>(2 * kWarps);
  offers.boxes = shared.take<float4>(2 * kWarps);
  offers.kinds = shared.take<std::int64_t>(2 * kWarps);

  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const std::int64_t image = blockIdx.x;
  const float* const boxes = p.boxes + image * p.count * 4;
  const float* const scores = p.scores + image * p.count;
  const std::int64_t* const classes = p.classes ? p.classes + image * p.count : nullptr;
  std::int64_t* const out_index = p.index + image * p.max_det;
  float* const out_score = p.score + image * p.max_det;
  Spilled spilled{};
  const std::int64_t spilled_count = (divided(p.count, kThreads) - 1) * kThreads;
  if (spilled_count > 0) {
    spilled.boxes = reinterpret_cast<float4*>(static_cast<char*>(p.spilled) + image * spilled_count * kSpilledBytes);
    spilled.kinds = reinterpret_cast<std::int64_t*>(spilled.boxes + spilled_count);
    spilled.keys = reinterpret_cast<uint2*>(spilled.kinds + spilled_count);
  }

  wait_for_previous_kernel();
  int valid = p.count;
  if (p.num_valid) {
    const std::int64_t given = p.num_valid[image];
    valid = given < 0 ? 0 : given < p.count ? static_cast<int>(given) : p.count;
  }
  for (int i = thread; i < kLevels; i += kThreads) places[i] = 0;

  // The keys, how many take part or are not finite, and between which keys the levels are.
  unsigned live = 0, dropped = 0, high = kZero, low = ~0u;
  for (int i = thread; i < p.count; i += kThreads) {
    unsigned key = kGone;
    if (i < valid) {
      const float4 box = load<float4>(boxes + 4 * i);
      const float score = scores[i];
      if (!(finite(box.x) && finite(box.y) && finite(box.z) && finite(box.w) && finite(score))) {
        ++dropped;
      } else if (score > p.score_threshold) {
        key = key_of(score);
        const unsigned bound = key > kZero ? key : kZero;
        high = bound > high ? bound : high;
        low = bound < low ? bound : low;
        ++live;
      }
    }
    keys[i] = key;
  }
  live = __reduce_add_sync(kAll, live);
  dropped = __reduce_add_sync(kAll, dropped);
  high = __reduce_max_sync(kAll, high);
  low = __reduce_min_sync(kAll, low);
  if (lane == 0) censuses[warp] = uint4{live, dropped, high, low};
  __syncthreads();
  const uint4 census = lane < kWarps ? censuses[lane] : uint4{0, 0, kZero, ~0u};
  live = __reduce_add_sync(kAll, census.x);
  dropped = __reduce_add_sync(kAll, census.y);
  high = __reduce_max_sync(kAll, census.z);
  low = __reduce_min_sync(kAll, census.w);
  const int bits = 32 - __clz(static_cast<int>(high - (low < high ? low : high)));
  const int shift = max(bits - 11, 0);
  static_assert(kLevels == 1 << 11);
  const auto level_of = [&](unsigned key) { return static_cast<int>((high - (key > kZero ? key : kZero)) >> shift); };

  // Sorts by level: counts, adds up, places. In which order a level has its candidates is left open.
  for (int i = thread; i < p.count; i += kThreads)
    if (keys[i] != kGone) atomicAdd(&places[level_of(keys[i])], 1);
  __syncthreads();
  int four[4], sum = 0;
  for (int i = 0; i < 4; ++i) {
    four[i] = sum;
    sum += places[4 * thread + i];
  }
  int before = sum;
  for (unsigned by = 1; by < kWarp; by *= 2) {
    const int other = __shfl_up_sync(kAll, before, by);
    before += lane >= static_cast<int>(by) ? other : 0;
  }
  if (lane == kWarp - 1) sums[warp] = before;
  __syncthreads();
  before += __reduce_add_sync(kAll, lane < warp ? sums[lane % kWarps] : 0) - sum;
  for (int i = 0; i < 4; ++i) places[4 * thread + i] = before + four[i];
  __syncthreads();
  for (int i = thread; i < p.count; i += kThreads)
    if (keys[i] != kGone) order[atomicAdd(&places[level_of(keys[i])], 1)] = static_cast<std::uint16_t>(i);
  __syncthreads();

  const auto kind_of = [&](std::int64_t index) { return classes ? classes[index] : 0; };
  const int candidates = static_cast<int>(live);
  int found = 0, chunks = 0;
  int next_level = 0;  // of the first candidate that waits
  Candidate mine{};    // of the first chunk
  // This thread's best candidate, and the chunk that it is of.
  unsigned best_key = kGone, best_index = 0;
  int best_chunk = 0;

  const auto take_up_chunk = [&] {
    const int place = chunks * kThreads + thread;
    Candidate taken{};
    if (place < candidates) {
      taken.index = order[place];
      taken.key = keys[taken.index];
      taken.box = load<float4>(boxes + 4 * taken.index);
      taken.kind = kind_of(taken.index);
    }
    for (int first = 0; first < found; first += kPast) {
      const int size = min(kPast, found - first);
      __syncthreads();
      if (thread < size) {
        const std::int64_t index = out_index[first + thread];
        past_boxes[thread] = load<float4>(boxes + 4 * index);
        past_kinds[thread] = kind_of(index);
      }
      __syncthreads();
      for (int i = 0; i < size; ++i)
        if (taken.key != kGone && taken.kind == past_kinds[i])
          taken.key = decayed(taken.key, taken.box, past_boxes[i], p);
    }
    if (chunks == 0) {
      mine = taken;
    } else {
      const int at = place - kThreads;
      spilled.boxes[at] = taken.box;
      spilled.kinds[at] = taken.kind;
      spilled.keys[at] = uint2{taken.key, static_cast<unsigned>(taken.index)};
    }
    const auto index = static_cast<unsigned>(taken.index);
    if (taken.key > best_key || (taken.key == best_key && index < best_index)) {
      best_key = taken.key;
      best_index = index;
      best_chunk = chunks;
    }
    ++chunks;
    if (chunks * kThreads < candidates) next_level = level_of(keys[order[chunks * kThreads]]);
  };

  if (p.max_det > 0 && candidates > 0) {
    take_up_chunk();
    bool changed = true;  // in this warp, since its last offer
    bool offers_mine = false;
    int turn = 0;
    for (;;) {
      if (changed) {
        unsigned best;
        offers_mine = lane == best_lane(best_key, best_index, &best);
      }
      if (offers_mine) {
        const int at = turn + warp, from = (best_chunk - 1) * kThreads + thread;
        offers.keys[at] = uint2{best_key, best_index};
        offers.boxes[at] = best_chunk == 0 ? mine.box : spilled.boxes[from];
        offers.kinds[at] = best_chunk == 0 ? mine.kind : spilled.kinds[from];
      }
      __syncthreads();
      const uint2 offer = lane < kWarps ? offers.keys[turn + lane] : uint2{kGone, 0};
      unsigned top;
      const int winner = best_lane(offer.x, offer.y, &top);
      const float4 pick = offers.boxes[turn + winner % kWarps];
      const std::int64_t kind = offers.kinds[turn + winner % kWarps];
      turn ^= kWarps;
      if (chunks * kThreads < candidates && (top == kGone || level_of(top) >= next_level)) {
        take_up_chunk();
        changed = true;
        continue;
      }
      if (top == kGone) break;

      changed = winner == warp;
      if (changed && offers_mine) {
        out_index[found] = best_index;
        out_score[found] = score_of(top);
        if (best_chunk == 0) {
          mine.key = kGone;
        } else {
          spilled.keys[(best_chunk - 1) * kThreads + thread].x = kGone;
        }
        best_key = kGone;
      }
      if (++found == p.max_det) break;
      if (mine.key != kGone && mine.kind == kind) mine.key = decayed(mine.key, mine.box, pick, p);
      if (chunks == 1) {
        changed |= __any_sync(kAll, mine.key != best_key) != 0;
        best_key = mine.key;
        continue;
      }
      changed = true;
      best_key = mine.key;
      best_index = static_cast<unsigned>(mine.index);
      best_chunk = 0;
      for (int first = 1; first < chunks; first += kTogether) {
        uint2 many[kTogether];
        std::int64_t kinds[kTogether];
        EFFDET_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          const int at = (first + i - 1) * kThreads + thread;
          many[i] = first + i < chunks ? spilled.keys[at] : uint2{kGone, 0};
          kinds[i] = first + i < chunks ? spilled.kinds[at] : 0;
        }
        EFFDET_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          if (many[i].x == kGone) continue;
          if (kinds[i] == kind) {
            const int at = (first + i - 1) * kThreads + thread;
            const unsigned key = decayed(many[i].x, spilled.boxes[at], pick, p);
            if (key != many[i].x) spilled.keys[at].x = key;
            many[i].x = key;
          }
          if (many[i].x > best_key || (many[i].x == best_key && many[i].y < best_index)) {
            best_key = many[i].x;
            best_index = many[i].y;
            best_chunk = first + i;
          }
        }
      }
    }
  }
  let_next_kernel_start();
  if (thread == 0) {
    p.found[image] = found;
    p.dropped[image] = dropped;
  }
  for (int i = found + thread; i < p.max_det; i += kThreads) {
    out_index[i] = -1;
    out_score[i] = 0.0f;
  }
}

}  // namespace

std::int64_t soft_nms_spilled_bytes(int count) {
  return static_cast<std::int64_t>(max(divided(count, kThreads) - 1, 0)) * kThreads * kSpilledBytes;
}

int soft_nms(const SoftNmsCudaParams& p, void* stream) {
  Grid grid;
  grid.blocks = p.batch;
  grid.threads = kThreads;
  grid.shared_bytes = shared_bytes(p.count);
  return launch(soft_nms_fwd_kernel, grid, stream, p);
}

}  // namespace effdet::cuda
