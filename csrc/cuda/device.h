// CUDA calls, checked; memory and the current device, held for a scope. For .cu files alone.
#pragma once

#include <cuda_runtime.h>
#include <secateur/error.h>
#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"
#include "index.h"

namespace secateur::cuda {

/// Throws for anything but success: what was called, and what CUDA says.
void check(cudaError_t status, const char* call);

inline cudaStream_t stream_of(const Device& device) {
  return static_cast<cudaStream_t>(device.stream);
}

/// Makes a device the current one; the one before is back at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Device& device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

/// Memory of the current device, in the order of a stream: what was enqueued before the end of the
/// scope may use it, and nobody waits.
class Scratch {
 public:
  Scratch(std::size_t bytes, const Device& device);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  cudaStream_t stream_;
  bool pooled_ = false;
};

/// A value of the current device.
int attribute(cudaDeviceAttr which, const Device& device);

Layout layout_of(const TensorGeometry& view);

/// Sums in device memory. An update's kernels are between begin() and end(), and add to values()
/// only while Gate::open().
class DeviceSums final : public Sums {
 public:
  DeviceSums(const Device& device, std::size_t size);
  ~DeviceSums() override;

  const Device& device() const override { return device_; }
  std::int64_t updates() const override { return updates_; }
  std::int64_t wait() override;
  void upload(std::size_t first, const double* from, std::size_t count) override;
  void download(std::size_t first, double* to, std::size_t count) override;

  double* values() const { return values_; }
  std::size_t size() const { return size_; }
  /// What kernels of the update take along.
  struct Gate {
    unsigned long long* first_refused;  ///< of device memory
    int* told;                          ///< of the host's
    unsigned long long update;

    /// Is nothing refused so far? The same for all threads of a kernel that refuse() is not in.
    __device__ bool open() const { return *first_refused > update; }
    __device__ void refuse() const {
      atomicMin(first_refused, update);
      *static_cast<volatile int*>(told) = 1;
    }
  };
  /// Has `stream` wait for what other streams add to the sums.
  Gate begin(cudaStream_t stream);
  void end();

 private:
  void release();

  Device device_;
  std::size_t size_;
  double* values_ = nullptr;
  unsigned long long* first_refused_ = nullptr;
  int* told_ = nullptr;  ///< one of the host's flags
  bool pooled_ = false;
  cudaEvent_t done_ = nullptr;
  cudaStream_t stream_ = nullptr;
  std::int64_t updates_ = 0;
};

/// Copies between memory of the host and of the device on the stream.
void upload(void* to, const void* from, std::size_t bytes, const Device& device);
/// Waits for the stream.
void download(void* to, const void* from, std::size_t bytes, const Device& device);

/// function(Source{}) for the type that a dtype's elements are read as.
template <typename F>
auto with_source(DType dtype, const F& function) {
  switch (dtype) {
    case DType::f16:
      return function(Half{});
    case DType::bf16:
      return function(BFloat{});
    case DType::f32:
      return function(float{});
    case DType::f64:
      break;
  }
  return function(double{});
}

}  // namespace secateur::cuda
