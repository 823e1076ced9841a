// What a kernel returns: effdet_kernels/_native.py turns it into an exception.
#pragma once

namespace effdet {

enum Status : int {
  kOk = 0,
  kBadPointer = 1,
  kBadSize = 2,
  kBadDtype = 3,
  kBadParameter = 4,
  kOutOfMemory = 5,
};

}  // namespace effdet
