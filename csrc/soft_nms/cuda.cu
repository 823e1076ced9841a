// soft_nms on a GPU: a block has an image. Candidates are sorted by class and, coarsely, by score, and cut into tiles
// of 32; a lane of a warp keeps what is known of a tile: a bound on its scores, and its best candidate. Scores fall (or
// rise to 0 at most), so a tile learns of the picks of its class, in their order, only when it could have the next
// pick. A pick is one barrier: every warp offers its best candidate, every warp finds the best of them. What the design
// costs, and what others would, is in effdet_kernels/ops/soft_nms/README.md.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/number.h"
#include "soft_nms/cuda_params.h"

namespace effdet::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroups = 128;  // classes modulo this; a tile is of one group
constexpr int kBinBits = 12;  // a bin is a group and, finer, a level of scores, among which the order is not known
constexpr int kBins = 1 << kBinBits;
constexpr int kRead = 5;  // candidates that a thread reads at a time
static_assert(kMostCandidates / kWarp + kGroups <= kThreads, "a tile for each thread");
static_assert(kMostCandidates <= 1 << 16, "places are 16-bit numbers");

// A tile that is this close beneath the best of its warp, in keys (a quarter to an eighth of its score), and does not
// know of this many picks, is told of some of them before it must be.
constexpr unsigned kNear = 1u << 21;
constexpr int kBehind = 2;
constexpr int kSome = 4;

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

// Of the lanes that `tie`, the one whose index is the lowest.
__device__ __forceinline__ bool comes_first(bool ties, unsigned index) {
  const unsigned lanes = __ballot_sync(kAll, ties);
  if (lanes & (lanes - 1)) ties = index == __reduce_min_sync(kAll, ties ? index : ~0u) && ties;
  return ties;
}
__device__ __forceinline__ int first_lane(bool is_it) {
  return (__ffs(static_cast<int>(__ballot_sync(kAll, is_it))) - 1) & (kWarp - 1);
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

struct Tile {
  int first, size;  // places of its candidates
  int group;
  unsigned bound;     // no key of it is higher
  unsigned next;      // without the best candidate
  unsigned index;     // of the best candidate
  int place;          // of the best candidate
  int seen, pending;  // its keys know of the first `seen` picks; of how many more of its group they do not
  bool fresh;         // the bound and what is said of the best candidate are exact
};

// The block's shared memory; `count` candidates, `picks` at most.
struct Memory {
  unsigned* keys;            // [count] of the candidates, after the picks that their tiles know of
  std::uint16_t* order;      // [count] indices, by place
  int* places;               // [kBins] where a bin's next candidate goes
  int* group_first;          // [kGroups + 1] places
  int* tile_first;           // [kGroups + 1] tiles
  uint4* offers;             // [2, kWarps] a key, an index, a group, a place; in turns
  uint4* censuses;           // [kWarps]
  int* sums;                 // [kWarps]
  std::uint16_t* picks;      // [picks] places
  unsigned char* of_groups;  // [picks]
  float4* boxes;             // [count] by place, or null

  template <typename Taker>
  __device__ __forceinline__ void take(Taker& from, int count, int picks_, bool with_boxes) {
    boxes = with_boxes ? from.template take<float4>(count) : nullptr;
    keys = from.template take<unsigned>(count);
    order = from.template take<std::uint16_t>(count);
    places = from.template take<int>(kBins);
    group_first = from.template take<int>(kGroups + 1);
    tile_first = from.template take<int>(kGroups + 1);
    offers = from.template take<uint4>(2 * kWarps);
    censuses = from.template take<uint4>(kWarps);
    sums = from.template take<int>(kWarps);
    picks = from.template take<std::uint16_t>(picks_);
    of_groups = from.template take<unsigned char>(picks_);
  }
};

std::size_t shared_bytes(int count, int picks, bool with_boxes) {
  return Shared::rounded((with_boxes ? sizeof(float4) : 0) * count) + Shared::rounded(sizeof(unsigned) * count) +
         Shared::rounded(sizeof(std::uint16_t) * count) + sizeof(int) * kBins +
         2 * Shared::rounded(sizeof(int) * (kGroups + 1)) + 3 * sizeof(uint4) * kWarps + sizeof(int) * kWarps +
         Shared::rounded(sizeof(std::uint16_t) * picks) + Shared::rounded(picks);
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
  const auto group_of = [&](int index) { return classes ? static_cast<int>(classes[index] & (kGroups - 1)) : 0; };
  const auto box_of = [&](int index) { return load<float4>(boxes + 4 * static_cast<std::int64_t>(index)); };

  wait_for_previous_kernel();
  int valid = p.count;
  if (p.num_valid) {
    const std::int64_t given = p.num_valid[image];
    valid = given < 0 ? 0 : given < p.count ? static_cast<int>(given) : p.count;
  }
  for (int i = thread; i < kBins; i += kThreads) m.places[i] = 0;

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
  const int groups = classes ? kGroups : 1;
  const int level_bits = classes ? kBinBits - 7 : kBinBits;
  static_assert(kGroups == 1 << 7);
  const int shift = max(32 - __clz(static_cast<int>(high - (low < high ? low : high))) - level_bits, 0);
  const auto level_of = [&](unsigned key) { return (high - bound_of(key)) >> shift; };
  const auto bin_of = [&](int index) {
    return group_of(index) << level_bits | static_cast<int>(level_of(m.keys[index]));
  };

  // Sorts by bin: counts, adds up, places. Where in its bin a candidate is changes nothing of the result.
  for (int i = thread; i < p.count; i += kThreads)
    if (m.keys[i] != kGone) atomicAdd(&m.places[bin_of(i)], 1);
  __syncthreads();
  constexpr int kOwnBins = kBins / kThreads;
  int* const own_bins = m.places + kOwnBins * thread;
  int in_bins[kOwnBins], before = 0;
  EFFDET_UNROLL
  for (int i = 0; i < kOwnBins; ++i) {
    in_bins[i] = own_bins[i];
    before += in_bins[i];
  }
  const int own = before;
  before = sum_before(own);
  if (lane == kWarp - 1) m.sums[warp] = before + own;
  __syncthreads();
  before += __reduce_add_sync(kAll, lane < warp ? m.sums[lane % kWarps] : 0);
  const int first_bin = kOwnBins * thread;
  if ((first_bin & ((1 << level_bits) - 1)) == 0) m.group_first[first_bin >> level_bits] = before;
  if (thread == 0) m.group_first[groups] = static_cast<int>(live);
  EFFDET_UNROLL
  for (int i = 0; i < kOwnBins; ++i) {
    own_bins[i] = before;
    before += in_bins[i];
  }
  __syncthreads();
  for (int i = thread; i < p.count; i += kThreads) {
    if (m.keys[i] != kGone) {
      const int place = atomicAdd(&m.places[bin_of(i)], 1);
      m.order[place] = static_cast<std::uint16_t>(i);
      if (boxes_in_shared) m.boxes[place] = box_of(i);
    }
  }
  if (warp == 0) {
    constexpr int kOwnGroups = kGroups / kWarp;
    int tiles[kOwnGroups], of_lane = 0;
    EFFDET_UNROLL
    for (int i = 0; i < kOwnGroups; ++i) {
      const int group = kOwnGroups * lane + i;
      tiles[i] = group < groups ? divided(m.group_first[group + 1] - m.group_first[group], kWarp) : 0;
      of_lane += tiles[i];
    }
    int sum = sum_before(of_lane);
    EFFDET_UNROLL
    for (int i = 0; i < kOwnGroups; ++i) {
      m.tile_first[kOwnGroups * lane + i] = sum;
      sum += tiles[i];
    }
    if (lane == kWarp - 1) m.tile_first[kGroups] = sum;
  }
  __syncthreads();

  // Tiles are dealt out to the warps, so that those of a class are in as many as there are.
  Tile tile{};
  const int number = lane * kWarps + warp;
  if (number < m.tile_first[kGroups]) {
    EFFDET_UNROLL
    for (int step = kGroups / 2; step > 0; step /= 2)
      if (m.tile_first[tile.group + step] <= number) tile.group += step;
    tile.first = m.group_first[tile.group] + (number - m.tile_first[tile.group]) * kWarp;
    tile.size = min(m.group_first[tile.group + 1] - tile.first, kWarp);
    tile.bound = high - (level_of(m.keys[m.order[tile.first]]) << shift);
  }

  int found = 0;
  int last_group = -1, last_place = 0;  // of the last pick, which may not be in shared memory yet
  const auto box_at = [&](int place) { return boxes_in_shared ? m.boxes[place] : box_of(m.order[place]); };

  // Tells the tile of lane `which` of the picks of its group that it does not know of, at most `most` of them.
  const auto tell = [&](int which, int most) {
    const int first = __shfl_sync(kAll, tile.first, which), size = __shfl_sync(kAll, tile.size, which);
    const int group = __shfl_sync(kAll, tile.group, which);
    int seen = __shfl_sync(kAll, tile.seen, which), told = 0;
    const int place = first + min(lane, size - 1);
    const int index = m.order[place];
    const unsigned before = lane < size ? m.keys[index] : kGone;
    const float4 box = box_at(place);
    const std::int64_t kind = by_class ? 0 : classes[index];
    unsigned key = before;
    for (int first_pick = seen; first_pick < found && told < most; first_pick += kWarp) {
      const int at = first_pick + lane;
      int of = -1, where = 0;
      if (at < found - 1) {
        of = m.of_groups[at];
        where = m.picks[at];
      } else if (at == found - 1) {
        of = last_group;
        where = last_place;
      }
      seen = min(first_pick + kWarp, found);
      for (unsigned matches = __ballot_sync(kAll, of == group); matches; matches &= matches - 1) {
        const int source = __ffs(static_cast<int>(matches)) - 1;
        const int from = __shfl_sync(kAll, where, source);
        if (key != kGone && (by_class || classes[m.order[from]] == kind))
          key = decayed<kMethod>(key, box, box_at(from), p);
        if (++told == most) {
          seen = first_pick + source + 1;
          break;
        }
      }
    }
    if (key != before) m.keys[index] = key;
    const unsigned best = __reduce_max_sync(kAll, key);
    const bool is_best = comes_first(key == best, static_cast<unsigned>(index));
    const unsigned next = __reduce_max_sync(kAll, is_best ? kGone : key);
    const int holder = first_lane(is_best);
    const int best_index = __shfl_sync(kAll, index, holder);
    if (lane == which) {
      tile.next = next;
      tile.index = static_cast<unsigned>(best_index);
      tile.place = first + holder;
      tile.seen = seen;
      tile.pending -= told;
      tile.fresh = tile.pending == 0;
      tile.bound = tile.fresh || best == kGone ? best : bound_of(best);
    }
  };

  int turn = 0;
  unsigned top = kGone;  // the best key of the warp
  bool offers = false;   // the tile of this lane has it
  bool anew = true;      // it must be found again
  while (found < p.max_det) {
    while (anew) {
      top = __reduce_max_sync(kAll, tile.bound);
      const bool at_top = tile.bound == top;
      const unsigned untold = __ballot_sync(kAll, at_top && !tile.fresh);
      if (untold && top != kGone) {
        tell(__ffs(static_cast<int>(untold)) - 1, p.max_det);
      } else {
        offers = comes_first(at_top, tile.index);
        anew = false;
      }
    }
    if (offers)
      m.offers[turn + warp] =
          uint4{top, tile.index, static_cast<unsigned>(tile.group), static_cast<unsigned>(tile.place)};
    const bool waits = tile.pending >= kBehind && tile.bound != kGone && top - tile.bound <= kNear;
    if (__any_sync(kAll, waits)) {
      const unsigned bound = __reduce_max_sync(kAll, waits ? tile.bound : kGone);
      tell(first_lane(waits && tile.bound == bound), kSome);
    }
    __syncthreads();
    const uint4 offer = lane < kWarps ? m.offers[turn + lane] : uint4{kGone, 0, 0, 0};
    const unsigned best = __reduce_max_sync(kAll, offer.x);
    if (best == kGone) break;
    const int winner = first_lane(comes_first(offer.x == best, offer.y));
    last_group = static_cast<int>(__shfl_sync(kAll, offer.z, winner));
    last_place = static_cast<int>(__shfl_sync(kAll, offer.w, winner));
    turn ^= kWarps;
    anew = winner == warp;
    if (anew && offers) {
      out_index[found] = tile.index;
      out_score[found] = score_of(best);
      m.keys[tile.index] = kGone;
      m.of_groups[found] = static_cast<unsigned char>(last_group);
      m.picks[found] = static_cast<std::uint16_t>(last_place);
      tile.bound = tile.next;
    }
    ++found;
    if (tile.group == last_group && tile.bound != kGone) {
      ++tile.pending;
      tile.fresh = false;
      tile.bound = bound_of(tile.bound);
    }
    __syncwarp();
    anew |= __any_sync(kAll, !tile.fresh && tile.bound >= top && tile.bound != kGone) != 0;
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
