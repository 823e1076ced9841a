#include "separable_conv/cuda_kernel.h"

namespace effdet::cuda {

int separable_conv_fused(const FusedSeparableParams& p, void* stream) {
  return launch_separable(p.rest, p.maps, stream);
}

}  // namespace effdet::cuda
