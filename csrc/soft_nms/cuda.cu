// soft_nms on a GPU: a block has an image. Candidates are sorted, coarsely, by score and cut into chunks of one for
// each thread; a chunk takes part once the next pick could be in it. It is then sorted by class and cut into tiles of a
// warp, which catch up with the picks that there were. Scores fall (or rise to 0 at most), so chunks that wait are
// beneath all picks. A pick is told to the tiles that have its class, and is one barrier: every warp offers its best
// candidate, and every warp finds the best of them. What the design costs, and what others would, is in
// effdet_kernels/ops/soft_nms/README.md.
#include <algorithm>

#include "cuda/launch.h"
#include "soft_nms/cuda_parts.h"

namespace effdet::cuda {
namespace {

constexpr int kRead = 5;  // candidates that a thread reads at a time

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
  const bool by_class = __all_sync(kAll, m.sums[lane & (kWarps - 1)]) != 0;
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
  before += __reduce_add_sync(kAll, lane < warp ? m.sums[lane & (kWarps - 1)] : 0);
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
    const int holder = lane_of(first_of(key == best, c.index));
    const int index = __shfl_sync(kAll, c.index, holder), group = __shfl_sync(kAll, c.group, holder);
    if (lane == which) {
      tile.key = best;
      tile.index = index;
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
    const int tile_first = first + ((warp + 5 * chunks) & (kWarps - 1)) * kWarp;
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
    const unsigned key = one ? mine.key : tile.key;
    const int index = one ? mine.index : tile.index;
    if (anew) offers = lane == lane_of(first_of(key == __reduce_max_sync(kAll, key), index));
    if (offers) {
      m.offers[turn + warp] = Offer{key, index, one ? mine.place : tile.place, one ? mine.group : tile.group};
      if (key != kGone) m.offered_boxes[turn + warp] = one ? mine.box : box_at(tile.place);
    }
    __syncthreads();
    const Offer offer = lane < kWarps ? m.offers[turn + lane] : Offer{kGone, 0, 0, 0};
    const unsigned best = __reduce_max_sync(kAll, offer.key);
    if (chunks * kThreads < candidates && (best == kGone || level_of(best) >= next_level)) {
      take_up_chunk();
      anew = true;
      turn ^= kWarps;
      continue;
    }
    if (best == kGone) break;
    const int winner = lane_of(first_of(offer.key == best, offer.index));
    const float4 box = m.offered_boxes[turn + winner];
    const int place = m.offers[turn + winner].place, group = m.offers[turn + winner].group;
    turn ^= kWarps;
    // Written by a warp that has less to do than the winner's.
    if (warp == ((winner + kWarps / 2) & (kWarps - 1)) && lane == winner) {
      out_index[found] = offer.index;
      out_score[found] = score_of(best);
      m.picks[found] = static_cast<std::uint16_t>(place);
    }
    if (one) {
      if (winner == warp && offers) mine.key = kGone;
      mine.key = after(mine, place, group, box);
      anew = __any_sync(kAll, mine.key != key) != 0;
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
