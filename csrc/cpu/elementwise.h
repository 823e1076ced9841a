// What torch does between our kernels in a training step, to the bit, for plans that have both as one list: sums of
// maps, running statistics, transposed weights.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

enum Elementwise : int { kAdded = 0, kScaled = 1, kBetween = 2 };  // a + factor b; factor a; a + factor (b - a)

// out, a [outer, middle, inner], dense; b [outer, middle, inner] of any strides but the last, which is 1.
struct ElementwiseParams {
  const void* a;
  const void* b;  // null for kScaled
  void* out;      // may be a
  std::int64_t outer, middle, inner, b_outer_stride, b_middle_stride;
  double factor;
  int dtype, kind;

  template <typename F>
  void pointers(F&& f) {
    f(a), f(b), f(out);
  }
};

// out [columns, rows] = x [rows, columns], both dense.
struct TransposeParams {
  const void* x;
  void* out;
  std::int64_t rows, columns;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(x), f(out);
  }
};

// Adds `by` to a counter.
struct CountParams {
  std::int64_t* value;
  std::int64_t by;

  template <typename F>
  void pointers(F&& f) {
    f(value);
  }
};

EFFDET_PER_ISA(Status, elementwise, (const ElementwiseParams&, int threads))
EFFDET_PER_ISA(Status, transpose, (const TransposeParams&, int threads))
inline Status count(const CountParams& p, int) {
  *p.value += p.by;
  return kOk;
}

}  // namespace effdet
