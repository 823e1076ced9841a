// soft_nms on a GPU: a block has an image. Candidates are sorted, coarsely, by score and cut into chunks of one for
// each thread; a chunk takes part once the next pick could be in it. It is then sorted by class and cut into tiles of a
// warp, which catch up with the picks that there were. Scores fall (or rise to 0 at most), so chunks that wait are
// beneath all picks. A pick is told to the tiles that have its class, and is one barrier: every warp offers its best
// candidate, and every warp finds the best of them. What the design costs, and what others would, is in
// effdet_kernels/ops/soft_nms/README.md.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/number.h"
#include "soft_nms/cuda_params.h"

namespace effdet::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroups = 128;           // classes modulo this
constexpr int kLevels = 4 * kThreads;  // of scores, among which the order is not known
constexpr int kChunks = kWarp;         // at most: a lane for each
constexpr int kRead = 5;               // candidates that a thread reads at a time
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
__device__ __forceinline__ unsigned first_of(bool ties, unsigned index) {
  unsigned lanes = __ballot_sync(kAll, ties);
  if (lanes & (lanes - 1)) {
    const unsigned lowest = __reduce_min_sync(kAll, ties ? index : ~0u);
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

// The candidates of a chunk that a warp has.
struct Tile {
  int first, size;   // places
  int low, high;     // groups
  unsigned key;      // of the best candidate; kGone: none is left
  unsigned index;    // of the best candidate
  int place, group;  // of the best candidate
};

// The block's shared memory; `count` candidates, `picks` at most.
struct Memory {
  float4* boxes;             // [count] by place, or null
  unsigned* keys;            // [count] by index; of candidates in chunks that take part, after all picks
  int* levels;               // [kLevels] where a level's next candidate goes
  int* groups;               // [kGroups] the same of the groups of a chunk
  uint4* offers;             // [2, kWarps] a key, an index, a place, a group; in turns
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
    offers = from.take<uint4>(2 * kWarps);
    offered_boxes = from.take<float4>(2 * kWarps);
    censuses = from.take<uint4>(kWarps);
    sums = from.take<int>(kWarps);
    order = from.take<std::uint16_t>(count);
    picks = from.take<std::uint16_t>(picks_);
    in_groups = from.take<unsigned char>(count);
  }
};

std::size_t shared_bytes(int count, int picks, bool with_boxes) {
  return Shared::rounded((with_boxes ? sizeof(float4) : 0) * count) + Shared::rounded(sizeof(unsigned) * count) +
         sizeof(int) * (kLevels + kGroups + kWarps) + 5 * sizeof(uint4) * kWarps +
         Shared::rounded(sizeof(std::uint16_t) * count) + Shared::rounded(sizeof(std::uint16_t) * picks) +
         Shared::rounded(count);
}

template <Method kMethod>
__global__ void __launch_bounds__(kThreads, 1) soft_nms_fwd_kernel(const SoftNmsCudaParams p, bool boxes_in_shared) {
  Shared shared;
  Memory m{};
  m.take(shared, p.count, min(p.max_det, p.count), boxes_in_shared);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const std::int64_t image = blockIdx.x;
  const float* const boxes = p.boxes + image * p.count * 4;
  const float* const scores = p.scores + image * p.count;
  const std::int64_t* const classes = p.classes ? p.classes + image * p.count : nullptr;
  std::int64_t* const out_index = p.index + image * p.max_det;
  float* const out_score = p.score + image * p.max_det;
  const auto box_of = [&](int index) { return load<float4>(boxes + 4 * static_cast<std::int64_t>(index)); };

  wait_for_previous_kernel();
  int valid = p.count;
  if (p.num_valid) {
    const std::int64_t given = p.num_valid[image];
    valid = given < 0 ? 0 : given < p.count ? static_cast<int>(given) : p.count;
  }
  for (int i = thread; i < kLevels; i += kThreads) m.levels[i] = 0;

  // The keys; how many take part, and are not finite; between which keys the levels are; whether a group is a class.
  unsigned live = 0, dropped = 0, high = kZero, low = ~0u;
  std::int64_t kinds = 0;
  EFFDET_NO_UNROLL
  for (int first = thread; first < p.count; first += kThreads * kRead) {
    float4 box[kRead];
    float score[kRead];
    std::int64_t kind[kRead];
    EFFDET_UNROLL
    for (int i = 0; i < kRead; ++i) {
      const int at = min(first + i * kThreads, p.count - 1);
      box[i] = box_of(at);
      score[i] = scores[at];
      kind[i] = classes ? classes[at] : 0;
    }
    EFFDET_UNROLL
    for (int i = 0; i < kRead; ++i) {
      const int at = first + i * kThreads;
      const bool all_finite =
          finite(box[i].x) & finite(box[i].y) & finite(box[i].z) & finite(box[i].w) & finite(score[i]);
      const bool takes_part = all_finite && at < valid && score[i] > p.score_threshold;
      const unsigned key = takes_part ? key_of(score[i]) : kGone;
      dropped += !all_finite && at < valid;
      if (takes_part) {
        ++live;
        high = bound_of(key) > high ? bound_of(key) : high;
        low = bound_of(key) < low ? bound_of(key) : low;
        kinds |= kind[i];
      }
      if (at < p.count) m.keys[at] = key;
    }
  }
  live = __reduce_add_sync(kAll, live);
  dropped = __reduce_add_sync(kAll, dropped);
  high = __reduce_max_sync(kAll, high);
  low = __reduce_min_sync(kAll, low);
  const bool all_small = __all_sync(kAll, (kinds & ~std::int64_t{kGroups - 1}) == 0) != 0;
  if (lane == 0) {
    m.censuses[warp] = uint4{live, dropped, high, low};
    m.sums[warp] = all_small;
  }
  __syncthreads();
  const uint4 census = lane < kWarps ? m.censuses[lane] : uint4{0, 0, kZero, ~0u};
  const bool by_class = __all_sync(kAll, m.sums[lane % kWarps]) != 0;
  live = __reduce_add_sync(kAll, census.x);
  dropped = __reduce_add_sync(kAll, census.y);
  high = __reduce_max_sync(kAll, census.z);
  low = __reduce_min_sync(kAll, census.w);
  const int shift = max(32 - __clz(static_cast<int>(high - (low < high ? low : high))) - 11, 0);
  static_assert(kLevels == 1 << 11);
  const auto level_of = [&](unsigned key) { return static_cast<int>((high - bound_of(key)) >> shift); };

  // Sorts by level: counts, adds up, places. Where in its level a candidate is changes nothing of the result.
  for (int i = thread; i < p.count; i += kThreads)
    if (m.keys[i] != kGone) atomicAdd(&m.levels[level_of(m.keys[i])], 1);
  __syncthreads();
  int* const own_levels = m.levels + kLevels / kThreads * thread;
  int in_levels[kLevels / kThreads], own = 0;
  EFFDET_UNROLL
  for (int i = 0; i < kLevels / kThreads; ++i) {
    in_levels[i] = own_levels[i];
    own += in_levels[i];
  }
  int before = sum_before(own);
  if (lane == kWarp - 1) m.sums[warp] = before + own;
  __syncthreads();
  before += __reduce_add_sync(kAll, lane < warp ? m.sums[lane % kWarps] : 0);
  EFFDET_UNROLL
  for (int i = 0; i < kLevels / kThreads; ++i) {
    own_levels[i] = before;
    before += in_levels[i];
  }
  __syncthreads();
  for (int i = thread; i < p.count; i += kThreads)
    if (m.keys[i] != kGone) m.order[atomicAdd(&m.levels[level_of(m.keys[i])], 1)] = static_cast<std::uint16_t>(i);
  __syncthreads();

  const int candidates = static_cast<int>(live);
  const auto box_at = [&](int place) { return boxes_in_shared ? m.boxes[place] : box_of(m.order[place]); };
  Tile tile{};  // of this warp and chunk `lane`
  int chunks = 0, found = 0;
  int next_level = 0;  // of the first candidate that waits

  Candidate mine{};  // of the first chunk, as long as it is the only one
  const auto candidate_at = [&](int place) {
    Candidate c;
    c.index = m.order[place];
    c.place = place;
    c.group = m.in_groups[place];
    c.box = box_at(place);
    return c;
  };
  // The key of a candidate after a pick.
  const auto after = [&](const Candidate& c, int pick_place, int pick_group, const float4& pick_box) {
    const bool same = c.group == pick_group && (by_class || classes[m.order[pick_place]] == classes[c.index]);
    return same ? decayed<kMethod>(c.key, c.box, pick_box, p) : c.key;
  };

  // Changes the keys of tile `which` to what `changed` returns, and finds its best candidate.
  const auto change = [&](int which, const auto& changed) {
    const int first = __shfl_sync(kAll, tile.first, which), size = __shfl_sync(kAll, tile.size, which);
    Candidate c = candidate_at(first + min(lane, size - 1));
    c.key = lane < size ? m.keys[c.index] : kGone;
    const unsigned key = changed(c);
    if (key != c.key) m.keys[c.index] = key;
    const unsigned best = __reduce_max_sync(kAll, key);
    const int holder = lane_of(first_of(key == best, static_cast<unsigned>(c.index)));
    const int index = __shfl_sync(kAll, c.index, holder), group = __shfl_sync(kAll, c.group, holder);
    if (lane == which) {
      tile.key = best;
      tile.index = static_cast<unsigned>(index);
      tile.place = first + holder;
      tile.group = group;
    }
  };

  // The next chunk takes part.
  const auto take_up_chunk = [&] {
    const int first = chunks * kThreads;
    const bool exists = first + thread < candidates;
    int index = 0, group = 0, place = first + thread;
    float4 box{};
    if (exists) {
      index = m.order[place];
      group = classes ? static_cast<int>(classes[index] & (kGroups - 1)) : 0;
      box = box_of(index);
    }
    if (classes) {
      if (thread < kGroups) m.groups[thread] = 0;
      __syncthreads();
      if (exists) atomicAdd(&m.groups[group], 1);
      __syncthreads();
      if (warp == 0) {
        constexpr int kOwn = kGroups / kWarp;
        int sizes[kOwn], sum = 0;
        EFFDET_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          sizes[i] = m.groups[kOwn * lane + i];
          sum += sizes[i];
        }
        sum = first + sum_before(sum);
        EFFDET_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          m.groups[kOwn * lane + i] = sum;
          sum += sizes[i];
        }
      }
      __syncthreads();
      if (exists) place = atomicAdd(&m.groups[group], 1);
    }
    if (exists) {
      m.order[place] = static_cast<std::uint16_t>(index);
      m.in_groups[place] = static_cast<unsigned char>(group);
      if (boxes_in_shared) m.boxes[place] = box;
    }
    __syncthreads();
    // A class is at about the same place in each chunk: its tiles go to warps that are apart.
    const int tile_first = first + (warp + 5 * chunks) % kWarps * kWarp;
    const int size = max(min(candidates - tile_first, kWarp), 0);
    if (lane == chunks) {
      tile.first = tile_first;
      tile.size = size;
      tile.low = size > 0 ? m.in_groups[tile_first] : 0;
      tile.high = size > 0 ? m.in_groups[tile_first + size - 1] : 0;
    }
    if (chunks == 0) {
      if (lane < size) {
        mine = candidate_at(tile_first + lane);
        mine.key = m.keys[mine.index];
      }
    } else {
      if (chunks == 1) {  // `mine` is no longer used
        const int first_size = __shfl_sync(kAll, tile.size, 0);
        if (lane < first_size) m.keys[mine.index] = mine.key;
        __syncwarp();
        if (first_size > 0) change(0, [](const Candidate& c) { return c.key; });
      }
      if (size > 0) {
        change(chunks, [&](Candidate c) {
          EFFDET_NO_UNROLL
          for (int i = 0; i < found; ++i) {
            const int at = m.picks[i];
            c.key = after(c, at, m.in_groups[at], box_at(at));
          }
          return c.key;
        });
      }
    }
    ++chunks;
    if (chunks * kThreads < candidates) next_level = level_of(m.keys[m.order[chunks * kThreads]]);
  };

  int turn = 0;
  bool anew = true;     // the best candidate of the warp is another
  bool offers = false;  // this lane has it
  while (found < p.max_det && candidates > 0) {
    const bool one = chunks == 1;
    uint4 offer{one ? mine.key : tile.key, static_cast<unsigned>(one ? mine.index : static_cast<int>(tile.index)),
                static_cast<unsigned>(one ? mine.place : tile.place),
                static_cast<unsigned>(one ? mine.group : tile.group)};
    if (anew) offers = lane == lane_of(first_of(offer.x == __reduce_max_sync(kAll, offer.x), offer.y));
    if (offers) {
      m.offers[turn + warp] = offer;
      if (offer.x != kGone) m.offered_boxes[turn + warp] = one ? mine.box : box_at(tile.place);
    }
    __syncthreads();
    offer = lane < kWarps ? m.offers[turn + lane] : uint4{kGone, 0, 0, 0};
    const unsigned best = __reduce_max_sync(kAll, offer.x);
    if (chunks * kThreads < candidates && (best == kGone || level_of(best) >= next_level)) {
      take_up_chunk();
      anew = true;
      turn ^= kWarps;
      continue;
    }
    if (best == kGone) break;
    const int winner = lane_of(first_of(offer.x == best, offer.y));
    const float4 box = m.offered_boxes[turn + winner];
    const int place = static_cast<int>(m.offers[turn + winner].z), group = static_cast<int>(m.offers[turn + winner].w);
    turn ^= kWarps;
    // Written by a warp that has less to do than the winner's.
    if (warp == (winner + kWarps / 2) % kWarps && lane == winner) {
      out_index[found] = offer.y;
      out_score[found] = score_of(best);
      m.picks[found] = static_cast<std::uint16_t>(place);
    }
    if (one) {
      unsigned key = winner == warp && offers ? kGone : mine.key;
      const bool gone = key != mine.key;
      mine.key = key;
      key = after(mine, place, group, box);
      anew = __any_sync(kAll, gone || key != mine.key) != 0;
      mine.key = key;
    } else {
      if (winner == warp && offers) m.keys[tile.index] = kGone;
      __syncwarp();
      unsigned tiles = __ballot_sync(kAll, tile.key != kGone && tile.low <= group && group <= tile.high);
      anew = tiles != 0;
      for (; tiles; tiles ^= 1u << lane_of(tiles))
        change(lane_of(tiles), [&](const Candidate& c) { return after(c, place, group, box); });
    }
    ++found;
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

int soft_nms(const SoftNmsCudaParams& p, void* stream) {
  const int picks = std::min(p.max_det, p.count);
  const bool boxes_in_shared = shared_bytes(p.count, picks, true) <= shared_limit();
  Grid grid;
  grid.blocks = p.batch;
  grid.threads = kThreads;
  grid.shared_bytes = shared_bytes(p.count, picks, boxes_in_shared);
  if (p.method == Method::kGaussian)
    return launch(soft_nms_fwd_kernel<Method::kGaussian>, grid, stream, p, boxes_in_shared);
  if (p.method == Method::kLinear)
    return launch(soft_nms_fwd_kernel<Method::kLinear>, grid, stream, p, boxes_in_shared);
  return launch(soft_nms_fwd_kernel<Method::kHard>, grid, stream, p, boxes_in_shared);
}

}  // namespace effdet::cuda
