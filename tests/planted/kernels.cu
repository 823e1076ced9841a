// Kernels with a bug each, that the emulator, its sanitizers or a second order of visits must show; and a right one.
// All: out[i] = the sum of the 64 numbers of block i, in = [blocks, 64].
#include <pybind11/pybind11.h>

#include <string>

#include "cuda/memory.h"

namespace effdet::cuda {
namespace {

constexpr int kThreads = 64;

enum Bug {
  kNone,
  kNoBarrier,          // reads what another warp has not written yet
  kNoSyncwarp,         // the same within a warp
  kUnwrittenShared,    // reads shared memory that nothing wrote
  kUnwrittenRegister,  // adds to a number that has no first value
  kNoWait,             // reads what an asynchronous copy has not brought yet
  kLeftCopy,           // ends before its copies
  kDivergentBarrier,   // half of the block goes to another barrier
  kMissedBarrier,      // a thread ends before it
  kDivergentWarp,      // half of a warp goes to another warp operation
  kPastShared,         // reads past an array in shared memory
  kTooMuchShared,      // takes more than the launch has
  kPastEnd,            // writes past its output
  kMisaligned,         // a vector at an address that is none
  kBlockOrder,         // the block that comes last wins
  kBugs
};

const char* const kNames[kBugs] = {
    "none",        "no_barrier",      "no_syncwarp",       "unwritten_shared", "unwritten_register",
    "no_wait",     "left_copy",       "divergent_barrier", "missed_barrier",   "divergent_warp",
    "past_shared", "too_much_shared", "past_end",          "misaligned",       "block_order"};

template <int kBug>
__global__ void planted_kernel(const float* in, float* out) {
  const int i = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  Shared shared;
  float* const values = shared.take<float>(kThreads);
  float* const parts = shared.take<float>(2);
  if (kBug == kTooMuchShared) shared.take<float>(1)[0] = 0.0f;
  const float* const mine = in + block * kThreads;
  if (kBug == kNoWait || kBug == kLeftCopy) {
    if (i % 4 == 0) begin_copy16(values + i, mine + i, true);
    end_copies();
    if (kBug == kLeftCopy) return;
  } else if (kBug != kUnwrittenShared || i != 5) {
    values[i] = mine[i];
  }
  if (kBug == kMisaligned) values[i] = load<float4>(mine + i).x;
  if (kBug == kMissedBarrier && i == 63) return;
  if (kBug == kDivergentBarrier && i < 32) {
    __syncthreads();
  } else if (kBug != kNoBarrier) {
    __syncthreads();
  }
  // Sums across the warps: thread i < 32 adds both halves.
  float sum = kBug == kPastShared && i == 0 ? values[kThreads] : 0.0f;
  if (kBug == kUnwrittenRegister) {
    float unwritten;
    sum += *static_cast<volatile float*>(&unwritten);
  }
  if (i < 32) {
    sum += values[i] + values[i + 32];
    if (kBug == kDivergentWarp && i < 16) {
      sum += __shfl_xor_sync(kAll, sum, 16);
    } else if (kBug == kNoSyncwarp) {
      values[i] = sum;
      sum = 0.0f;
      for (int k = 0; k < 32; ++k) sum += values[k];
    } else {
      sum += __shfl_xor_sync(kAll, sum, 16);
    }
    if (kBug != kNoSyncwarp)
      for (int bits = 8; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
    if (i == 0) parts[0] = sum;
  }
  if (kBug == kNoWait) wait_for_copies<0>();
  __syncthreads();
  if (i == 32) out[kBug == kBlockOrder ? 0 : kBug == kPastEnd ? block + 1000 : block] = parts[0];
}

template <int kBug>
void run_one(int wanted, const float* in, float* out, int blocks) {
  if (wanted == kBug)
    emu::run(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 4 * kThreads + 16,
             [=] { planted_kernel<kBug>(in, out); });
  if constexpr (kBug + 1 < kBugs) run_one<kBug + 1>(wanted, in, out, blocks);
}

void run_planted(const std::string& bug, std::uintptr_t in, std::uintptr_t out, int blocks, std::uint64_t order) {
  emu::order = order;
  for (int i = 0; i < kBugs; ++i)
    if (bug == kNames[i])
      return run_one<0>(i, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), blocks);
  throw std::invalid_argument("bug: no such one");
}

}  // namespace
}  // namespace effdet::cuda

PYBIND11_MODULE(_planted, module) {
  module.def("run", &effdet::cuda::run_planted);
  pybind11::list names;
  for (const char* name : effdet::cuda::kNames) names.append(name);
  module.attr("BUGS") = names;
}
