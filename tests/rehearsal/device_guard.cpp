// torch's CPU build asks for a way to make a CUDA device the current one wherever a tensor on it is indexed, and has
// none. This one does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
} // namespace
