// Dtype codes shared with effdet_kernels/_native.py.
#pragma once

namespace effdet {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1 };

}  // namespace effdet
