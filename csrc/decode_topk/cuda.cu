// decode_topk, forward, in two kernels. The first reads all logits, and writes the largest of each run of 32 and of
// each group of runs. The second, a block for each image, goes down: the K best logits are in the K best runs, and
// these are in the K best groups, where equal ones come in their order: before one that is passed over are K, whose
// largest logits come before all of its own. Then it sorts and decodes.
#include "cuda/launch.h"
#include "decode_topk/best.h"
#include "decode_topk/levels.h"

namespace effdet::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kBlockWarps* kWarp)
    decode_topk_runs_kernel(const DecodeTopkParams p, const Division d) {
  constexpr int kLanes = kRunVectors<T>;  // of a warp, that have a run
  constexpr int kRuns = kWarp / kLanes;   // of a group
  static_assert(kRuns == kVector<T> && kWarpGroups % kLanes == 0);
  const std::int64_t image = blockIdx.x / static_cast<unsigned>(d.all_blocks);
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(d.all_blocks));
  const int level = level_of(d.first_block, p.level_count, block);
  const int groups = d.groups[level];
  const int first = (block - d.first_block[level]) * kBlockGroups + warp_id() * kWarpGroups;
  const int lane = lane_id(), in_run = lane % kLanes;
  const Logits<T> logits(p.levels[level], image);

  wait_for_previous_kernel();
  uint4 x[kWarpGroups];
  EFFDET_UNROLL
  for (int i = 0; i < kWarpGroups; ++i) {
    const int at = (first + i) * kGroup<T> + lane * kVector<T>;
    if (at >= logits.begin && at + kVector<T> <= logits.end) x[i] = load<uint4>(logits.at + at);
  }
  const int whole_end = (first + kWarpGroups) * kGroup<T>;
  if (first == 0 || whole_end > logits.end) {  // of the warp: not all of its vectors need exist
    EFFDET_UNROLL
    for (int i = 0; i < kWarpGroups; ++i) {
      const int at = (first + i) * kGroup<T> + lane * kVector<T>;
      if (at < logits.begin || at + kVector<T> > logits.end)
        x[i] = part_of_vector(logits.at + at, logits.begin - at, logits.end - at);
    }
  }
  const Scratch<T> scratch(p, d.all_groups);
  const std::int64_t first_of_level = image * d.all_groups + d.first_group[level];
  unsigned run_key = 0, group_key = 0;  // that this thread writes
  EFFDET_UNROLL
  for (int i = 0; i < kWarpGroups; ++i) {
    unsigned largest = larger<T>(larger<T>(x[i].x, x[i].y), larger<T>(x[i].z, x[i].w));
    EFFDET_UNROLL
    for (int bits = 1; bits < kLanes; bits *= 2) largest = larger<T>(largest, __shfl_xor_sync(kAll, largest, bits));
    if constexpr (sizeof(T) == 2) largest = larger<T>(largest, largest >> 16) & 0xffffu;
    const bool exists = (first + i) * kGroup<T> + lane / kLanes * kRun < logits.end;
    const unsigned key = exists ? key_of<T>(largest) : 0;
    const unsigned of_group = __reduce_max_sync(kAll, key);
    if (lane == i) group_key = of_group;
    if (in_run == i % kLanes) run_key = key;
    if (i % kLanes == kLanes - 1) {
      const int group = first + i - (kLanes - 1) + in_run;
      if (group < groups)
        scratch.run_keys[(first_of_level + group) * kRuns + lane / kLanes] = static_cast<Key<T>>(run_key);
    }
  }
  if (lane < kWarpGroups && first + lane < groups)
    scratch.group_keys[first_of_level + first + lane] = static_cast<Key<T>>(group_key);
  let_next_kernel_start();
}

// What is searched: vectors of keys or logits. Of a vector, where those beyond the end are taken for the last one: its
// place, what is there, which elements are at least as large as a key (`passing`, as `bound` has it; never keys that
// are 0), and which of them there are (`existing`, where not all do). Of an element: its key and number.
template <typename T>
struct KeySource {
  using Place = int;  // of a vector of keys
  static constexpr bool all_exist = true;
  const Key<T>* keys;
  const unsigned* chosen;  // the vectors' numbers, or null: all
  int count;

  __device__ __forceinline__ Place place(int vector) const {
    vector = min(vector, count - 1);
    return chosen ? static_cast<int>(chosen[vector]) : vector;
  }
  __device__ __forceinline__ uint4 load(Place place) const {
    return cuda::load<uint4>(keys + static_cast<std::int64_t>(place) * kVector<T>);
  }
  __device__ __forceinline__ unsigned bound(unsigned threshold) const { return threshold; }
  __device__ __forceinline__ unsigned passing(const uint4& x, unsigned bound) const {
    unsigned mask = 0;
    EFFDET_UNROLL
    for (int i = 0; i < kVector<T>; ++i) mask |= element_of<T>(x, i) >= bound ? 1u << i : 0u;
    return mask;
  }
  __device__ __forceinline__ unsigned existing(int vector) const { return vector < count ? ~0u : 0u; }
  __device__ __forceinline__ uint2 key_and_id(int at) const {
    const int id = place(at / kVector<T>) * kVector<T> + at % kVector<T>;
    return {keys[id], static_cast<unsigned>(id)};
  }
};

template <typename T>
struct LogitSource {
  using Place = const T*;
  const Run* runs;
  int count;
  bool all_exist;

  __device__ __forceinline__ static int in_run(int vector) { return vector % kRunVectors<T> * kVector<T>; }
  __device__ __forceinline__ Place place(int vector) const {
    return first_of(runs[min(vector / kRunVectors<T>, count - 1)]) + in_run(vector);
  }
  __device__ __forceinline__ uint4 load(Place place) const { return cuda::load<uint4>(place); }
  __device__ __forceinline__ unsigned bound(unsigned threshold) const { return word_of<T>(threshold); }
  __device__ __forceinline__ unsigned passing(const uint4& x, unsigned bound) const { return at_least<T>(x, bound); }
  __device__ __forceinline__ unsigned existing(int vector) const {
    if (vector >= count * kRunVectors<T>) return 0;
    const Run& run = runs[vector / kRunVectors<T>];
    const int begin = run.begin - in_run(vector), end = run.end - in_run(vector);
    const unsigned below_end = end <= 0 ? 0u : end >= kVector<T> ? ~0u : (1u << end) - 1;
    const unsigned below_begin = begin <= 0 ? 0u : (1u << begin) - 1;
    return below_end & ~below_begin;
  }
  __device__ __forceinline__ uint2 key_and_id(int at) const {
    const Run& run = runs[at / kRun];
    const unsigned bits = bits_of(first_of(run)[at % kRun]);
    return {key_of<T>(bits), static_cast<unsigned>(run.first_logit + at % kRun)};
  }

 private:
  __device__ __forceinline__ static const T* first_of(const Run& run) {
    return reinterpret_cast<const T*>(static_cast<std::uintptr_t>(run.address));
  }
};

// x in [0, limit]; a NaN stays, of either.
__device__ __forceinline__ float clipped(float x, float limit) {
  x = x < 0.0f ? 0.0f : x;
  return x <= limit || x != x ? x : limit;
}

// A logit of an image, with what its outputs are made of.
template <typename T>
struct Pick {
  int anchor, class_of;
  T logit, code[4];
  float4 corners;
  float moved[2];  // by how much the anchor is

  __device__ __forceinline__ void read(const DecodeTopkParams& p, const Division& d, std::int64_t image, int at) {
    const int level = level_of(d.first_logit, p.level_count, at);
    logit = static_cast<const T*>(p.levels[level].logits)[image * p.levels[level].length + at - d.first_logit[level]];
    anchor = static_cast<int>(static_cast<unsigned>(at) / static_cast<unsigned>(p.classes));
    class_of = at - anchor * p.classes;
    const unsigned of_level = static_cast<unsigned>(anchor - d.first_anchor[level]);
    std::int64_t given = anchor;  // which of the anchors
    moved[0] = moved[1] = 0.0f;
    if (p.strides) {
      const unsigned width = static_cast<unsigned>(p.levels[level].width);
      const unsigned per_location = static_cast<unsigned>(p.per_location);
      const unsigned location = of_level / per_location, row = location / width;
      given = level * per_location + of_level - location * per_location;
      moved[0] = static_cast<float>(location - row * width) * p.strides[level * 2];
      moved[1] = static_cast<float>(row) * p.strides[level * 2 + 1];
    }
    corners = load<float4>(p.anchors + given * 4);
    const std::int64_t of_maps = image * d.anchors[level] + of_level;
    EFFDET_UNROLL
    for (int i = 0; i < 4; ++i) code[i] = static_cast<const T*>(p.levels[level].codes)[of_maps * 4 + i];
  }

  // `to`: its place among the picks of all images.
  __device__ __forceinline__ void write(const DecodeTopkParams& p, const float (&limits)[2], std::int64_t to) const {
    const float low[2] = {corners.x, corners.y}, high[2] = {corners.z, corners.w};
    float first[2], second[2];
    EFFDET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float size = high[i] - low[i];
      const float half = expf(widen(code[3 - i])) * size * 0.5f;
      const float centre = widen(code[1 - i]) * size + ((low[i] + high[i]) * 0.5f + moved[i]);
      first[i] = centre - half;
      second[i] = centre + half;
      if (p.limits) {
        first[i] = clipped(first[i], limits[i]);
        second[i] = clipped(second[i], limits[i]);
      }
    }
    store(p.boxes + to * 4, float4{first[0], first[1], second[0], second[1]});
    static_cast<T*>(p.logits)[to] = logit;
    p.anchor_index[to] = anchor;
    p.classes_of[to] = class_of;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode_topk_pick_kernel(const DecodeTopkParams p, const Division d, const int room) {
  const std::int64_t image = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  Shared shared;
  Best<T> best(shared, p.kept, room);
  const int most = most_chosen(p.kept);
  const Scratch<T> scratch(p, d.all_groups);
  unsigned* const groups = scratch.groups + image * most;
  Run* const runs = scratch.runs + image * most;
  const Key<T>* const run_keys = scratch.run_keys + image * d.all_groups * kVector<T>;

  wait_for_previous_kernel();
  const int vectors = d.all_groups / kVector<T>;
  best.find(KeySource<T>{scratch.group_keys + image * d.all_groups, nullptr, vectors}, vectors, most);
  const int group_count = best.count();
  for (int i = thread; i < group_count; i += kThreads) groups[i] = best.ids[i];
  __syncthreads();

  best.find(KeySource<T>{run_keys, groups, group_count}, group_count, most);
  const int run_count = best.count();
  int partial = 0;  // runs
  for (int i = thread; i < run_count; i += kThreads) {
    const int number = static_cast<int>(best.ids[i]);
    const int level = level_of(d.first_group, p.level_count, number / kVector<T>);
    const Logits<T> logits(p.levels[level], image);
    const int at = (number - d.first_group[level] * kVector<T>)*kRun;
    Run run;
    run.first_logit = d.first_logit[level] + at - logits.begin;
    run.begin = static_cast<short>(at == 0 ? logits.begin : 0);
    run.end = static_cast<short>(min(kRun, logits.end - at));
    const T* address = logits.at + at;
    if (run.begin != 0 || run.end != kRun) {  // seldom: so that it can be read in whole vectors
      ++partial;
      T* const copy = scratch.ends + ((image * p.level_count + level) * 2 + (at == 0 ? 0 : 1)) * kRun;
      EFFDET_NO_UNROLL
      for (int j = 0; j < kRun; ++j) copy[j] = address[j >= run.begin && j < run.end ? j : run.begin];
      address = copy;
    }
    run.address = reinterpret_cast<std::uintptr_t>(address);
    runs[i] = run;
  }
  const bool all_exist = best.sum(partial) == 0;  // and a barrier

  best.find(LogitSource<T>{runs, run_count, all_exist}, run_count * kRunVectors<T>, kMostPicks);
  best.sort();
  let_next_kernel_start();
  float limits[2] = {0.0f, 0.0f};
  if (p.limits) {
    limits[0] = p.limits[image * 2];
    limits[1] = p.limits[image * 2 + 1];
  }
  constexpr int kAtOnce = 4;  // picks of a thread, so that it waits for their loads together
  for (int first = thread; first < p.kept; first += kAtOnce * kThreads) {
    Pick<T> picks[kAtOnce];
    EFFDET_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < p.kept) picks[i].read(p, d, image, static_cast<int>(best.ids[first + i * kThreads]));
    EFFDET_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kThreads < p.kept) picks[i].write(p, limits, image * p.kept + first + i * kThreads);
  }
}

template <typename T>
int launch_of(const DecodeTopkParams& p, void* stream) {
  const Division d = division<T>(p);
  Grid grid;
  grid.blocks = p.batch * d.all_blocks;
  grid.threads = kBlockWarps * kWarp;
  const int status = launch(decode_topk_runs_kernel<T>, grid, stream, p, d);
  if (status != kOk) return status;
  grid.blocks = p.batch;
  grid.threads = kThreads;
  const int room = p.room != 0 ? p.room : Best<T>::room(shared_limit());
  if (room <= p.kept) return kBadSize;
  grid.shared_bytes = Best<T>::shared_bytes(room);
  return launch(decode_topk_pick_kernel<T>, grid, stream, p, d, room);
}

}  // namespace

std::int64_t decode_topk_scratch(const DecodeTopkParams& p) {
  return p.dtype == kFloat32 ? Scratch<float>(p, division<float>(p).all_groups).bytes(p)
                             : Scratch<BFloat16>(p, division<BFloat16>(p).all_groups).bytes(p);
}

int decode_topk(const DecodeTopkParams& p, void* stream) {
  if (p.dtype == kFloat32) return launch_of<float>(p, stream);
  return p.dtype == kBFloat16 ? launch_of<BFloat16>(p, stream) : launch_of<Float16>(p, stream);
}

}  // namespace effdet::cuda
