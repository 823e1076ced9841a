#include "cpu/elementwise.h"

#include "common/parallel_for.h"
#include "cpu/simd.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

constexpr int64_t kShare = 16 * 1024;  // elements of a work item

// `count` elements of a row; as torch computes them.
template <typename T>
void row(const ElementwiseParams& p, const T* a, const T* b, T* out, int64_t count) {
  using V = Vec<Acc<T>>;
  const Acc<T> factor = static_cast<Acc<T>>(p.factor);
  const bool near = p.factor < 0.5 && p.factor > -0.5;
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t n = count - i;
    const V left = load_n(a + i, n);
    if (p.kind == kScaled) {
      store_n(out + i, left * factor, n);
      continue;
    }
    const V right = load_n(b + i, n);
    if (p.kind == kAdded) {
      store_n(out + i, left + factor * right, n);
    } else {
      store_n(out + i, near ? left + factor * (right - left) : right + (factor - Acc<T>(1)) * (right - left), n);
    }
  }
}

template <typename T>
Status run(const ElementwiseParams& p, int threads) {
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  T* out = static_cast<T*>(p.out);
  const int64_t total = p.outer * p.middle * p.inner;
  const bool dense = !b || (p.b_middle_stride == p.inner && p.b_outer_stride == p.middle * p.inner);
  if (dense) {
    parallel_for(divide_up(total, kShare), threads, [&](int64_t share) {
      const int64_t begin = share * kShare;
      row<T>(p, a + begin, b ? b + begin : nullptr, out + begin, least(kShare, total - begin));
    });
    return kOk;
  }
  const int64_t rows = p.outer * p.middle, step = most<int64_t>(1, kShare / p.inner);
  parallel_for(divide_up(rows, step), threads, [&](int64_t share) {
    for (int64_t r = share * step; r < least((share + 1) * step, rows); ++r)
      row<T>(p, a + r * p.inner, b + r / p.middle * p.b_outer_stride + r % p.middle * p.b_middle_stride,
             out + r * p.inner, p.inner);
  });
  return kOk;
}

template <typename T>
Status transposed(const TransposeParams& p, int threads) {
  constexpr int64_t kSide = 16;
  const T* x = static_cast<const T*>(p.x);
  T* out = static_cast<T*>(p.out);
  parallel_for(divide_up(p.rows, kSide), p.rows * p.columns < kShare ? 1 : threads, [&](int64_t block) {
    const int64_t begin = block * kSide, end = least(begin + kSide, p.rows);
    for (int64_t first = 0; first < p.columns; first += kSide)
      for (int64_t c = first; c < least(first + kSide, p.columns); ++c)
        for (int64_t r = begin; r < end; ++r) out[c * p.rows + r] = x[r * p.columns + c];
  });
  return kOk;
}

}  // namespace

Status elementwise(const ElementwiseParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

Status transpose(const TransposeParams& p, int threads) {
  if (p.dtype == kFloat32) return transposed<float>(p, threads);
  if (p.dtype == kFloat64) return transposed<double>(p, threads);
  if (p.dtype == kBFloat16) return transposed<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
