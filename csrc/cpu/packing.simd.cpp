#include "cpu/packing.h"

#include <type_traits>

#include "common/parallel_for.h"
#include "cpu/gemm.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

template <typename T>
EFFDET_INLINE T weight_at(const WeightParams& p, int64_t o, int64_t c, int64_t i, int64_t j) {
  return static_cast<const T*>(p.weight)[o * p.out_stride + c * p.in_stride + i * p.row_stride + j * p.column_stride];
}

template <typename T>
Status dense(const WeightParams& p, int threads) {
  using Element = std::conditional_t<kPairs<T>, T, Acc<T>>;
  const Panels panels(vectors_of<T>(p.out));
  const int64_t length = p.columns * p.in, padded = packed_length<T>(length);
  constexpr int kGroup = kPairs<T> ? 2 : 1;
  const T* weight = static_cast<const T*>(p.weight);
  // Panels of a small weight are not worth a parallel region.
  const int shared = p.out * p.rows * length < 16384 ? 1 : threads;
  parallel_for(panels.count, shared, [&](int64_t panel) {
    const int64_t begin = panels.start(panel) * kLanes<T>, end = panels.start(panel + 1) * kLanes<T>;
    Element* to = static_cast<Element*>(p.packed) + begin * p.rows * padded;
    for (int64_t i = 0; i < p.rows; ++i) {
      for (int64_t k = 0; k < padded; k += kGroup) {
        const T* from[kGroup];
        for (int g = 0; g < kGroup; ++g)
          from[g] = k + g < length
                        ? weight + i * p.row_stride + (k + g) / p.in * p.column_stride + (k + g) % p.in * p.in_stride
                        : nullptr;
        if constexpr (!kPairs<T>) {
          if (p.out_stride == 1) {
            for (int64_t o = begin; o < end; o += kLanes<T>, to += kLanes<T>) store(to, load_n(from[0] + o, p.out - o));
            continue;
          }
        }
        for (int64_t o = begin; o < end; ++o) {
          for (int g = 0; g < kGroup; ++g) {
            const bool inside = o < p.out && from[g];
            if constexpr (kPairs<T>) {
              *to++ = inside ? from[g][o * p.out_stride] : T{};
            } else {
              *to++ = inside ? widen(from[g][o * p.out_stride]) : Element(0);
            }
          }
        }
      }
    }
  });
  return kOk;
}

template <typename T>
Status depthwise(const WeightParams& p) {
  auto* to = static_cast<Acc<T>*>(p.packed);
  for (int64_t v = 0; v < vectors_of<T>(p.out); ++v)
    for (int64_t i = 0; i < p.rows; ++i)
      for (int64_t j = 0; j < p.columns; ++j)
        for (int64_t c = v * kLanes<T>; c < (v + 1) * kLanes<T>; ++c)
          *to++ = c < p.out ? widen(weight_at<T>(p, c, 0, i, j)) : Acc<T>(0);
  return kOk;
}

template <typename A>
Status vector(const VectorParams& p) {
  const auto* from = static_cast<const A*>(p.vector);
  auto* to = static_cast<A*>(p.packed);
  const int64_t padded = round_up(p.count, kLanes<A>);
  for (int64_t i = 0; i < padded; ++i) to[i] = i < p.count ? from[i * p.stride] : A(0);
  return kOk;
}

}  // namespace

std::int64_t packed_dense_bytes(int dtype, std::int64_t out, std::int64_t segments, std::int64_t length) {
  if (dtype == kFloat64) return vectors_of<double>(out) * segments * length * kPackedBytes<double>;
  if (dtype == kFloat32) return vectors_of<float>(out) * segments * length * kPackedBytes<float>;
  return vectors_of<BFloat16>(out) * segments * packed_length<BFloat16>(length) * kPackedBytes<BFloat16>;
}

std::int64_t packed_depthwise_bytes(int dtype, std::int64_t channels, std::int64_t taps) {
  return (dtype == kFloat64 ? vectors_of<double>(channels) : vectors_of<float>(channels)) * taps * kVectorBytes;
}

Status pack_dense(const WeightParams& p, int threads) {
  if (p.dtype == kFloat32) return dense<float>(p, threads);
  if (p.dtype == kFloat64) return dense<double>(p, threads);
  if (p.dtype == kBFloat16) return dense<BFloat16>(p, threads);
  return kBadDtype;
}

Status pack_depthwise(const WeightParams& p, int) {
  if (p.dtype == kFloat32) return depthwise<float>(p);
  if (p.dtype == kFloat64) return depthwise<double>(p);
  if (p.dtype == kBFloat16) return depthwise<BFloat16>(p);
  return kBadDtype;
}

Status pack_vector(const VectorParams& p, int) {
  return p.dtype == kFloat64 ? vector<double>(p) : vector<float>(p);
}

}  // namespace EFFDET_ISA
}  // namespace effdet
