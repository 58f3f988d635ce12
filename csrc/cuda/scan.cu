#include <algorithm>
#include <cstring>

#include "backend.h"
#include "device.h"

namespace secateur::cuda {
namespace {

constexpr int kThreads = 256;

struct Found {
  unsigned long long first;  ///< index of the first that is not finite, or of none
  unsigned long long peak;   ///< bits of the largest magnitude: of numbers >= 0 they have its order
};

// Minimum and maximum do not depend on the order of the threads.
template <typename Source>
__global__ void scan_kernel(const Source* data, Layout layout, std::int64_t count, Found* found) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const double value = to_double(data[offset_of(layout, i)]);
    if (value - value == 0) {
      atomicMax(&found->peak, static_cast<unsigned long long>(__double_as_longlong(fabs(value))));
    } else {
      atomicMin(&found->first, static_cast<unsigned long long>(i));
    }
  }
}

template <typename Source>
Scan scan_as(const TensorView& view) {
  const DeviceGuard guard(view.device);
  const std::int64_t count = view.numel();
  const Layout layout = layout_of(view);
  const Scratch scratch(sizeof(Found), view.device);
  Found found{~0ULL, 0};
  upload(scratch.as<Found>(), &found, sizeof(found), view.device);
  const auto* data = static_cast<const Source*>(view.data);
  const auto blocks = static_cast<unsigned>(
      std::min<std::int64_t>((count + kThreads - 1) / kThreads, std::int64_t{1} << 16));
  scan_kernel<Source>
      <<<blocks, kThreads, 0, stream_of(view.device)>>>(data, layout, count, scratch.as<Found>());
  check(cudaGetLastError(), "scan_kernel");
  download(&found, scratch.as<Found>(), sizeof(found), view.device);
  Scan result;
  if (found.first == ~0ULL) {
    std::memcpy(&result.value, &found.peak, sizeof(result.value));
    return result;
  }
  result.index = static_cast<std::int64_t>(found.first);
  Source element{};
  download(&element, data + offset_of(layout, result.index), sizeof(element), view.device);
  result.value = to_double(element);
  return result;
}

}  // namespace

Scan scan(const TensorView& view) {
  if (view.numel() == 0) return {};
  return with_source(view.dtype, [&](auto source) { return scan_as<decltype(source)>(view); });
}

}  // namespace secateur::cuda
