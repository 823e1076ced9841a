// The product of a warp on 16-bit numbers: mma.sync.m16n8k16, and ldmatrix, which loads its operands.
#pragma once

#include <type_traits>

#include "cuda/memory.h"
#include "cuda/number.h"

namespace effdet::cuda {

// Operands as the instruction spreads them over a warp; with g = lane / 4 and t = lane % 4, pairs in 32 bits:
//   A [16, 16]: word 0 = A[g, 2t..], 1 = A[g + 8, 2t..], 2 = A[g, 2t + 8..], 3 = A[g + 8, 2t + 8..]
//   B [16, 8]:  word 0 = B[2t.., g], 1 = B[2t + 8.., g]
//   C [16, 8]:  0, 1 = C[g, 2t..], 2, 3 = C[g + 8, 2t..]
struct LeftOperand {
  unsigned words[4];
};
struct RightOperand {
  unsigned words[2];
};
struct Products {
  float values[4];
};

// sum += left @ right, in float32.
template <typename T>
__device__ __forceinline__ void multiply_add(Products& sum, const LeftOperand& left,
                                             const RightOperand& right EFFDET_CALLER) {
#ifndef EFFDET_EMULATED
  float (&c)[4] = sum.values;
  const unsigned (&a)[4] = left.words;
  const unsigned (&b)[2] = right.words;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  struct Mine {
    float2 left[4], right[2];
  } mine;
  for (int i = 0; i < 4; ++i) mine.left[i] = widen_pair<T>(left.words[i]);
  for (int i = 0; i < 2; ++i) mine.right[i] = widen_pair<T>(right.words[i]);
  const auto lanes = emu::exchange(mine, "multiply_add", where);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int row = 0; row < 2; ++row) {
    for (int column = 0; column < 2; ++column) {
      float& value = sum.values[2 * row + column];
      for (int part = 0; part < 2; ++part) {  // of K
        for (int source = 0; source < 4; ++source) {
          const float2 a = lanes.at(4 * g + source).left[2 * part + row];
          const float2 b = lanes.at(4 * (2 * t + column) + source).right[part];
          value += a.x * b.x;
          value += a.y * b.y;
        }
      }
    }
  }
#endif
}

// The product of half the depth, mma.sync.m16n8k8: words 0 and 1 of a left operand, word 0 of a right one.
template <typename T>
__device__ __forceinline__ void multiply_add(Products& sum, unsigned upper, unsigned lower,
                                             unsigned right EFFDET_CALLER) {
#ifndef EFFDET_EMULATED
  float (&c)[4] = sum.values;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(upper), "r"(lower), "r"(right));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(upper), "r"(lower), "r"(right));
  }
#else
  struct Mine {
    unsigned upper, lower, right;
  };
  const auto lanes = emu::exchange(Mine{upper, lower, right}, "multiply_add", where);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int source = 0; source < 4; ++source) {
    const Mine of_row = lanes[4 * g + source];
    const float2 above = widen_pair<T>(of_row.upper), below = widen_pair<T>(of_row.lower);
    for (int half = 0; half < 2; ++half) {
      const float2 column = widen_pair<T>(lanes[4 * (2 * t + half) + source].right);
      sum.values[half] += above.x * column.x;
      sum.values[half] += above.y * column.y;
      sum.values[2 + half] += below.x * column.x;
      sum.values[2 + half] += below.y * column.y;
    }
  }
#endif
}

// Four matrices [8, 8] of 16-bit numbers, of which lane l gives the address of row l % 8 of matrix l / 8, 16 bytes in
// shared memory. Word i of a thread is the pair [g, 2t..] of matrix i, with kTransposed [2t.., g].
template <bool kTransposed>
__device__ __forceinline__ LeftOperand load_matrices(const void* row EFFDET_CALLER) {
  LeftOperand found;
#ifndef EFFDET_EMULATED
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  unsigned (&w)[4] = found.words;
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
  }
#else
  emu::check_aligned(row, 16, where);
  struct Row {
    std::uint16_t values[8];
  };
  Row mine;
  std::memcpy(&mine, row, 16);
  const auto rows = emu::exchange(mine, "load_matrices", where);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned pair[2];
    for (int i = 0; i < 2; ++i)
      pair[i] = kTransposed ? rows[8 * matrix + 2 * t + i].values[g] : rows[8 * matrix + g].values[2 * t + i];
    found.words[matrix] = pair[0] | pair[1] << 16;
  }
#endif
  return found;
}

}  // namespace effdet::cuda
