// For a torch without CUDA: what it asks of a device before it looks at a tensor there, with nothing behind it.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)

}  // namespace c10::impl
