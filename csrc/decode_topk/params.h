// Arguments of the CUDA kernels of decode_topk, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/decode_topk.
#pragma once

#include <cstdint>

namespace effdet::cuda {

constexpr int kMostLevels = 16;
constexpr int kMostPicks = 8192;  // of an image

// One level of all images: dense, channels inside.
struct DecodeLevel {
  const void* logits;  // [batch, length]
  const void* codes;   // [batch, length / classes, 4], as (ty, tx, th, tw)
  int length;          // logits of an image
  int width;           // locations of a row
};

struct DecodeTopkParams {
  DecodeLevel levels[kMostLevels];
  const float* anchors;        // [all levels' length / classes, 4], xyxy; with strides [levels, per_location, 4]
  const float* strides;        // [levels, 2], (x, y); or null: all anchors are given, not the first location's
  const float* limits;         // [batch, 2], or null: boxes are not clipped
  void* scratch;               // 16-byte aligned
  std::int64_t scratch_bytes;  // at least decode_topk_scratch's
  float* boxes;                // [batch, kept, 4]
  void* logits;                // [batch, kept]
  std::int64_t* anchor_index;  // [batch, kept]
  std::int64_t* classes_of;    // [batch, kept]
  std::int64_t batch;
  int level_count, per_location, classes, kept;
  int room;  // candidates that are collected before the worst are dropped, more than `kept`; 0: what there is memory
             // for
  int dtype;
};

std::int64_t decode_topk_scratch(const DecodeTopkParams& params);

int decode_topk(const DecodeTopkParams& params, void* stream);

}  // namespace effdet::cuda
