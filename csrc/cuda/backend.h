// What csrc/core calls for views on CUDA devices. Arguments have been checked; every function works
// on the view's device and stream. no_cuda.cc has the same symbols for a build without CUDA.
//
// Errors: Unsupported for a device that is not there or that this build has no code for, Error for
// one that is out of memory or fails, with the numbers.
#pragma once

#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace secateur::cuda {

/// Whether this build holds the kernels.
bool built();

/// Refuses a device that is not there, and memory that is not on it.
void check_memory(const TensorGeometry& view, const void* data, const std::string& argument);

/// What the largest head is that score() takes.
std::int64_t max_head_dim();

/// An accumulator's sums on a device: what is added to them there, and nobody waits for.
class Sums {
 public:
  Sums() = default;
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;
  virtual ~Sums() = default;

  virtual const Device& device() const = 0;
  /// Updates enqueued so far; the first is number 0.
  virtual std::int64_t updates() const = 0;
  /// Waits for all of them. Returns the number of the first that was refused, whose part and that
  /// of all behind it is not in the sums, or -1.
  virtual std::int64_t wait() = 0;
  /// Replaces `count` of the sums from number `first` on.
  virtual void upload(std::size_t first, const double* from, std::size_t count) = 0;
  /// Waits, and copies `count` of the sums from number `first` on to the host.
  virtual void download(std::size_t first, double* to, std::size_t count) = 0;
};

/// How many sums may take turns.
constexpr std::size_t kMaxTurns = 8;

/// As many zeros in the device's memory.
std::unique_ptr<Sums> make_sums(const Device& device, std::size_t size);

/// Adds, image after image, every head's result to sums (heads, HeadScorer::result_size), image i
/// to those of number i modulo their number. Refuses what holds a value that is not finite, or with
/// moments is beyond `max_magnitude`. Does not wait.
void score(const TensorView& q, const TensorView& k, std::int64_t gamma, bool moments,
           double max_magnitude, const std::vector<Sums*>& sums);

/// The first element, row-major, that is not finite, or the largest magnitude.
struct Scan {
  std::int64_t index = -1;  ///< -1: all are finite
  double value = 0;         ///< the element, or the largest magnitude
};
/// Waits for the stream.
Scan scan(const TensorView& view);

/// Which rows of x (..., dim) count, for each of the sums in turn.
struct MomentRows {
  TensorView x;
  bool normalise = false;  ///< to √dim over the row's norm
  bool center = false;     ///< and before that less its mean
  /// Above 1, or with several sums, x is (images, tokens, dim), and image b belongs to sums
  /// b mod S. Of sums s, image number j (b = s + jS) gives the tokens n ≡ phases[s] + j (mod
  /// stride).
  std::int64_t stride = 1;
  std::vector<std::int64_t> phases;  ///< one for each of the sums
};

/// Adds Σ x (dim values) and behind it Σ x xᵀ (packed) over the rows to each of the sums. Products
/// of float64 in float64, of all else in float32 over at most 4,096 rows, or where float32 cannot
/// hold them in float64. Refuses what is not finite or larger than `max_magnitude`. Does not wait.
void moments(const MomentRows& rows, double max_magnitude, const std::vector<Sums*>& sums);

/// Moves the kept slices; `to` has the result's shape and strides. Does not wait.
void compact(const MutableTensorView& tensor, const MutableTensorView& to, std::size_t axis,
             const std::vector<std::int64_t>& keep);

}  // namespace secateur::cuda
