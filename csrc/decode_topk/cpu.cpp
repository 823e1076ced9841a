// decode_topk on the CPU. Logits are read once, where they lie: those above the least of the best so far are collected,
// and the collection is cut to the best whenever it is full. The logits of an image are divided among threads where
// there are fewer images.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <utility>

#include "common/parallel_for.h"
#include "common/scratch.h"
#include "decode_topk/cpu_params.h"

namespace effdet {
namespace {

constexpr std::int64_t kBlock = 4096;         // logits between two looks at the room that is left
constexpr std::int64_t kLeastPart = 1 << 16;  // logits that are worth a thread

std::int64_t scan(const Stretch& stretch, int dtype, std::uint64_t least, std::uint64_t* out) {
  if (dtype == kBFloat16) return EFFDET_FOR_ISA(decode_topk_scan_bfloat16)(stretch, least, out);
  return EFFDET_FOR_ISA(decode_topk_scan_float)(stretch, least, out);
}
std::int64_t scan(const Stretch& stretch, int, WideEntry least, WideEntry* out) {
  return EFFDET_FOR_ISA(decode_topk_scan_double)(stretch, least, out);
}

// Moves the `kept` largest to the front, in any order, and up to `more` others; returns how many there are. None that
// is not `least` at most is left out. It counts eleven bits of what entries have above the lowest one, then the next of
// those that share the bits from which on an entry is kept.
template <typename E>
std::int64_t keep_best(E* entries, std::int64_t count, std::int64_t kept, std::int64_t more, E* least) {
  if (count <= kept) return count;
  constexpr int kBits = 11;
  constexpr E kDigit = (E(1) << kBits) - 1;
  const E lowest = *std::min_element(entries, entries + count);
  const E range = *std::max_element(entries, entries + count) - lowest;
  int shift = 0;
  while (range >> shift > kDigit) ++shift;
  E prefix = 0;
  for (int known = 8 * static_cast<int>(sizeof(E));; known = shift, shift = std::max(shift - kBits, 0)) {
    const E mask = known == 8 * static_cast<int>(sizeof(E)) ? E(0) : ~E(0) << known;
    std::int32_t counts[1 << kBits] = {};
    for (std::int64_t i = 0; i < count; ++i) {
      const E value = entries[i] - lowest;
      counts[value >> shift & kDigit] += (value & mask) == prefix;
    }
    E digit = kDigit;
    for (; kept > counts[digit]; --digit) kept -= counts[digit];
    prefix |= digit << shift;
    if (counts[digit] - kept <= more || shift == 0) break;
  }
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const E entry = entries[i];
    entries[found] = entry;
    found += entry - lowest >= prefix;
  }
  *least = lowest + prefix - 1;
  return found;
}

// Sorts descending, a byte at a time from the last one; bytes that are all the same cost nothing but counting.
void sort(std::uint64_t* entries, std::int64_t count, std::uint64_t* spare) {
  std::int32_t counts[8][256] = {};
  for (std::int64_t i = 0; i < count; ++i)
    for (int digit = 0; digit < 8; ++digit) ++counts[digit][entries[i] >> 8 * digit & 255];
  std::uint64_t* from = entries;
  for (int digit = 0; digit < 8; ++digit) {
    std::int32_t* to = counts[digit];
    if (to[from[0] >> 8 * digit & 255] == count) continue;
    std::int32_t larger = 0;
    for (int value = 255; value >= 0; --value) larger += std::exchange(to[value], larger);
    for (std::int64_t i = 0; i < count; ++i) spare[to[from[i] >> 8 * digit & 255]++] = from[i];
    std::swap(from, spare);
  }
  if (from != entries) std::copy_n(from, count, entries);
}
void sort(WideEntry* entries, std::int64_t count, WideEntry*) {
  std::sort(entries, entries + count, std::greater<WideEntry>());
}

// Logits of an image from `begin` to `end` in the order of the memory, in stretches of at most kBlock.
template <typename T, typename F>
void each_stretch(const DecodeTopkCpuParams& p, std::int64_t image, std::int64_t begin, std::int64_t end, F&& f) {
  const std::int64_t channels = p.anchors * p.classes;
  std::int64_t first_place = 0;
  for (const TopkLevel& level : p.levels) {
    const std::int64_t pixels = level.pixels();
    const std::int64_t stop = std::min(end - first_place, pixels * channels);
    const T* values = static_cast<const T*>(level.logits) + image * pixels * channels;
    for (std::int64_t at = std::max<std::int64_t>(begin - first_place, 0); at < stop; at += kBlock)
      f(Stretch{values + at, at, std::min(kBlock, stop - at), channels, level.logits_planar ? pixels : 0, first_place});
    first_place += pixels * channels;
  }
}

// Of an image's logits in the order of the memory, of which there are `logits`.
template <typename T>
class Image {
 public:
  using E = Entry<T>;

  Image(const DecodeTopkCpuParams& p, std::int64_t image, std::int64_t logits)
      : p_(p), image_(image), logits_(logits), room_(std::min(3 * p.kept, logits) + 2 * kBlock) {}

  // Writes up to p.kept entries of the logits from `begin` to `end`, in any order, and how many: the best, or those
  // above what is likely to be the least of the best.
  Status best(std::int64_t begin, std::int64_t end, bool by_sample, E* best, std::int64_t* count) {
    collected_ = static_cast<E*>(thread_scratch(static_cast<std::size_t>(room_) * sizeof(E)));
    if (!collected_) return kOutOfMemory;
    *count = collect(begin, end, by_sample && logits_ > 16 * room_ ? sampled() : E(0));
    std::copy_n(collected_, *count, best);
    return kOk;
  }

 private:
  // A bound above which, by a sample, there are half as many again as are kept, and a few.
  E sampled() {
    constexpr std::int64_t kRun = 16;
    constexpr double kGolden = 0.6180339887498949;  // its multiples are spread evenly, whatever the period of the maps
    const std::int64_t runs = std::min<std::int64_t>(1024, (room_ - kBlock) / kRun);
    std::int64_t count = 0;
    double at = 0;
    for (std::int64_t i = 0; i < runs; ++i) {
      at += at + kGolden < 1 ? kGolden : kGolden - 1;
      const auto from = static_cast<std::int64_t>(at * static_cast<double>(logits_ - kRun));
      each_stretch<T>(p_, image_, from, from + kRun,
                      [&](const Stretch& stretch) { count += scan(stretch, p_.dtype, E(0), collected_ + count); });
    }
    const double expected = static_cast<double>(count) * static_cast<double>(p_.kept) / static_cast<double>(logits_);
    E least = 0;
    keep_best(collected_, count, static_cast<std::int64_t>(1.5 * expected + 3 * std::sqrt(expected)) + 8, 0, &least);
    return least;
  }

  // Those above `least`, or the best of them.
  std::int64_t collect(std::int64_t begin, std::int64_t end, E least) {
    std::int64_t count = 0;
    each_stretch<T>(p_, image_, begin, end, [&](const Stretch& stretch) {
      if (count + kBlock > room_) count = keep_best(collected_, count, p_.kept, p_.kept / 8, &least);
      count += scan(stretch, p_.dtype, least, collected_ + count);
    });
    return keep_best(collected_, count, p_.kept, 0, &least);
  }

  const DecodeTopkCpuParams& p_;
  const std::int64_t image_, logits_;
  const std::int64_t room_;
  E* collected_ = nullptr;
};

template <typename T>
Status run(const DecodeTopkCpuParams& p, int threads) {
  using E = Entry<T>;
  std::int64_t logits = 0;
  for (const TopkLevel& level : p.levels) logits += level.pixels() * p.anchors * p.classes;
  const std::int64_t idle = (threads + p.batch - 1) / p.batch;
  const std::int64_t parts = std::max<std::int64_t>(std::min(idle, logits / kLeastPart), 1);
  const std::unique_ptr<E[]> best(new (std::nothrow) E[static_cast<std::size_t>(p.batch * parts * p.kept)]);
  const std::unique_ptr<std::int64_t[]> counts(new (std::nothrow)
                                                   std::int64_t[static_cast<std::size_t>(p.batch * parts)]);
  if (!best || !counts) return kOutOfMemory;
  std::atomic<bool> enough_memory{true};
  const auto collect = [&](std::int64_t image, std::int64_t part, bool by_sample) {
    const std::int64_t at = image * parts + part;
    const std::int64_t begin = part * logits / parts, end = (part + 1) * logits / parts;
    if (Image<T>(p, image, logits).best(begin, end, by_sample, best.get() + at * p.kept, counts.get() + at) != kOk)
      enough_memory = false;
  };
  parallel_for(p.batch * parts, threads, [&](std::int64_t i) { collect(i / parts, i % parts, true); });
  if (!enough_memory) return kOutOfMemory;
  parallel_for(p.batch, threads, [&](std::int64_t image) {
    const std::int64_t* found = counts.get() + image * parts;
    if (std::accumulate(found, found + parts, std::int64_t{0}) < p.kept)
      for (std::int64_t part = 0; part < parts; ++part) collect(image, part, false);
    E* all = best.get() + image * parts * p.kept;
    std::int64_t count = found[0];
    for (std::int64_t part = 1; part < parts; count += found[part++])
      std::copy_n(all + part * p.kept, found[part], all + count);
    E least = 0;
    keep_best(all, count, p.kept, 0, &least);
    E* spare = static_cast<E*>(thread_scratch(static_cast<std::size_t>(p.kept) * sizeof(E)));
    if (!spare) {
      enough_memory = false;
      return;
    }
    sort(all, p.kept, spare);
  });
  if (!enough_memory) return kOutOfMemory;
  parallel_for(p.batch * parts, threads, [&](std::int64_t i) {
    const std::int64_t image = i / parts, part = i % parts;
    EFFDET_FOR_ISA(decode_topk_decode)
    (p, image, best.get() + image * parts * p.kept, part * p.kept / parts, (part + 1) * p.kept / parts);
  });
  return kOk;
}

}  // namespace

Status decode_topk(const DecodeTopkCpuParams& p, int threads) {
  if (p.batch == 0 || p.kept == 0) return kOk;
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace effdet
