// Loops over OpenMP threads: the pool is torch's, the thread count is torch's, given by the caller. Built without
// OpenMP, they run on the thread that calls them.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>

namespace effdet {

#ifdef _OPENMP
// Calls body(i) for i in [0, count) on a team of threads, at least two of each.
//
// Every thread has a share of consecutive items and takes them in order; then it takes what is left of the others'.
// So work of unequal size balances, and a map's pixels are mostly written and then read by the same core, whose caches
// another may be far from.
template <typename Body>
void on_team(std::int64_t count, int team, const Body& body) {
  constexpr int kMostShares = 64;
  struct alignas(64) Share {
    std::int64_t next, end;
  };
  const int parts = team < kMostShares ? team : kMostShares;
  Share shares[kMostShares];
  for (int p = 0; p < parts; ++p) shares[p] = {count * p / parts, count * (p + 1) / parts};
#pragma omp parallel num_threads(team)
  {
    const int own = omp_get_thread_num();  // the team may be smaller than asked for
    for (int turn = 0; turn < parts; ++turn) {
      Share& share = shares[(own + turn) % parts];
      for (;;) {
        const std::int64_t i = __atomic_fetch_add(&share.next, std::int64_t{1}, __ATOMIC_RELAXED);
        if (i >= share.end) break;
        body(i);
      }
    }
  }
}
#endif

// Calls body(i) for i in [0, count), each i once, on up to `threads` threads.
template <typename Body>
void parallel_for(std::int64_t count, [[maybe_unused]] int threads, const Body& body) {
#ifdef _OPENMP
  const int team = count < threads ? static_cast<int>(count) : threads;
  if (team > 1) return on_team(count, team, body);
#endif
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace effdet
