// Keeps some indices of an axis, in the tensor's own memory.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <vector>

namespace secateur {

/// Keeps `keep` (ascending, unique, in range, at least one) along axis `dim`, in place, moving
/// memory forward only and without a second buffer. Returns the view of the result, which begins at
/// tensor.data. A row-major contiguous tensor is packed: the result is contiguous and the owner may
/// shrink the memory. Any other tensor keeps its strides, and only elements of the view are
/// written. For a view on a CUDA device (if the build has CUDA, see runtime.h), the work is
/// enqueued on its stream without waiting, and uses 32 MiB of the device's memory until it is done.
/// Throws InvalidArgument (also for a view whose elements may overlap: each stride has to step over
/// the span of the axes with smaller strides), Unsupported, or Error (a device that fails), before
/// anything is moved.
SECATEUR_API MutableTensorView compact(const MutableTensorView& tensor, std::int64_t dim,
                                       const std::vector<std::int64_t>& keep);

}  // namespace secateur
