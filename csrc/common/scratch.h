// Memory of the calling thread, kept and reused from call to call: kernels allocate nothing in steady state.
#pragma once

#include <cstddef>

namespace effdet {

// At least `bytes`, 64-byte aligned, uninitialised, valid until this thread asks again; null when memory ran out.
void* thread_scratch(std::size_t bytes);

}  // namespace effdet
