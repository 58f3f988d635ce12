// CUDA calls, checked; memory and the current device, held for a scope. For .cu files alone.
#pragma once

#include <cuda_runtime.h>
#include <secateur/error.h>
#include <secateur/tensor.h>

#include <cstddef>
#include <string>

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
