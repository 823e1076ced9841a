// What the CUDA kernels know of the device and its driver.
#pragma once

namespace effdet::cuda {

// Whether kernels of the current device may overlap (`wait_for_previous_kernel`): compute capability 9.0.
bool overlaps();

struct Versions {
  int runtime, driver;  // 1000 * major + 10 * minor; 0: there is no driver
};
Versions versions();

// A CUDA error's name and meaning.
const char* error_name(int code);
const char* error_text(int code);

}  // namespace effdet::cuda
