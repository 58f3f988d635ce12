#include <algorithm>

#include "backend.h"
#include "device.h"
#include "score_head.h"

namespace secateur::cuda {
namespace {

constexpr int kThreads = 256;
// Results of that many bytes wait at most until they are added up in the order of the images.
constexpr std::int64_t kPendingBytes = std::int64_t{64} << 20;
// Workspaces outside of shared memory: so many bytes at most for all blocks.
constexpr std::int64_t kWorkspaceBytes = std::int64_t{128} << 20;

struct Heads {
  HeadInput first;  ///< head 0 of image 0
  std::int64_t query_image, query_head, key_image, key_head;
  std::int64_t heads, count;  ///< per image; of all images together
  double max_magnitude;
  double* work;  ///< a workspace for each block, or null for shared memory
  std::int64_t work_size;
  double* results;  ///< (count, result_size)
  int* fault;
};

template <typename Source>
__global__ void __launch_bounds__(kThreads) score_kernel(Heads all) {
  extern __shared__ double shared[];
  const Block block(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  double* work = all.work == nullptr ? shared : all.work + blockIdx.x * all.work_size;
  const std::int64_t size = result_size(all.first.dim, all.first.moments);
  for (std::int64_t head = blockIdx.x; head < all.count; head += gridDim.x) {
    const std::int64_t image = head / all.heads, h = head % all.heads;
    HeadInput input = all.first;
    input.query =
        static_cast<const Source*>(input.query) + image * all.query_image + h * all.query_head;
    input.key = static_cast<const Source*>(input.key) + image * all.key_image + h * all.key_head;
    const HeadFault fault =
        HeadScore<Source>(block, input, work).run(all.max_magnitude, all.results + head * size);
    if (fault != kSound && threadIdx.x == 0) atomicMax(all.fault, static_cast<int>(fault));
  }
}

// One thread an element: image after image, whatever the blocks before did first.
__global__ void fold_kernel(const double* results, std::int64_t images, std::int64_t size,
                            double* sums) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += step) {
    double sum = sums[i];
    for (std::int64_t image = 0; image < images; ++image) sum += results[image * size + i];
    sums[i] = sum;
  }
}

/// How many blocks are worth launching, with how much shared memory.
struct Launch {
  std::int64_t blocks = 0;
  std::size_t shared_bytes = 0;
};

template <typename Source>
Launch launch_of(const Device& device, std::int64_t work_size, std::int64_t heads) {
  const auto bytes = static_cast<std::size_t>(work_size) * sizeof(double);
  Launch launch;
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (bytes <= static_cast<std::size_t>(most)) {
    // As much as there is: another thread may be about to launch the kernel with more.
    check(cudaFuncSetAttribute(score_kernel<Source>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               most),
          "cudaFuncSetAttribute");
    launch.shared_bytes = bytes;
  }
  int resident = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, score_kernel<Source>, kThreads,
                                                      launch.shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  launch.blocks =
      std::int64_t{1} * std::max(1, resident) * attribute(cudaDevAttrMultiProcessorCount, device);
  if (launch.shared_bytes == 0) {
    launch.blocks =
        std::min(launch.blocks,
                 std::max<std::int64_t>(1, kWorkspaceBytes / static_cast<std::int64_t>(bytes)));
  }
  launch.blocks = std::min(launch.blocks, heads);
  return launch;
}

template <typename Source>
bool score_as(const TensorView& q, const TensorView& k, std::int64_t gamma, bool moments,
              double max_magnitude, std::vector<double>& sums) {
  const DeviceGuard guard(q.device);
  const cudaStream_t stream = stream_of(q.device);
  const std::int64_t images = q.shape[0];
  Heads all{};
  all.first.dim = static_cast<int>(q.shape[3]);
  all.first.tokens = q.shape[1];
  all.first.limit = static_cast<int>(std::min({gamma, q.shape[1], q.shape[3]}));
  all.first.moments = moments;
  all.first.query_token = q.strides[1];
  all.first.query_channel = q.strides[3];
  all.first.key_token = k.strides[1];
  all.first.key_channel = k.strides[3];
  all.query_image = q.strides[0];
  all.query_head = q.strides[2];
  all.key_image = k.strides[0];
  all.key_head = k.strides[2];
  all.heads = q.shape[2];
  all.max_magnitude = max_magnitude;
  all.work_size = workspace_size(all.first.dim, all.first.limit);

  // Of an image; the folding kernel does not care where in it a head begins.
  const auto size = static_cast<std::int64_t>(sums.size());
  const std::int64_t chunk = std::clamp<std::int64_t>(
      kPendingBytes / (size * static_cast<std::int64_t>(sizeof(double))), 1, images);
  const Launch launch = launch_of<Source>(q.device, all.work_size, chunk * all.heads);
  const std::size_t work_bytes =
      launch.shared_bytes > 0
          ? 0
          : static_cast<std::size_t>(launch.blocks * all.work_size) * sizeof(double);
  const Scratch results(static_cast<std::size_t>(chunk * size) * sizeof(double), q.device);
  const Scratch device_sums(sums.size() * sizeof(double), q.device);
  const Scratch fault(sizeof(int), q.device);
  const Scratch work(std::max<std::size_t>(work_bytes, 1), q.device);
  all.results = results.as<double>();
  all.fault = fault.as<int>();
  all.work = work_bytes > 0 ? work.as<double>() : nullptr;
  check(cudaMemsetAsync(all.fault, 0, sizeof(int), stream), "cudaMemsetAsync");
  upload(device_sums.as<double>(), sums.data(), sums.size() * sizeof(double), q.device);

  const auto fold_blocks = static_cast<unsigned>(
      std::min<std::int64_t>((size + kThreads - 1) / kThreads, std::int64_t{1} << 20));
  for (std::int64_t begin = 0; begin < images; begin += chunk) {
    const std::int64_t count = std::min(chunk, images - begin);
    all.first.query = static_cast<const Source*>(q.data) + begin * all.query_image;
    all.first.key = static_cast<const Source*>(k.data) + begin * all.key_image;
    all.count = count * all.heads;
    const auto blocks = static_cast<unsigned>(std::min(launch.blocks, all.count));
    score_kernel<Source><<<blocks, kThreads, launch.shared_bytes, stream>>>(all);
    check(cudaGetLastError(), "score_kernel");
    fold_kernel<<<fold_blocks, kThreads, 0, stream>>>(all.results, count, size,
                                                      device_sums.as<double>());
    check(cudaGetLastError(), "fold_kernel");
  }
  int found = 0;
  check(cudaMemcpyAsync(&found, all.fault, sizeof(int), cudaMemcpyDeviceToHost, stream),
        "cudaMemcpyAsync");
  download(sums.data(), device_sums.as<double>(), sums.size() * sizeof(double), q.device);
  return found == kSound;
}

}  // namespace

std::int64_t max_head_dim() { return kMaxHeadDim; }

bool score(const TensorView& q, const TensorView& k, std::int64_t gamma, bool moments,
           double max_magnitude, std::vector<double>& sums) {
  return with_source(q.dtype, [&](auto source) {
    return score_as<decltype(source)>(q, k, gamma, moments, max_magnitude, sums);
  });
}

}  // namespace secateur::cuda
