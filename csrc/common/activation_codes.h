// The activations that kernels know, in the order of effdet_kernels/_native.py's ACTIVATIONS.
#pragma once

namespace effdet {

enum Activation : int { kNone, kSwish, kRelu, kRelu6, kHardSwish, kLeakyRelu, kMish, kActivations };

}  // namespace effdet
