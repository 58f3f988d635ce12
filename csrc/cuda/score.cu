#include <algorithm>

#include "backend.h"
#include "device.h"
#include "score_small_head.h"

namespace secateur::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kFoldThreads =
    64;  // few elements, and many images: over as many processors as there are
// Results of that many bytes wait at most until they are added up in the order of the images.
constexpr std::int64_t kPendingBytes = std::int64_t{256} << 20;
// Workspaces outside of shared memory: so many bytes at most for all blocks.
constexpr std::int64_t kWorkspaceBytes = std::int64_t{128} << 20;

// Sums that images go to in turn.
struct Turns {
  int count;
  DeviceSums::Gate gates[kMaxTurns];
  double* sums[kMaxTurns];
};

struct Heads {
  HeadInput first;  ///< head 0 of image 0
  std::int64_t query_image, query_head, key_image, key_head;
  std::int64_t heads, count;  ///< per image; of all images together
  std::int64_t begin;         ///< images before the first
  double max_magnitude;
  double* work;  ///< a workspace for each block, or null for shared memory
  std::int64_t work_size;
  double* results;  ///< (count, result_size)
  Turns turns;

  template <typename Source>
  __device__ HeadInput input(std::int64_t head) const {
    const std::int64_t image = head / heads, h = head % heads;
    HeadInput result = first;
    result.query = static_cast<const Source*>(first.query) + image * query_image + h * query_head;
    result.key = static_cast<const Source*>(first.key) + image * key_image + h * key_head;
    return result;
  }
  __device__ double* result(std::int64_t head) const {
    return results + head * result_size(first.dim, first.moments);
  }
  __device__ void refuse(std::int64_t head) const {
    turns.gates[(begin + head / heads) % turns.count].refuse();
  }
};

template <typename Source>
__global__ void __launch_bounds__(kThreads) score_kernel(const __grid_constant__ Heads all) {
  extern __shared__ double shared[];
  const Block block(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  double* work = all.work == nullptr ? shared : all.work + blockIdx.x * all.work_size;
  for (std::int64_t head = blockIdx.x; head < all.count; head += gridDim.x) {
    const HeadInput input = all.input<Source>(head);
    const HeadFault fault =
        HeadScore<Source>(block, input, work).run(all.max_magnitude, all.result(head));
    if (fault != kSound && threadIdx.x == 0) all.refuse(head);
  }
}

template <typename Source>
__global__ void __launch_bounds__(kTeam, 4) score_small_kernel(const __grid_constant__ Heads all) {
  extern __shared__ double shared[];
  const Team team(static_cast<int>(threadIdx.x));
  const std::int64_t head = blockIdx.x;
  const HeadInput input = all.input<Source>(head);
  SmallHeadScore<Source> score(team, input, shared);
  const HeadFault fault = score.run(all.max_magnitude, all.result(head));
  if (fault != kSound && threadIdx.x == 0) all.refuse(head);
}

// One thread an element of one of the sums: image after image, whatever the blocks before did
// first.
__global__ void fold_kernel(const double* results, std::int64_t begin, std::int64_t images,
                            std::int64_t size, const __grid_constant__ Turns turns) {
  const int turn = static_cast<int>(blockIdx.y);
  if (!turns.gates[turn].open()) return;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const std::int64_t first = (turn + turns.count - begin % turns.count) % turns.count;
  double sum = turns.sums[turn][i];
#pragma unroll 8
  for (std::int64_t image = first; image < images; image += turns.count) {
    sum += results[image * size + i];
  }
  turns.sums[turn][i] = sum;
}

// Sums of all chunks of a batch, into those that they are for, unless something was refused.
__global__ void keep_kernel(const double* folded, std::int64_t size,
                            const __grid_constant__ Turns turns) {
  const int turn = static_cast<int>(blockIdx.y);
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < size && turns.gates[turn].open()) turns.sums[turn][i] = folded[turn * size + i];
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

/// Is there a kernel for small heads, and do these suit it?
template <typename Source>
bool small(const HeadInput& input, const Device& device) {
  if (input.dim > kSmallHead || input.limit > kSmallLimit) return false;
  constexpr int kBytes = kSmallWork * static_cast<int>(sizeof(double));
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 8 ||
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) < kBytes) {
    return false;
  }
  check(cudaFuncSetAttribute(score_small_kernel<Source>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "cudaFuncSetAttribute");
  return true;
}

template <typename Source>
void score_as(const TensorView& q, const TensorView& k, Heads all, const std::vector<Sums*>& sums) {
  const DeviceGuard guard(q.device);
  const cudaStream_t stream = stream_of(q.device);
  const std::int64_t images = q.shape[0];
  // Of an image; the folding kernel does not care where in it a head begins.
  const std::int64_t size = all.heads * result_size(all.first.dim, all.first.moments);
  const std::int64_t most = std::clamp<std::int64_t>(
      kPendingBytes / (size * static_cast<std::int64_t>(sizeof(double))), 1, images);
  const std::int64_t chunks = (images + most - 1) / most, chunk = (images + chunks - 1) / chunks;
  const bool by_team = small<Source>(all.first, q.device);
  Launch launch;
  if (!by_team) {
    all.work_size = workspace_size(all.first.dim, all.first.limit);
    launch = launch_of<Source>(q.device, all.work_size, chunk * all.heads);
  }
  const std::size_t work_bytes =
      by_team || launch.shared_bytes > 0
          ? 0
          : static_cast<std::size_t>(launch.blocks * all.work_size) * sizeof(double);
  const Scratch results(static_cast<std::size_t>(chunk * size) * sizeof(double), q.device);
  const Scratch work(std::max<std::size_t>(work_bytes, 1), q.device);
  all.results = results.as<double>();
  all.work = work_bytes > 0 ? work.as<double>() : nullptr;
  // A value of a later chunk may refuse the batch: until then its sums are kept apart.
  const bool apart = chunk < images;
  const Scratch folded(
      apart ? sums.size() * static_cast<std::size_t>(size) * sizeof(double) : std::size_t{1},
      q.device);
  all.turns.count = static_cast<int>(sums.size());
  for (int turn = 0; turn < all.turns.count; ++turn) {
    auto* device_sums = static_cast<DeviceSums*>(sums[static_cast<std::size_t>(turn)]);
    all.turns.gates[turn] = device_sums->begin(stream);
    all.turns.sums[turn] = device_sums->values();
  }
  Turns adding = all.turns;
  for (int turn = 0; apart && turn < adding.count; ++turn) {
    adding.sums[turn] = folded.as<double>() + turn * size;
    check(cudaMemcpyAsync(adding.sums[turn], all.turns.sums[turn],
                          static_cast<std::size_t>(size) * sizeof(double), cudaMemcpyDeviceToDevice,
                          stream),
          "cudaMemcpyAsync");
  }
  const dim3 fold_blocks(static_cast<unsigned>((size + kFoldThreads - 1) / kFoldThreads),
                         static_cast<unsigned>(all.turns.count));
  for (all.begin = 0; all.begin < images; all.begin += chunk) {
    const std::int64_t count = std::min(chunk, images - all.begin);
    all.first.query = static_cast<const Source*>(q.data) + all.begin * all.query_image;
    all.first.key = static_cast<const Source*>(k.data) + all.begin * all.key_image;
    all.count = count * all.heads;
    if (by_team) {
      score_small_kernel<Source>
          <<<static_cast<unsigned>(all.count), kTeam, kSmallWork * sizeof(double), stream>>>(all);
    } else {
      const auto blocks = static_cast<unsigned>(std::min(launch.blocks, all.count));
      score_kernel<Source><<<blocks, kThreads, launch.shared_bytes, stream>>>(all);
    }
    check(cudaGetLastError(), "score_kernel");
    fold_kernel<<<fold_blocks, kFoldThreads, 0, stream>>>(all.results, all.begin, count, size,
                                                          adding);
    check(cudaGetLastError(), "fold_kernel");
  }
  if (apart) {
    keep_kernel<<<fold_blocks, kFoldThreads, 0, stream>>>(folded.as<double>(), size, all.turns);
    check(cudaGetLastError(), "keep_kernel");
  }
  for (Sums* one : sums) static_cast<DeviceSums*>(one)->end();
}

}  // namespace

std::int64_t max_head_dim() { return kMaxHeadDim; }

void score(const TensorView& q, const TensorView& k, std::int64_t gamma, bool moments,
           double max_magnitude, const std::vector<Sums*>& sums) {
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
  with_source(q.dtype, [&](auto source) { score_as<decltype(source)>(q, k, all, sums); });
}

}  // namespace secateur::cuda
