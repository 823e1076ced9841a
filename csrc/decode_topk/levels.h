// Where the logits of an image are: levels, runs and groups of runs, the memory between the kernels.
#pragma once

#include "cuda/memory.h"
#include "decode_topk/keys.h"
#include "decode_topk/params.h"

namespace effdet::cuda {

constexpr int kRun = 32;  // logits of a run
template <typename T>
constexpr int kRunVectors = kRun / kVector<T>;
// Logits of a group: a vector for each thread of a warp. The keys of a group's runs are a vector as well.
template <typename T>
constexpr int kGroup = kWarp * kVector<T>;

constexpr int kWarpGroups = 8;  // that a warp loads at once
constexpr int kBlockWarps = 8;
constexpr int kBlockGroups = kWarpGroups * kBlockWarps;

// How an image is divided.
struct Division {
  int first_logit[kMostLevels];
  int first_anchor[kMostLevels];
  int anchors[kMostLevels];
  int first_group[kMostLevels];
  int groups[kMostLevels];
  int first_block[kMostLevels];  // of the kernel that reads all logits
  int all_groups;                // a multiple of a vector of keys
  int all_blocks;
};

template <typename T>
Division division(const DecodeTopkParams& p) {
  Division d{};
  int logits = 0;
  for (int i = 0; i < p.level_count; ++i) {
    d.first_logit[i] = logits;
    d.first_anchor[i] = logits / p.classes;
    d.anchors[i] = p.levels[i].length / p.classes;
    d.first_group[i] = d.all_groups;
    d.first_block[i] = d.all_blocks;
    d.groups[i] = divided(p.levels[i].length + kVector<T> - 1, kGroup<T>);  // wherever in a vector the first one is
    if (i == p.level_count - 1) {
      const int rest = (d.all_groups + d.groups[i]) % kVector<T>;
      d.groups[i] += rest == 0 ? 0 : kVector<T> - rest;
    }
    logits += p.levels[i].length;
    d.all_groups += d.groups[i];
    d.all_blocks += divided(d.groups[i], kBlockGroups);
  }
  return d;
}

// The last of the levels that start at or before `at`.
__device__ __forceinline__ int level_of(const int (&firsts)[kMostLevels], int count, int at) {
  int level = 0;
  for (int i = 1; i < count; ++i) level += at >= firsts[i] ? 1 : 0;
  return level;
}

// A level of an image. Its logits are counted from an aligned address, at or before the first one: they are those from
// `begin` to `end`.
template <typename T>
struct Logits {
  const T* at;
  int begin, end;

  __device__ __forceinline__ Logits(const DecodeLevel& level, std::int64_t image) {
    const T* const first = static_cast<const T*>(level.logits) + image * level.length;
    begin = static_cast<int>(reinterpret_cast<std::uintptr_t>(first) % 16 / sizeof(T));
    end = begin + level.length;
    at = first - begin;
  }
};

// A vector of logits of which only those from `begin` to `end` exist, or -infinity.
template <typename T>
__device__ __forceinline__ uint4 part_of_vector(const T* at, int begin, int end) {
  constexpr unsigned kNone = std::is_same_v<T, float> ? 0xff800000u : kInfinity<T> | 0x8000u;
  const auto bits = [&](int i) { return i >= begin && i < end ? bits_of(at[i]) : kNone; };
  unsigned words[4];
  EFFDET_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = bits(i);
    } else {
      words[i] = bits(2 * i) | bits(2 * i + 1) << 16;
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// A run that was chosen.
struct alignas(16) Run {
  std::uint64_t address;  // of its first logit
  int first_logit;        // its number in the image
  short begin, end;       // those of its logits that exist
};

// Runs, or groups, of an image at most that are searched further: a few more than are needed, where dropping them would
// take longer.
__host__ __device__ __forceinline__ int most_chosen(int kept) {
  return kept + kept / 8;
}

// Memory between the kernels, and between the steps of one.
template <typename T>
struct Scratch {
  Run* runs;           // [batch, most_chosen(kept)]
  T* ends;             // [batch, levels, 2, kRun]: copies of the first and the last run, where they are not whole
  Key<T>* run_keys;    // [batch, all_groups, runs of a group]
  Key<T>* group_keys;  // [batch, all_groups]
  unsigned* groups;    // [batch, most_chosen(kept)]

  __host__ __device__ __forceinline__ Scratch(const DecodeTopkParams& p, int all_groups) {
    const std::int64_t all = p.batch * all_groups;
    runs = static_cast<Run*>(p.scratch);
    ends = reinterpret_cast<T*>(runs + p.batch * most_chosen(p.kept));
    run_keys = reinterpret_cast<Key<T>*>(ends + p.batch * p.level_count * 2 * kRun);
    group_keys = run_keys + all * kVector<T>;
    groups = reinterpret_cast<unsigned*>(group_keys + all);
  }
  std::int64_t bytes(const DecodeTopkParams& p) const {
    return reinterpret_cast<unsigned char*>(groups + p.batch * most_chosen(p.kept)) -
           static_cast<unsigned char*>(p.scratch);
  }
};

}  // namespace effdet::cuda
