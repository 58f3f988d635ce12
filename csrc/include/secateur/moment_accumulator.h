// First and second moments of a layer's features over a stream of batches.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace secateur {

/// What a row goes through before it is accumulated, as in a norm without weights and eps: nothing,
/// x √dim / ‖x‖ (RMSNorm), or that of x less its mean (LayerNorm). A row of norm 0 stays 0.
enum class RowNorm { none, rms, layer };

/// Which rows of a batch count, and how.
struct RowOptions {
  RowNorm norm = RowNorm::none;
  /// Above 1, the batch is (images, tokens, dim), and image b gives the tokens n ≡ phase + b
  /// (mod stride) alone.
  std::int64_t stride = 1;  ///< at most 2^31
  std::int64_t phase = 0;   ///< at least 0
};

struct MomentAccumulatorState {
  std::int64_t rows = 0;
  std::vector<double> sum;            ///< (dim): Σ x
  std::vector<double> second_moment;  ///< (dim(dim+1)/2): Σ x xᵀ, upper triangle row by row
};

/// Accumulates the rows, Σ x and Σ x xᵀ of everything it is shown.
///
/// float32, float16 and bfloat16 rows are multiplied in float32, at most 4,096 rows at a time, and
/// added up in float64; float64 rows (and magnitudes that float32 products cannot hold) are
/// multiplied in float64. Float32 products below 1e-38 beside ordinary ones are lost. The sums have
/// the same bits for any number of threads.
///
/// Not synchronised: one object is for one thread at a time.
class SECATEUR_API MomentAccumulator {
 public:
  /// name: put in front of every error of this object. Throws InvalidArgument.
  explicit MomentAccumulator(std::int64_t dim, std::string name = "");

  /// Adds every row of x: (…, dim), at least one axis, any strides and dtype, on the CPU, or on a
  /// CUDA device where the build has CUDA (see runtime.h): multiplied there, on x's stream, waited
  /// for, and added to the sums on the host.
  /// Throws InvalidArgument, Unsupported (another device), NumericalError (NaN, Inf, or a
  /// magnitude above 1e120 in the rows) or Error (a device that fails); the object is then as it
  /// was before the call.
  void update(const TensorView& x, const RowOptions& options = {});

  /// Adds what another accumulator of the same dim has seen.
  void merge(const MomentAccumulator& other);

  /// (dim) and (dim, dim, full symmetric) sums over rows.
  const std::vector<double>& sum() const { return state_.sum; }
  std::vector<double> second_moment() const;

  const MomentAccumulatorState& state() const { return state_; }
  /// Replaces everything accumulated; checked as in AttentionScorer::load_state.
  void load_state(MomentAccumulatorState state);

  std::int64_t dim() const { return dim_; }
  const std::string& name() const { return name_; }
  std::int64_t rows() const { return state_.rows; }

 private:
  std::string label(const char* argument) const;
  void check_magnitudes(const TensorView& x) const;
  void update_on_device(const TensorView& x, const RowOptions& options,
                        const std::vector<std::int64_t>& offsets);

  std::int64_t dim_;
  std::string name_;
  MomentAccumulatorState state_;
};

}  // namespace secateur
