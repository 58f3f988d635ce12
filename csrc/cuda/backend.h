// What csrc/core calls for views on CUDA devices. Arguments have been checked; every function works
// on the view's device and stream. no_cuda.cc has the same symbols for a build without CUDA.
//
// Errors: Unsupported for a device that is not there or that this build has no code for, Error for
// one that is out of memory or fails, with the numbers.
#pragma once

#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace secateur::cuda {

/// Whether this build holds the kernels.
bool built();

/// Refuses a device that is not there, and memory that is not on it.
void check_memory(const TensorGeometry& view, const void* data, const std::string& argument);

/// What the largest head is that score() takes.
std::int64_t max_head_dim();

/// Adds, image after image, every head's result to sums (heads, HeadScorer::result_size). False,
/// and sums unspecified, when a value is not finite, or with moments beyond `max_magnitude`.
/// Waits for the stream.
bool score(const TensorView& q, const TensorView& k, std::int64_t gamma, bool moments,
           double max_magnitude, std::vector<double>& sums);

/// The first element, row-major, that is not finite, or the largest magnitude.
struct Scan {
  std::int64_t index = -1;  ///< -1: all are finite
  double value = 0;         ///< the element, or the largest magnitude
};
/// Waits for the stream.
Scan scan(const TensorView& view);

/// Rows of `dim` elements, `stride` apart, that begin at these offsets (in elements).
struct MomentRows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  Device device{};
  std::int64_t stride = 1;
  std::size_t dim = 0;
  bool normalise = false;  ///< to √dim over the row's norm
  bool center = false;     ///< and before that less its mean
  const std::vector<std::int64_t>* offsets = nullptr;
};
/// Σ x and Σ x xᵀ (packed) over the rows; at most 4,096 rows are in memory at a time. Products in
/// float64, or in float32 over 32 rows and then added up in float64. Returns the largest
/// magnitude of what was multiplied, or Inf when not all of it is finite. Waits for the stream.
double moments(const MomentRows& rows, bool in_float64, std::vector<double>& sum,
               std::vector<double>& second_moment);

/// Moves the kept slices; `to` has the result's shape and strides. Does not wait.
void compact(const MutableTensorView& tensor, const MutableTensorView& to, std::size_t axis,
             const std::vector<std::int64_t>& keep);

}  // namespace secateur::cuda
