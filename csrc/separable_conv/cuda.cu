#include "separable_conv/cuda_kernel.h"

namespace effdet::cuda {

int separable_warps(int dtype, int rows) {
  if (dtype == kFloat32) return rows == 4 || rows == 2 || rows == 1 ? rows : 0;
  return rows == 8 || rows == 4 ? 4 : rows == 2 ? 2 : 0;
}

int separable_conv(const SeparableParams& p, void* stream) {
  return launch_separable(p, NotFused{}, stream);
}

}  // namespace effdet::cuda
