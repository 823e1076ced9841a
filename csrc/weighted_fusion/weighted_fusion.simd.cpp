// Weighted fusion of up to three maps, a block of rows to a work item.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/fusion.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

template <typename T>
Status run(const WeightedFusionParams& p, int threads) {
  using A = Acc<T>;
  const int64_t width = round_up(p.channels, kLanes<T>);
  const int64_t columns = least(p.width, most<int64_t>(1, 16 * 1024 / (width * static_cast<int64_t>(sizeof(A)))));
  int status = kOk;
  parallel_for(p.batch * p.height, threads, [&](int64_t item) {
    A* row = static_cast<A*>(thread_scratch(sizeof(A) * columns * width));
    if (!row) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    const int64_t h = item % p.height, image = item / p.height;
    for (int64_t first = 0; first < p.width; first += columns) {
      const int64_t count = least(columns, p.width - first);
      fuse_row<T>(p.x, p.fusion, p.act, image, p.channels, h, p.height, p.width, first, count, row);
      T* y = static_cast<T*>(p.y) + (item * p.width + first) * p.channels;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < p.channels; c += kLanes<T>)
          store_n(y + i * p.channels + c, load(row + i * width + c), p.channels - c);
    }
  });
  return static_cast<Status>(status);
}

}  // namespace

Status weighted_fusion(const WeightedFusionParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
