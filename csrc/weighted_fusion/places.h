// How the kernels of weighted_fusion, forward and backward, divide a map among threads: a vector of channels, a column,
// some rows; and their rows of a max-pool.
#pragma once

#include "cuda/fusion.h"
#include "cuda/launch.h"

namespace effdet::cuda {

constexpr int kThreads = 128;

struct Place {
  std::int64_t image;
  int row, rows, column, channel;  // the first row, and how many
  bool works;
};

// Places of an image: `height` x `width` pixels of `vectors`, cut into strips of `rows`.
struct Places {
  int height, width, vectors, rows, blocks;  // of an image

  Places(int height, int width, int vectors, int rows)
      : height(height), width(width), vectors(vectors), rows(rows), blocks(0) {
    const std::int64_t threads = std::int64_t{1} * divided(height, rows) * width * vectors;
    if (threads < kMostBlocks - kThreads) blocks = static_cast<int>(divided(threads, std::int64_t{kThreads}));
  }

  // Of `batch` images; too many where one is too large.
  Grid grid(std::int64_t batch) const { return {blocks ? batch * blocks : kMostBlocks + 1, kThreads, 0}; }

  template <typename T>
  __device__ __forceinline__ Place of_thread() const {
    const unsigned block = blockIdx.x, count = static_cast<unsigned>(blocks);
    const unsigned item = block % count * kThreads + threadIdx.x;
    const unsigned pixel = item / static_cast<unsigned>(vectors), strip = pixel / static_cast<unsigned>(width);
    Place place;
    place.image = block / count;
    place.channel = static_cast<int>(item - pixel * static_cast<unsigned>(vectors)) * kVector<T>;
    place.column = static_cast<int>(pixel - strip * static_cast<unsigned>(width));
    place.row = static_cast<int>(strip) * rows;
    place.rows = min(rows, height - place.row);
    place.works = place.row < height;
    return place;
  }
};

// The three columns of a window, in elements from the first.
struct WindowColumns {
  std::int64_t at[3];
  __device__ __forceinline__ WindowColumns(const FusedMaps& maps, const Map& map, int column) {
    EFFDET_UNROLL
    for (int j = 0; j < 3; ++j) at[j] = inside(2 * column - maps.pool_left + j, map.width) * map.pixel_stride;
  }
};

// Their pixels in a row, which may be outside: then in the nearest.
struct WindowRow {
  uint4 pixels[3];
  template <typename T>
  __device__ __forceinline__ void read(const Map& map, const WindowColumns& columns, const T* x, int row) {
    const T* const first = x + inside(row, map.height) * map.row_stride;
    EFFDET_UNROLL
    for (int j = 0; j < 3; ++j) pixels[j] = load<uint4>(first + columns.at[j]);
  }
  template <typename T>
  __device__ __forceinline__ uint4 largest() const {
    return larger<T>(larger<T>(pixels[0], pixels[1]), pixels[2]);
  }
};

}  // namespace effdet::cuda
