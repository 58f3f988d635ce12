#include "device.h"

#include <cstdint>
#include <mutex>
#include <vector>

#include "../core/check.h"
#include "backend.h"

namespace secateur::cuda {
namespace {

// What a pool keeps between calls: the scratch memory of a usual one.
constexpr std::uint64_t kKeptBytes = std::uint64_t{256} << 20;

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

/// Of one's own, so that nothing of the program's is tuned; nullptr where the device has none.
cudaMemPool_t pool_of(const Device& device) {
  static std::mutex mutex;
  static std::vector<cudaMemPool_t> pools;
  const std::lock_guard<std::mutex> lock(mutex);
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
  std::uint64_t kept = kKeptBytes;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept),
        "cudaMemPoolSetAttribute");
  return pools[index] = pool;
}

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
  const cudaMemPool_t pool = pool_of(device);
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

DeviceSums::DeviceSums(const Device& device, const std::vector<double>& values)
    : device_(device), size_(values.size()), stream_(stream_of(device)) {
  const DeviceGuard guard(device);
  const std::size_t bytes = size_ * sizeof(double);
  try {
    check_allocation(cudaMalloc(&values_, bytes), bytes, device);
    check_allocation(cudaMalloc(&first_refused_, sizeof(*first_refused_)), sizeof(*first_refused_),
                     device);
    check(cudaHostAlloc(reinterpret_cast<void**>(&told_), sizeof(*told_), cudaHostAllocMapped),
          "cudaHostAlloc");
    *told_ = 0;
    check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    check(cudaMemsetAsync(first_refused_, 0xff, sizeof(*first_refused_), stream_),
          "cudaMemsetAsync");
    upload(values_, values.data(), bytes, device);
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
  cudaFree(values_);
  cudaFree(first_refused_);
  cudaFreeHost(told_);
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

void DeviceSums::download(std::vector<double>& values) {
  const DeviceGuard guard(device_);
  check(cudaEventSynchronize(done_), "cudaEventSynchronize");
  check(cudaMemcpy(values.data(), values_, size_ * sizeof(double), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
}

std::unique_ptr<Sums> make_sums(const Device& device, const std::vector<double>& values) {
  return std::make_unique<DeviceSums>(device, values);
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
