// Runs decode_topk on random maps, awkward values included, in buffers of exactly the right size, and compares what it
// selects with a sort of all logits. Built with AddressSanitizer and UndefinedBehaviorSanitizer, it ends with an error
// at the first stray access. The argument: how many problems.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "decode_topk/cpu_params.h"

namespace {

using effdet::BFloat16;

double wide(float x) {
  return x;
}
double wide(double x) {
  return x;
}
double wide(BFloat16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
void put(double x, float* to) {
  *to = static_cast<float>(x);
}
void put(double x, double* to) {
  *to = x;
}
void put(double x, BFloat16* to) {
  const auto value = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  to->bits = static_cast<std::uint16_t>(bits >> 16);
}

template <typename T, typename A>
bool run(std::mt19937_64& random, int dtype) {
  const auto pick = [&](std::int64_t most) { return static_cast<std::int64_t>(random() % (most + 1)); };
  std::normal_distribution<double> normal(-4, 1);
  const double awkward[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                            -std::numeric_limits<double>::infinity(), -0.0, 0.0};
  effdet::DecodeTopkCpuParams p{};
  p.dtype = dtype;
  p.batch = 1 + pick(2);
  p.anchors = 1 + pick(3);
  p.classes = 1 + pick(20);
  const bool large = pick(20) == 0;  // enough to be sampled, divided and cut
  const std::int64_t rare = pick(1) ? 20 : 1 << 30;
  const bool few_values = pick(3) == 0;
  const int order = static_cast<int>(pick(4));
  std::vector<std::vector<T>> logits, codes;
  std::int64_t locations = 0;
  for (std::int64_t l = 0, count = 1 + pick(3); l < count; ++l) {
    effdet::TopkLevel level{};
    level.height = 1 + pick(large ? 120 : 9);
    level.width = 1 + pick(large ? 120 : 9);
    level.logits_planar = pick(1);
    level.codes_planar = pick(1);
    locations += level.pixels();
    logits.emplace_back(p.batch * level.pixels() * p.anchors * p.classes);
    codes.emplace_back(p.batch * level.pixels() * p.anchors * 4);
    for (T& x : logits.back()) {
      const double value = few_values ? static_cast<double>(pick(2)) : normal(random);
      put(pick(rare) ? value : awkward[pick(4)], &x);
    }
    for (T& x : codes.back()) put(pick(rare) ? normal(random) + 4 : 100 * awkward[pick(4)], &x);
    const auto less = [](T a, T b) { return wide(a) < wide(b); };
    if (order == 0 && rare > 1000) std::sort(logits.back().begin(), logits.back().end(), less);
    level.logits = logits.back().data();
    level.codes = codes.back().data();
    p.levels.push_back(level);
  }
  const std::int64_t all = locations * p.anchors * p.classes;
  p.kept = pick(std::min<std::int64_t>(all, pick(1) ? all : 200));
  std::vector<A> anchors(locations * p.anchors * 4, A(5)), limits(p.batch * 2, A(40));
  std::vector<double> grid(p.levels.size() * p.anchors * 4, 5.0), strides(p.levels.size() * 2, 8.0);
  p.anchor_boxes = anchors.data();
  if (pick(1)) {
    p.grid = grid.data();
    p.strides = strides.data();
  }
  if (pick(1)) p.limits = limits.data();
  std::vector<A> boxes(p.batch * p.kept * 4);
  std::vector<T> selected(p.batch * p.kept);
  std::vector<std::int64_t> anchor_index(p.batch * p.kept), classes_of(p.batch * p.kept);
  p.boxes = boxes.data();
  p.logits = selected.data();
  p.anchor_index = anchor_index.data();
  p.classes_of = classes_of.data();
  if (effdet::decode_topk(p, 1 + static_cast<int>(pick(3))) != effdet::kOk) return false;

  for (std::int64_t image = 0; image < p.batch; ++image) {
    std::vector<std::tuple<double, std::int64_t, double>> expected;  // less the key, place, logit
    for (std::size_t l = 0; l < p.levels.size(); ++l) {
      const effdet::TopkLevel& level = p.levels[l];
      const std::int64_t channels = p.anchors * p.classes;
      for (std::int64_t pixel = 0; pixel < level.pixels(); ++pixel)
        for (std::int64_t c = 0; c < channels; ++c) {
          const std::int64_t at = level.logits_planar ? c * level.pixels() + pixel : pixel * channels + c;
          const double x = wide(logits[l][image * level.pixels() * channels + at]);
          const double key = std::isnan(x) ? std::numeric_limits<double>::infinity() : x;
          expected.emplace_back(-key, static_cast<std::int64_t>(expected.size()), x);
        }
    }
    std::partial_sort(expected.begin(), expected.begin() + p.kept, expected.end(), [](const auto& a, const auto& b) {
      return std::tie(std::get<0>(a), std::get<1>(a)) < std::tie(std::get<0>(b), std::get<1>(b));
    });
    for (std::int64_t i = 0; i < p.kept; ++i) {
      const std::int64_t to = image * p.kept + i;
      const double given = wide(selected[to]), logit = std::get<2>(expected[i]);
      if (anchor_index[to] * p.classes + classes_of[to] != std::get<1>(expected[i])) return false;
      if (std::isnan(logit) ? !std::isnan(given) : given != logit || std::signbit(given) != std::signbit(logit))
        return false;
    }
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937_64 random(1);
  const int problems = std::atoi(arguments[1]);
  for (int i = 0; i < problems; ++i) {
    const bool right = i % 3 == 0   ? run<float, float>(random, effdet::kFloat32)
                       : i % 3 == 1 ? run<double, double>(random, effdet::kFloat64)
                                    : run<BFloat16, float>(random, effdet::kBFloat16);
    if (!right) {
      std::printf("problem %d: wrong output\n", i);
      return 1;
    }
  }
  std::puts("ok");
}
