#include <algorithm>
#include <cstring>
#include <limits>

#include "backend.h"
#include "device.h"
#include "rows.h"

namespace secateur::cuda {
namespace {

constexpr int kPackThreads = 64;
constexpr int kSquareThreads = kLanes * kLanes;
constexpr std::size_t kChunkRows = 4096;

template <typename Source, typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const Source* data, const std::int64_t* offsets, std::int64_t stride, int dim,
                RowNorms norms, T* packed, unsigned long long* peak) {
  __shared__ double room[kRowParts];
  const Block block(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  const std::int64_t row = blockIdx.x;
  const double top =
      pack_row<T>(block, data + offsets[row], stride, dim, norms, room, packed + row * dim);
  // Of numbers >= 0, the bits have their order.
  if (threadIdx.x == 0) {
    atomicMax(peak, static_cast<unsigned long long>(__double_as_longlong(top)));
  }
}

template <typename T>
__global__ void __launch_bounds__(kSquareThreads)
    square_kernel(const T* rows, int count, int dim, int squares, double* sum,
                  double* second_moment) {
  __shared__ T strip[2 * strip_rows<T>() * kSide];
  __shared__ double sums[kSide * kSide];
  static_assert(sizeof(strip) + sizeof(sums) <= 48 * 1024, "static shared memory");
  const Block block(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  int left = 0, right = static_cast<int>(blockIdx.x);
  for (; right >= squares - left; ++left) right -= squares - left;
  add_square<T>(block, rows, count, dim, left, left + right, strip, sums, sum, second_moment);
}

template <typename Source, typename T>
double moments_as(const MomentRows& rows, std::vector<double>& sum,
                  std::vector<double>& second_moment) {
  const DeviceGuard guard(rows.device);
  const cudaStream_t stream = stream_of(rows.device);
  const std::vector<std::int64_t>& offsets = *rows.offsets;
  const int dim = static_cast<int>(rows.dim), squares = (dim + kSide - 1) / kSide;
  const std::size_t chunk = std::min(kChunkRows, offsets.size());
  const Scratch device_offsets(offsets.size() * sizeof(std::int64_t), rows.device);
  const Scratch packed(chunk * rows.dim * sizeof(T), rows.device);
  const Scratch device_sum(sum.size() * sizeof(double), rows.device);
  const Scratch device_moment(second_moment.size() * sizeof(double), rows.device);
  const Scratch peak(sizeof(unsigned long long), rows.device);
  upload(device_offsets.as<std::int64_t>(), offsets.data(), offsets.size() * sizeof(std::int64_t),
         rows.device);
  check(cudaMemsetAsync(device_sum.as<double>(), 0, sum.size() * sizeof(double), stream),
        "cudaMemsetAsync");
  check(
      cudaMemsetAsync(device_moment.as<double>(), 0, second_moment.size() * sizeof(double), stream),
      "cudaMemsetAsync");
  check(cudaMemsetAsync(peak.as<void>(), 0, sizeof(unsigned long long), stream), "cudaMemsetAsync");
  const auto blocks = static_cast<unsigned>(static_cast<std::int64_t>(squares) * (squares + 1) / 2);
  for (std::size_t begin = 0; begin < offsets.size(); begin += chunk) {
    const std::size_t count = std::min(chunk, offsets.size() - begin);
    pack_kernel<Source, T><<<static_cast<unsigned>(count), kPackThreads, 0, stream>>>(
        static_cast<const Source*>(rows.data), device_offsets.as<std::int64_t>() + begin,
        rows.stride, dim, RowNorms{rows.normalise, rows.center}, packed.as<T>(),
        peak.as<unsigned long long>());
    check(cudaGetLastError(), "pack_kernel");
    square_kernel<T><<<blocks, kSquareThreads, 0, stream>>>(packed.as<T>(), static_cast<int>(count),
                                                            dim, squares, device_sum.as<double>(),
                                                            device_moment.as<double>());
    check(cudaGetLastError(), "square_kernel");
  }
  double top = 0;
  download(&top, peak.as<void>(), sizeof(top), rows.device);
  if (!(top < std::numeric_limits<double>::infinity())) return top;
  download(sum.data(), device_sum.as<double>(), sum.size() * sizeof(double), rows.device);
  download(second_moment.data(), device_moment.as<double>(), second_moment.size() * sizeof(double),
           rows.device);
  return top;
}

}  // namespace

double moments(const MomentRows& rows, bool in_float64, std::vector<double>& sum,
               std::vector<double>& second_moment) {
  return with_source(rows.dtype, [&](auto source) {
    using Source = decltype(source);
    return in_float64 ? moments_as<Source, double>(rows, sum, second_moment)
                      : moments_as<Source, float>(rows, sum, second_moment);
  });
}

}  // namespace secateur::cuda
