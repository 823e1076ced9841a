// Addresses arrive from Python as integers (Tensor.data_ptr()).
#pragma once

#include <cstdint>

namespace effdet {

// The address as a T*, and in `ok` whether it is aligned for T; a null address is fine only for an empty tensor.
template <typename T>
T* as_pointer(std::uintptr_t address, std::int64_t elements, bool* ok) {
  *ok = *ok && address % alignof(T) == 0 && (address != 0 || elements == 0);
  return reinterpret_cast<T*>(address);
}

}  // namespace effdet
