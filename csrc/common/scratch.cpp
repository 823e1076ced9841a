#include "common/scratch.h"

#include <cstdlib>

namespace effdet {
namespace {

struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffer;

}  // namespace

void* thread_scratch(std::size_t bytes) {
  if (bytes > buffer.size) {
    std::free(buffer.data);
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    buffer.size = buffer.data ? rounded : 0;
  }
  return buffer.data;
}

}  // namespace effdet
