// Loops over OpenMP threads: the pool is torch's, the thread count is torch's, given by the caller.
#pragma once

#include <cstdint>

namespace effdet {

// Calls body(i) for i in [0, count), each i once, on up to `threads` threads; work of unequal size balances.
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace effdet
