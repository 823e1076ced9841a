// Runs soft_nms_cpu on random problems, awkward values included, in buffers of exactly the right size: built with
// AddressSanitizer and UndefinedBehaviorSanitizer, it ends with an error at the first stray access.
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "soft_nms/params.h"

namespace {

template <typename T>
bool run(std::mt19937_64& random) {
  const auto pick = [&](std::int64_t most) { return static_cast<std::int64_t>(random() % (most + 1)); };
  const auto uniform = [&](double low, double high) {
    return static_cast<T>(std::uniform_real_distribution<double>(low, high)(random));
  };
  const T awkward[] = {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                       -std::numeric_limits<T>::infinity(), std::numeric_limits<T>::max(), T(0)};
  effdet::SoftNmsParams<T> p{};
  p.batch = pick(3);
  p.count = pick(60);
  p.max_det = pick(70);
  p.method = static_cast<effdet::Method>(pick(2));
  p.sigma = uniform(0.01, 1);
  p.iou_threshold = uniform(0, 1);
  p.score_threshold = pick(3) ? uniform(0, 0.5) : -std::numeric_limits<T>::infinity();
  std::vector<T> boxes(p.batch * p.count * 4), scores(p.batch * p.count);
  std::vector<std::int64_t> classes(p.batch * p.count), num_valid(p.batch);
  for (T& v : boxes) v = pick(40) ? uniform(0, 50) : awkward[pick(4)];
  for (T& v : scores) v = pick(40) ? uniform(0, 1) : awkward[pick(4)];
  for (std::int64_t& v : classes) v = pick(3) ? pick(4) : static_cast<std::int64_t>(random());
  for (std::int64_t& v : num_valid) v = pick(80) - 10;
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
  if (!effdet::soft_nms_cpu(p, 1 + static_cast<int>(pick(2)))) return false;
  for (std::int64_t image = 0; image < p.batch; ++image) {
    if (found[image] < 0 || found[image] > p.max_det || dropped[image] < 0) return false;
    for (std::int64_t i = 0; i < p.max_det; ++i) {
      const std::int64_t picked = index[image * p.max_det + i];
      if (i < found[image] ? picked < 0 || picked >= p.count : picked != -1) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937_64 random(1);
  for (int i = 0; i < 4000; ++i) {
    if (!run<float>(random) || !run<double>(random)) {
      std::printf("problem %d: wrong output\n", i);
      return 1;
    }
  }
  std::puts("ok");
}
