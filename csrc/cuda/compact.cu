#include <algorithm>

#include "backend.h"
#include "device.h"

namespace secateur::cuda {
namespace {

constexpr int kThreads = 256;
// Of elements that are on their way at a time.
constexpr std::int64_t kMovingBytes = std::int64_t{32} << 20;

// Indices as a kernel's argument (at most 4 KiB): a copy from host memory might wait for the
// stream.
constexpr int kIndices = 480;
struct Indices {
  std::int64_t values[kIndices];
};

__global__ void store_kernel(Indices indices, int count, std::int64_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    to[i] = indices.values[i];
  }
}

template <typename Bits>
__global__ void gather_kernel(const Bits* data, Moves moves, std::int64_t begin, std::int64_t count,
                              Bits* out) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    std::int64_t from = 0, to = 0;
    move_of(moves, begin + i, &from, &to);
    out[i] = data[from];
  }
}

template <typename Bits>
__global__ void scatter_kernel(const Bits* in, Moves moves, std::int64_t begin, std::int64_t count,
                               Bits* data) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    std::int64_t from = 0, to = 0;
    move_of(moves, begin + i, &from, &to);
    data[to] = in[i];
  }
}

/// Part after part goes through scratch memory: a part's elements are all read before one of them
/// is written, and none is written where a later part reads.
template <typename Bits>
void move(void* memory, const Device& device, const Moves& moves) {
  auto* data = static_cast<Bits*>(memory);
  const cudaStream_t stream = stream_of(device);
  const std::int64_t total = moves.outer * moves.kept * moves.inner;
  const auto size = static_cast<std::int64_t>(sizeof(Bits));
  const std::int64_t part = std::min(total, kMovingBytes / size);
  const Scratch scratch(static_cast<std::size_t>(part * size), device);
  for (std::int64_t begin = 0; begin < total; begin += part) {
    const std::int64_t count = std::min(part, total - begin);
    const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    gather_kernel<Bits>
        <<<blocks, kThreads, 0, stream>>>(data, moves, begin, count, scratch.as<Bits>());
    check(cudaGetLastError(), "gather_kernel");
    scatter_kernel<Bits>
        <<<blocks, kThreads, 0, stream>>>(scratch.as<Bits>(), moves, begin, count, data);
    check(cudaGetLastError(), "scatter_kernel");
  }
}

}  // namespace

void compact(const MutableTensorView& tensor, const MutableTensorView& to, std::size_t axis,
             const std::vector<std::int64_t>& keep) {
  if (to.numel() == 0) return;
  const DeviceGuard guard(tensor.device);
  const Scratch indices(keep.size() * sizeof(std::int64_t), tensor.device);
  for (std::size_t begin = 0; begin < keep.size(); begin += kIndices) {
    const std::size_t count = std::min<std::size_t>(kIndices, keep.size() - begin);
    Indices some{};
    std::copy_n(keep.begin() + static_cast<std::ptrdiff_t>(begin), count, some.values);
    store_kernel<<<1, kThreads, 0, stream_of(tensor.device)>>>(some, static_cast<int>(count),
                                                               indices.as<std::int64_t>() + begin);
    check(cudaGetLastError(), "store_kernel");
  }
  Moves moves{};
  moves.packed = tensor.is_contiguous();
  moves.kept = static_cast<std::int64_t>(keep.size());
  moves.size = tensor.shape[axis];
  moves.outer = moves.inner = 1;
  for (std::size_t i = 0; i < tensor.rank(); ++i) {
    if (i < axis) moves.outer *= tensor.shape[i];
    if (i > axis) moves.inner *= tensor.shape[i];
  }
  moves.step = tensor.strides[axis];
  moves.lines = layout_of(tensor);
  moves.lines.shape[axis] = 1;
  moves.keep = indices.as<std::int64_t>();
  switch (item_size(tensor.dtype)) {
    case 2:
      return move<std::uint16_t>(tensor.data, tensor.device, moves);
    case 4:
      return move<std::uint32_t>(tensor.data, tensor.device, moves);
    default:
      return move<std::uint64_t>(tensor.data, tensor.device, moves);
  }
}

}  // namespace secateur::cuda
