#include "device.h"

#include <cstdint>
#include <mutex>
#include <vector>

#include "../core/check.h"
#include "backend.h"

namespace secateur::cuda {
namespace {

// Flags that are allocated at a time.
constexpr int kFlags = 1024;

std::string capability(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return std::to_string(major) + "." + std::to_string(minor);
}

/// Throws where memory was not to be had, with the numbers.
void check_allocation(cudaError_t status, std::size_t bytes, const Device& device) {
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    std::size_t available = 0, total = 0;
    cudaMemGetInfo(&available, &total);
    fail<Error>(
        "memory", std::to_string(bytes) + " bytes on cuda:" + std::to_string(device.index),
        "none (" + std::to_string(available) + " of " + std::to_string(total) + " bytes are free)");
  }
  check(status, "cudaMalloc");
}

/// Pools of one's own, so that nothing of the program's is tuned.
struct Pools {
  std::uint64_t kept;  ///< bytes, when the device is waited for
  std::mutex mutex{};
  std::vector<cudaMemPool_t> by_device{};
};
// The scratch memory of one call is kept. Sums have pools of their own, or with theirs that much
// would be passed, and nothing kept.
Pools& scratch_pools() {
  static Pools pools{std::uint64_t{512} << 20};
  return pools;
}
Pools& sum_pools() {
  static Pools pools{0};
  return pools;
}

/// nullptr where the device has none.
cudaMemPool_t pool_of(Pools& owner, const Device& device) {
  const std::lock_guard<std::mutex> lock(owner.mutex);
  std::vector<cudaMemPool_t>& pools = owner.by_device;
  const auto index = static_cast<std::size_t>(device.index);
  if (pools.size() <= index) pools.resize(index + 1, nullptr);
  if (pools[index] != nullptr || attribute(cudaDevAttrMemoryPoolsSupported, device) == 0) {
    return pools[index];
  }
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device.index;
  cudaMemPool_t pool = nullptr;
  check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &owner.kept),
        "cudaMemPoolSetAttribute");
  return pools[index] = pool;
}

/// Where a device can tell the host that something is wrong. Pinned pages are dear, so flags share
/// them, and are there until the process ends.
class Flags {
 public:
  static int* take() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (spare().empty()) {
      int* flags = nullptr;
      check(cudaHostAlloc(reinterpret_cast<void**>(&flags), kFlags * sizeof(int),
                          cudaHostAllocMapped | cudaHostAllocPortable),
            "cudaHostAlloc");
      for (int i = kFlags; i-- > 0;) spare().push_back(flags + i);
    }
    int* const flag = spare().back();
    spare().pop_back();
    *flag = 0;
    return flag;
  }

  static void give_back(int* flag) {
    const std::lock_guard<std::mutex> lock(mutex());
    if (flag != nullptr) spare().push_back(flag);
  }

 private:
  // Never destroyed: sums may be later than what is.
  static std::mutex& mutex() {
    static auto* const mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<int*>& spare() {
    static auto* const flags = new std::vector<int*>;
    return *flags;
  }
};

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or a later call would report it again
  int device = 0;
  cudaGetDevice(&device);
  const std::string where = "cuda:" + std::to_string(device);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
      status == cudaErrorUnsupportedPtxVersion) {
    fail<Unsupported>(where, "a device that this build has code for",
                      "compute capability " + capability(device));
  }
  fail<Error>(where + " " + call, "success",
              std::string(cudaGetErrorName(status)) + " (" + cudaGetErrorString(status) + ")");
}

DeviceGuard::DeviceGuard(const Device& device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  check(cudaSetDevice(device.index), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(before_); }

Scratch::Scratch(std::size_t bytes, const Device& device) : stream_(stream_of(device)) {
  const cudaMemPool_t pool = pool_of(scratch_pools(), device);
  pooled_ = pool != nullptr;
  check_allocation(pooled_ ? cudaMallocFromPoolAsync(&memory_, bytes, pool, stream_)
                           : cudaMalloc(&memory_, bytes),
                   bytes, device);
}

Scratch::~Scratch() {
  // An error that a kernel left behind comes up where the stream is waited for.
  if (pooled_) {
    cudaFreeAsync(memory_, stream_);
  } else {
    cudaFree(memory_);
  }
}

int attribute(cudaDeviceAttr which, const Device& device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device.index), "cudaDeviceGetAttribute");
  return value;
}

Layout layout_of(const TensorGeometry& view) {
  static_assert(kAxes == static_cast<int>(kMaxRank), "every view fits");
  Layout layout{};
  layout.rank = static_cast<int>(view.rank());
  for (std::size_t axis = 0; axis < view.rank(); ++axis) {
    layout.shape[axis] = view.shape[axis];
    layout.strides[axis] = view.strides[axis];
  }
  return layout;
}

void upload(void* to, const void* from, std::size_t bytes, const Device& device) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(device)),
        "cudaMemcpyAsync");
}

void download(void* to, const void* from, std::size_t bytes, const Device& device) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(device)),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream_of(device)), "cudaStreamSynchronize");
}

DeviceSums::DeviceSums(const Device& device, std::size_t size)
    : device_(device), size_(size), stream_(stream_of(device)) {
  const DeviceGuard guard(device);
  const std::size_t bytes = size_ * sizeof(double), all = bytes + sizeof(*first_refused_);
  const cudaMemPool_t pool = pool_of(sum_pools(), device);
  pooled_ = pool != nullptr;
  try {
    void* memory = nullptr;
    check_allocation(
        pooled_ ? cudaMallocFromPoolAsync(&memory, all, pool, stream_) : cudaMalloc(&memory, all),
        all, device);
    values_ = static_cast<double*>(memory);
    first_refused_ = reinterpret_cast<unsigned long long*>(values_ + size_);
    told_ = Flags::take();
    check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    check(cudaMemsetAsync(values_, 0, bytes, stream_), "cudaMemsetAsync");
    check(cudaMemsetAsync(first_refused_, 0xff, sizeof(*first_refused_), stream_),
          "cudaMemsetAsync");
    check(cudaEventRecord(done_, stream_), "cudaEventRecord");
  } catch (...) {
    release();
    throw;
  }
}

DeviceSums::~DeviceSums() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_.index);
  release();
  cudaSetDevice(before);
}

void DeviceSums::release() {
  // Whoever destroys sums does not ask whether the device, or the process, is at its end.
  if (done_ != nullptr) cudaEventSynchronize(done_);
  if (pooled_ && values_ != nullptr) {
    cudaFreeAsync(values_, nullptr);  // the stream may be gone; nothing is left to wait for
  } else {
    cudaFree(values_);
  }
  Flags::give_back(told_);
  if (done_ != nullptr) cudaEventDestroy(done_);
  cudaGetLastError();
}

DeviceSums::Gate DeviceSums::begin(cudaStream_t stream) {
  // Also where it looks like the same one: a handle may be that of a stream that was destroyed.
  check(cudaStreamWaitEvent(stream, done_), "cudaStreamWaitEvent");
  stream_ = stream;
  return {first_refused_, told_, static_cast<unsigned long long>(updates_)};
}

void DeviceSums::end() {
  check(cudaEventRecord(done_, stream_), "cudaEventRecord");
  ++updates_;
}

std::int64_t DeviceSums::wait() {
  const DeviceGuard guard(device_);
  check(cudaEventSynchronize(done_), "cudaEventSynchronize");
  if (*static_cast<volatile int*>(told_) == 0) return -1;
  unsigned long long first = 0;
  check(cudaMemcpy(&first, first_refused_, sizeof(first), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return static_cast<std::int64_t>(first);
}

void DeviceSums::upload(std::size_t first, const double* from, std::size_t count) {
  const DeviceGuard guard(device_);
  check(cudaEventSynchronize(done_), "cudaEventSynchronize");
  check(cudaMemcpy(values_ + first, from, count * sizeof(double), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  // Of pageable memory it returns before all is there, and streams that do not block go on.
  check(cudaStreamSynchronize(cudaStreamLegacy), "cudaStreamSynchronize");
}

void DeviceSums::download(std::size_t first, double* to, std::size_t count) {
  const DeviceGuard guard(device_);
  check(cudaEventSynchronize(done_), "cudaEventSynchronize");
  check(cudaMemcpy(to, values_ + first, count * sizeof(double), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
}

std::unique_ptr<Sums> make_sums(const Device& device, std::size_t size) {
  return std::make_unique<DeviceSums>(device, size);
}

bool built() { return true; }

void check_memory(const TensorGeometry& view, const void* data, const std::string& argument) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    fail<Unsupported>(argument, "a CUDA device that is there",
                      "cuda:" + std::to_string(view.device.index) + " of none (" +
                          cudaGetErrorString(status) + ")");
  }
  if (view.device.index < 0 || view.device.index >= count) {
    fail<Unsupported>(argument, "a CUDA device that is there",
                      "cuda:" + std::to_string(view.device.index) + " of " + std::to_string(count));
  }
  if (data == nullptr) return;
  cudaPointerAttributes found{};
  check(cudaPointerGetAttributes(&found, data), "cudaPointerGetAttributes");
  const bool there = found.type == cudaMemoryTypeManaged ||
                     (found.type == cudaMemoryTypeDevice && found.device == view.device.index);
  if (!there) {
    fail<InvalidArgument>(argument, "memory of cuda:" + std::to_string(view.device.index),
                          found.type == cudaMemoryTypeDevice
                              ? "memory of cuda:" + std::to_string(found.device)
                              : "memory of the host");
  }
}

}  // namespace secateur::cuda
