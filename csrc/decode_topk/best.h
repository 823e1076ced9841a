// The best of many candidates, found and sorted by one block: a list in shared memory, in the order of the candidates'
// numbers. When it is full, all but the `kept` best are dropped, and what follows must be better than the last of them.
#pragma once

#include "cuda/memory.h"
#include "decode_topk/keys.h"
#include "decode_topk/params.h"

namespace effdet::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRounds = 4;  // vectors of candidates that a thread takes at a time
constexpr int kDigits = 256;

template <typename T>
class Best {
  static constexpr int kReplicas = 8;  // of the counts of digits
  static constexpr int kCounters = kDigits * kReplicas;
  static constexpr std::size_t kFixedBytes = Shared::rounded(kCounters * 4) + Shared::rounded(kDigits * 4) +
                                             Shared::rounded(2 * kWarps * 4) + Shared::rounded(8);
  static_assert(kCounters * 4 == kDigits * kWarps * 2);  // those of the sort take the same memory

 public:
  // Shared memory with room for so many candidates, and the other way round.
  static std::size_t shared_bytes(int room) { return kFixedBytes + 2 * Shared::rounded(std::size_t{4} * room); }
  static int room(std::size_t bytes) {
    return bytes < kFixedBytes ? 0 : static_cast<int>((bytes - kFixedBytes) / 32 * 4);
  }

  __device__ __forceinline__ Best(Shared& shared, int kept, int room) : kept_(kept), room_(room) {
    keys = shared.take<unsigned>(divided(room, 4) * 4);
    ids = shared.take<unsigned>(divided(room, 4) * 4);
    counters_ = shared.take<int>(kCounters);
    counts_ = shared.take<int>(kDigits);
    totals_ = shared.take<int>(2 * kWarps);
    found_ = shared.take<int>(2);
  }

  unsigned* keys;  // of the list
  unsigned* ids;

  __device__ __forceinline__ int count() const { return count_; }

  // The list of the best of a source's candidates, `kept` or, where there are not more of them, `most`. Those of a call
  // before are candidates' upper bounds, as many as are kept: what is below the last of them is not among the best.
  template <typename Source>
  __device__ __forceinline__ void find(const Source& source, int vectors, int most) {
    bool dropped = false;
    constexpr int kStep = kThreads * kRounds;
    const int mine = warp_id() * kWarp * kRounds + lane_id();
    unsigned masks[kRounds];  // of candidates that are not in the list yet
    EFFDET_UNROLL
    for (int j = 0; j < kRounds; ++j) masks[j] = ~0u;
    count_ = known_ = 0;
    EFFDET_NO_UNROLL
    for (int first = 0; first < vectors && threshold_ <= kHighestKey<T>;) {
      const unsigned bound = source.bound(threshold_);
      uint4 x[kRounds], next[kRounds];
      typename Source::Place places[kRounds];  // of those after the next
      // All places are asked for before the first is waited for.
      typename Source::Place now[kRounds], then[kRounds];
      EFFDET_UNROLL
      for (int j = 0; j < kRounds; ++j) {
        const int at = first + mine + j * kWarp;
        now[j] = source.place(at);
        then[j] = source.place(at + kStep);
        places[j] = source.place(at + 2 * kStep);
      }
      EFFDET_UNROLL
      for (int j = 0; j < kRounds; ++j) x[j] = source.load(now[j]);
      EFFDET_UNROLL
      for (int j = 0; j < kRounds; ++j) next[j] = source.load(then[j]);
      bool whole = true;
      EFFDET_NO_UNROLL
      while (whole && first < vectors) {
        const bool all_exist = source.all_exist && first + kStep <= vectors;
        EFFDET_UNROLL
        for (int j = 0; j < kRounds; ++j) masks[j] &= source.passing(x[j], bound);
        if (!all_exist) {
          EFFDET_UNROLL
          for (int j = 0; j < kRounds; ++j) masks[j] &= source.existing(first + mine + j * kWarp);
        }
        EFFDET_UNROLL
        for (int j = 0; j < kRounds; ++j) {
          x[j] = next[j];
          next[j] = source.load(places[j]);
        }
        EFFDET_UNROLL
        for (int j = 0; j < kRounds; ++j) places[j] = source.place(first + mine + 3 * kStep + j * kWarp);
        whole = append<kVector<T>>(masks, first + mine);
        if (whole) {
          first += kStep;
          EFFDET_UNROLL
          for (int j = 0; j < kRounds; ++j) masks[j] = ~0u;
        }
      }
      __syncthreads();
      look_up(source);
      // Seldom: what was loaded ahead is loaded again rather than kept in registers.
      if (!whole || count_ > most) {
        select();
        dropped = true;
      }
    }
    if (dropped) --threshold_;  // equal ones are welcome in the next search
  }

  // The sum of `value` over the block.
  __device__ __forceinline__ int sum(int value) {
    int total;
    before(value, total);
    return total;
  }

  // Sorts the list, the largest keys first, equal ones in order: by one byte of the keys after the other.
  __device__ __forceinline__ void sort() {
    constexpr int kItems = kMostPicks / kThreads;
    auto* const places = reinterpret_cast<std::uint16_t*>(counters_);  // [warps, digits]
    std::uint16_t* const of_warp = places + warp_id() * kDigits;
    const int rounds = divided(count_, kThreads);
    const int mine = warp_id() * kWarp * rounds + lane_id();
    EFFDET_NO_UNROLL
    for (int shift = 0; shift < kKeyBits<T>; shift += 8) {
      for (int i = lane_id(); i < kDigits; i += kWarp) of_warp[i] = 0;
      __syncwarp();
      unsigned key[kItems], id[kItems];
      int to[kItems];
      EFFDET_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const int at = mine + i * kWarp;
        if (i >= rounds) continue;
        const bool exists = at < count_;
        key[i] = exists ? keys[at] : 0;
        id[i] = exists ? ids[at] : 0;
        const unsigned digit = digit_of(key[i], shift);
        unsigned same = __ballot_sync(kAll, exists);
        EFFDET_UNROLL
        for (int bit = 0; bit < 8; ++bit) {
          const unsigned set = __ballot_sync(kAll, digit >> bit & 1);
          same &= digit >> bit & 1 ? set : ~set;
        }
        const int before = exists ? of_warp[digit] : 0;
        to[i] = before + __popc(same & ((1u << lane_id()) - 1));
        __syncwarp();
        if (exists && same >> lane_id() == 1) of_warp[digit] = static_cast<std::uint16_t>(to[i] + 1);  // the last one
        __syncwarp();
      }
      __syncthreads();
      start_digits(places);
      EFFDET_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const int at = mine + i * kWarp;
        if (i < rounds && at < count_) {
          to[i] += of_warp[digit_of(key[i], shift)];
          keys[to[i]] = key[i];
          ids[to[i]] = id[i];
        }
      }
      __syncthreads();
    }
  }

 private:
  // 255 minus a byte: the largest come first.
  __device__ __forceinline__ static unsigned digit_of(unsigned key, int shift) { return ~(key >> shift) & 255u; }

  // The sum of `value` over the threads of the warp up to this one.
  __device__ __forceinline__ static int up_to(int value) {
    EFFDET_UNROLL
    for (int by = 1; by < kWarp; by *= 2) {
      const int other = __shfl_up_sync(kAll, value, by);
      if (lane_id() >= by) value += other;
    }
    return value;
  }
  // Over the threads of the block before this one, and over all.
  __device__ __forceinline__ int before(int value, int& total) {
    const int sum = up_to(value);
    return sum - value + before_warp(__shfl_sync(kAll, sum, kWarp - 1), total);
  }
  // Of warps that have `value` each. One barrier: what a warp reads here is written again in the call after the next.
  __device__ __forceinline__ int before_warp(int value, int& total) {
    int* const totals = totals_ + turn_ * kWarps;
    turn_ ^= 1;
    if (lane_id() == 0) totals[warp_id()] = value;
    __syncthreads();
    const int mine = lane_id() < kWarps ? totals[lane_id()] : 0;
    const int sum = up_to(mine);
    total = __shfl_sync(kAll, sum, kWarp - 1);
    return __shfl_sync(kAll, sum - mine, warp_id());
  }

  // Appends the candidates of `masks`, where a vector has kEach: at first where to find them. False: the list is full,
  // and `masks` has the rest.
  template <int kEach>
  __device__ __forceinline__ bool append(unsigned (&masks)[kRounds], int first) {
    int to[kRounds];
    int of_warp = 0;
    EFFDET_UNROLL
    for (int j = 0; j < kRounds; j += 2) {  // two counts in one integer: a warp has at most 256 of each
      const int mine = __popc(masks[j]) | __popc(masks[j + 1]) << 16;
      const int sum = up_to(mine);
      const int earlier = sum - mine, both = __shfl_sync(kAll, sum, kWarp - 1);
      to[j] = of_warp + (earlier & 0xffff);
      of_warp += both & 0xffff;
      to[j + 1] = of_warp + (earlier >> 16);
      of_warp += both >> 16;
    }
    int total;
    const int start = count_ + before_warp(of_warp, total);
    EFFDET_UNROLL
    for (int j = 0; j < kRounds; ++j) {
      unsigned* at = ids + start + to[j];
      const unsigned place = static_cast<unsigned>((first + j * kWarp) * kEach - 1);
      EFFDET_NO_UNROLL
      while (masks[j] != 0 && at < ids + room_) {
        *at++ = place + static_cast<unsigned>(__ffs(static_cast<int>(masks[j])));
        masks[j] &= masks[j] - 1;
      }
    }
    const bool whole = count_ + total <= room_;
    count_ = whole ? count_ + total : room_;
    return whole;
  }

  // Keys and numbers of the candidates that were appended.
  template <typename Source>
  __device__ __forceinline__ void look_up(const Source& source) {
    constexpr int kAtOnce = 4;
    EFFDET_NO_UNROLL
    for (int first = known_ + static_cast<int>(threadIdx.x); first < count_; first += kAtOnce * kThreads) {
      uint2 found[kAtOnce];
      EFFDET_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * kThreads;
        found[i] = source.key_and_id(at < count_ ? static_cast<int>(ids[at]) : 0);
      }
      EFFDET_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * kThreads < count_) {
          keys[first + i * kThreads] = found[i].x;
          ids[first + i * kThreads] = found[i].y;
        }
      }
    }
    known_ = count_;
    __syncthreads();
  }

  // Drops all but the `kept_` best of the list, of equal ones the last.
  __device__ __forceinline__ void select() {
    constexpr int kItems = 11;  // that a thread takes at a time: an odd number meets no bank twice
    constexpr int kPart = kItems * kThreads;
    const int thread = static_cast<int>(threadIdx.x);
    unsigned last = 0;  // the key of the last one that stays, from its first byte on
    int need = kept_;   // of those that begin so
    EFFDET_NO_UNROLL
    for (int shift = kKeyBits<T> - 8; shift >= 0; shift -= 8) {
      for (int i = thread; i < kCounters; i += kThreads) counters_[i] = 0;
      __syncthreads();
      EFFDET_NO_UNROLL
      for (int at = 4 * thread; at < count_; at += 4 * kThreads) {
        const uint4 vector = load<uint4>(keys + at);
        EFFDET_UNROLL
        for (int i = 0; i < 4; ++i) {
          const unsigned begin = element_of<float>(vector, i) >> shift;
          if (at + i < count_ && begin >> 8 == last)
            atomicAdd(counters_ + (~begin & 255u) * kReplicas + lane_id() % kReplicas, 1);
        }
      }
      __syncthreads();
      constexpr int kParts = kReplicas / 4;
      static_assert(kDigits * kParts == kThreads);
      const uint4 four = load<uint4>(counters_ + thread * 4);
      unsigned sum = four.x + four.y + four.z + four.w;
      EFFDET_UNROLL
      for (int bits = 1; bits < kParts; bits *= 2) sum += __shfl_xor_sync(kAll, sum, bits);
      if (thread % kParts == 0) counts_[thread / kParts] = static_cast<int>(sum);
      __syncthreads();
      if (warp_id() == 0) find_digit(need);
      __syncthreads();
      last = last << 8 | (~static_cast<unsigned>(found_[0]) & 255u);
      need = found_[1];
    }
    int above = 0, equal = 0;  // of the parts before
    EFFDET_NO_UNROLL
    for (int first = 0; first < count_; first += kPart) {
      unsigned key[kItems], id[kItems];
      int mine = 0;  // above, and equal in the upper half
      EFFDET_UNROLL
      for (int i = 0; i < kItems; ++i) {
        const int at = first + thread * kItems + i;
        key[i] = at < count_ ? keys[at] : 0;
        id[i] = at < count_ ? ids[at] : 0;
        mine += (key[i] > last ? 1 : 0) + (key[i] == last ? 1 << 16 : 0);
      }
      int all;
      const int earlier = before(mine, all);  // and a barrier: the part was read by all
      int a = above + (earlier & 0xffff), e = equal + (earlier >> 16);
      EFFDET_UNROLL
      for (int i = 0; i < kItems; ++i) {
        if (key[i] > last || (key[i] == last && e < need)) {
          const int to = a + min(e, need);
          keys[to] = key[i];
          ids[to] = id[i];
        }
        a += key[i] > last ? 1 : 0;
        e += key[i] == last ? 1 : 0;
      }
      above += all & 0xffff;
      equal += all >> 16;
    }
    count_ = known_ = kept_;
    threshold_ = last + 1;
    __syncthreads();
  }

  // The digit in which the `need`th of the counted ones is, and its place among those with this digit.
  __device__ __forceinline__ void find_digit(int need) {
    constexpr int kEach = kDigits / kWarp;
    int mine[kEach], sum = 0;
    EFFDET_UNROLL
    for (int i = 0; i < kEach; ++i) {
      mine[i] = counts_[lane_id() * kEach + i];
      sum += mine[i];
    }
    const int all = up_to(sum);
    int earlier = all - sum;
    if (earlier < need && need <= all) {
      EFFDET_UNROLL
      for (int i = 0; i < kEach; ++i) {
        if (earlier < need && need <= earlier + mine[i]) {
          found_[0] = lane_id() * kEach + i;
          found_[1] = need - earlier;
        }
        earlier += mine[i];
      }
    }
  }

  // From how many of each digit each warp has to where the first of them goes.
  __device__ __forceinline__ void start_digits(std::uint16_t* places) {
    constexpr int kAtOnce = 8;  // loads
    const int digit = static_cast<int>(threadIdx.x);
    int sum = 0, all;
    if (digit < kDigits) {
      EFFDET_NO_UNROLL
      for (int first = 0; first < kWarps; first += kAtOnce) {
        EFFDET_UNROLL
        for (int i = 0; i < kAtOnce; ++i) sum += places[(first + i) * kDigits + digit];
      }
    }
    int start = before(sum, all);
    if (digit < kDigits) {
      EFFDET_NO_UNROLL
      for (int first = 0; first < kWarps; first += kAtOnce) {
        EFFDET_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          std::uint16_t& place = places[(first + i) * kDigits + digit];
          const int of_warp = place;
          place = static_cast<std::uint16_t>(start);
          start += of_warp;
        }
      }
    }
    __syncthreads();
  }

  int* counters_;
  int* counts_;
  int* totals_;
  int* found_;
  int kept_, room_;
  int count_ = 0;
  int known_ = 0;  // of them, that have keys and numbers
  int turn_ = 0;
  unsigned threshold_ = kLowestKey<T>;
};

}  // namespace effdet::cuda
