// Runs soft_nms_cpu on random problems, awkward values included, in buffers of exactly the right size, and replays its
// picks with the plainest arithmetic. Built with AddressSanitizer and UndefinedBehaviorSanitizer, it ends with an error
// at the first stray access. The argument: how many problems.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "soft_nms/params.h"

namespace {

using effdet::Method;
using effdet::SoftNmsParams;

template <typename T>
constexpr T kGone = -std::numeric_limits<T>::infinity();

template <typename T>
T overlap_of(const T* a, const T* b) {
  const T w = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]), T(0));
  const T h = std::max(std::min(a[3], b[3]) - std::max(a[1], b[1]), T(0));
  const T intersection = w * h;
  const T total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection;
  return total > T(0) ? intersection / total : T(0);
}

template <typename T>
T factor_of(T overlap, const SoftNmsParams<T>& p) {
  if (p.method == Method::kGaussian) return std::exp(-(overlap * overlap) / p.sigma);
  if (!(overlap > p.iou_threshold)) return T(1);
  return p.method == Method::kLinear ? T(1) - overlap : T(0);
}

// Whether each pick of an image is a best candidate, with its score. Linear and hard are exact; the exponential is
// rounded in another way, which grows from pick to pick.
template <typename T>
bool replay(const SoftNmsParams<T>& p, std::int64_t image) {
  const T* boxes = p.boxes + image * p.count * 4;
  std::vector<T> score(p.scores + image * p.count, p.scores + (image + 1) * p.count);
  const std::int64_t* classes = p.classes ? p.classes + image * p.count : nullptr;
  const auto class_of = [&](std::int64_t i) { return classes ? classes[i] : 0; };
  std::int64_t dropped = 0;
  const std::int64_t limit = p.num_valid ? std::clamp<std::int64_t>(p.num_valid[image], 0, p.count) : p.count;
  for (std::int64_t i = 0; i < p.count; ++i) {
    bool finite = std::isfinite(score[i]);
    for (int side = 0; side < 4; ++side) finite = finite && std::isfinite(boxes[4 * i + side]);
    dropped += i < limit && !finite;
    if (i >= limit || !finite || !(score[i] > p.score_threshold)) score[i] = kGone<T>;
  }
  const std::int64_t found = p.found[image];
  if (p.dropped[image] != dropped || found < 0 || found > p.max_det) return false;
  const T unit = p.method == Method::kGaussian ? (8 + 8 / p.sigma) * std::numeric_limits<T>::epsilon() : T(0);
  const auto threshold = [&p](T share) {
    return std::isfinite(p.score_threshold) ? p.score_threshold + share * std::abs(p.score_threshold) : kGone<T>;
  };
  T slack = 0;
  std::map<std::int64_t, std::int64_t> picks;
  for (std::int64_t step = 0; step < p.max_det; ++step) {
    const std::int64_t pick = p.index[image * p.max_det + step];
    const T given = p.score[image * p.max_det + step];
    if (step >= found) {
      if (pick != -1 || given != T(0)) return false;
      continue;
    }
    if (std::abs(given - score[pick]) > slack * std::abs(score[pick])) return false;
    if (std::abs(given - score[pick]) > slack * std::abs(score[pick])) return false;
    for (std::int64_t i = 0; i < p.count; ++i) {
      if (score[i] - score[pick] > slack * std::abs(score[i])) return false;
      if (slack == T(0) && i < pick && score[i] == score[pick]) return false;
    }
    const bool last = ++picks[class_of(pick)] == p.max_per_class;
    score[pick] = kGone<T>;
    slack += unit;
    for (std::int64_t i = 0; i < p.count; ++i) {
      if (score[i] == kGone<T> || class_of(i) != class_of(pick)) continue;
      const T factor = factor_of(overlap_of(boxes + 4 * pick, boxes + 4 * i), p);
      const T decayed = score[i] * factor;
      // One at the threshold may be gone or not: it stays here, and may be picked or not.
      score[i] = !last && factor != T(0) && decayed > threshold(-slack) ? decayed : kGone<T>;
    }
  }
  const T highest = p.count ? *std::max_element(score.begin(), score.end()) : kGone<T>;
  return found == p.max_det || !(highest > threshold(slack));
}

template <typename T>
bool run(std::mt19937_64& random) {
  const auto pick = [&](std::int64_t most) { return static_cast<std::int64_t>(random() % (most + 1)); };
  const auto uniform = [&](double low, double high) {
    return static_cast<T>(std::uniform_real_distribution<double>(low, high)(random));
  };
  const T awkward[] = {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                       -std::numeric_limits<T>::infinity(), std::numeric_limits<T>::max(), T(0)};
  SoftNmsParams<T> p{};
  p.batch = pick(3);
  p.count = pick(pick(1) ? 300 : 40);
  p.max_det = pick(pick(3) ? p.count + 20 : 8);
  p.max_per_class = pick(2) ? 0 : 1 + pick(9);
  p.method = static_cast<Method>(pick(2));
  p.sigma = uniform(0, 1) < 0.1 ? T(0.002) : uniform(0.01, 1);
  p.iou_threshold = uniform(0, 1);
  p.score_threshold = pick(3) ? uniform(0, 0.5) : -std::numeric_limits<T>::infinity();
  const T lowest = pick(3) ? T(0) : T(-1);
  const std::int64_t levels = pick(2) ? 1 << 20 : 5;  // few: equal scores
  const std::int64_t names = pick(1) ? 4 : 60;
  const double extent = pick(1) ? 50 : 300;
  const std::int64_t rare = pick(1) ? 40 : 100000;
  std::vector<T> boxes(p.batch * p.count * 4), scores(p.batch * p.count);
  std::vector<std::int64_t> classes(p.batch * p.count), num_valid(p.batch);
  for (std::int64_t i = 0; i < p.batch * p.count; ++i) {
    T* box = boxes.data() + 4 * i;
    if (i > 0 && pick(9) == 0) {
      std::copy(box - 4, box, box);
      continue;
    }
    for (int side = 0; side < 2; ++side) {
      box[side] = uniform(0, extent);
      box[side + 2] = box[side] + uniform(pick(9) ? 1 : -9, 60);
      if (!pick(19)) box[side + 2] = box[side];
    }
    if (!pick(rare)) box[pick(3)] = awkward[pick(4)];
  }
  for (T& v : scores) v = pick(rare) ? lowest + T(pick(levels)) / T(levels) * (1 - lowest) : awkward[pick(4)];
  const bool wild = !pick(3);
  for (std::int64_t& v : classes) v = wild && !pick(3) ? static_cast<std::int64_t>(random()) : pick(names);
  for (std::int64_t& v : num_valid) v = pick(p.count + 20) - 10;
  if (!pick(3))
    for (std::int64_t image = 0; image < p.batch; ++image)
      std::sort(scores.begin() + image * p.count, scores.begin() + (image + 1) * p.count,
                [](T a, T b) { return std::isnan(b) ? !std::isnan(a) : a > b; });
  std::vector<std::int64_t> index(p.batch * p.max_det, 99), found(p.batch, 99), dropped(p.batch, 99);
  std::vector<T> score(p.batch * p.max_det, T(99));
  p.boxes = boxes.data();
  p.scores = scores.data();
  p.classes = pick(3) ? classes.data() : nullptr;
  p.num_valid = pick(1) ? num_valid.data() : nullptr;
  p.index = index.data();
  p.score = score.data();
  p.found = found.data();
  p.dropped = dropped.data();
  if (effdet::soft_nms_cpu(p, 1 + static_cast<int>(pick(2))) != effdet::kOk) return false;
  for (std::int64_t image = 0; image < p.batch; ++image)
    if (!replay(p, image)) return false;
  return true;
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937_64 random(1);
  const int problems = std::atoi(arguments[1]);
  for (int i = 0; i < problems; ++i) {
    if (!(i % 2 ? run<float>(random) : run<double>(random))) {
      std::printf("problem %d: wrong output\n", i);
      return 1;
    }
  }
  std::puts("ok");
}
