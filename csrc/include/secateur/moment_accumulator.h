// First and second moments of a layer's features over a stream of batches.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace secateur {

class DeviceState;

/// How a row is normalised before it is accumulated, without weights and eps: not at all, x √dim /
/// ‖x‖ (RMSNorm), or the same for x minus its mean (LayerNorm). A row of norm 0 stays 0.
enum class RowNorm { none, rms, layer };

/// Which rows of a batch are accumulated, and how they are normalised.
struct RowOptions {
  RowNorm norm = RowNorm::none;
  /// Above 1, the batch is (images, tokens, dim), and of image b only the tokens n ≡ phase + b (mod
  /// stride) are used.
  std::int64_t stride = 1;  ///< at most 2^31
  std::int64_t phase = 0;   ///< at least 0
};

struct MomentAccumulatorState {
  std::int64_t rows = 0;
  std::vector<double> sum;            ///< (dim): Σ x
  std::vector<double> second_moment;  ///< (dim(dim+1)/2): Σ x xᵀ, upper triangle row by row
};

/// Accumulates the number of rows, Σ x and Σ x xᵀ over all batches.
///
/// float32, float16 and bfloat16 rows are multiplied in float32, at most 4,096 rows at a time, and
/// added up in float64; float64 rows (and magnitudes that float32 products cannot hold) are
/// multiplied in float64. Float32 products below 1e-38 are lost in sums with ordinary ones. The
/// sums have the same bits for any number of threads.
///
/// Not synchronised: use an object from one thread at a time. A moved-from object can only be
/// assigned to or destroyed.
class SECATEUR_API MomentAccumulator {
 public:
  /// name: a prefix of every error of this object. Throws InvalidArgument.
  explicit MomentAccumulator(std::int64_t dim, std::string name = "");

  MomentAccumulator(const MomentAccumulator& other);
  MomentAccumulator& operator=(const MomentAccumulator& other);
  MomentAccumulator(MomentAccumulator&&) noexcept;
  MomentAccumulator& operator=(MomentAccumulator&&) noexcept;
  ~MomentAccumulator();

  /// Adds every row of x: (…, dim), at least one axis, any strides and dtype, on the CPU, or on a
  /// CUDA device if the build has CUDA (see runtime.h). The device then multiplies on x's stream,
  /// and the call waits for it. The sums stay on the device until they are asked for.
  /// Throws InvalidArgument, Unsupported (another device), NumericalError (NaN, Inf, or a
  /// magnitude above 1e120 in the rows; on a device, of rows with a norm, Σ x² above 1e240 of one
  /// row) or Error (a device that fails); the object is then as it was before the call.
  void update(const TensorView& x, const RowOptions& options = {});

  /// Adds image i of x (images, tokens, dim) to accumulator i mod n, for n different accumulators
  /// (1 to 8) with the same dim; on a device in one pass. options[s] applies to the images of
  /// accumulator s; norm and stride are the same for all. `wait` and errors are as in
  /// AttentionScorer::update_in_turn.
  static void update_in_turn(const std::vector<MomentAccumulator*>& accumulators,
                             const TensorView& x, const std::vector<RowOptions>& options,
                             bool wait = true);

  /// Waits for the work that update_in_turn() has enqueued. Throws NumericalError and Error as
  /// update_in_turn() would with `wait`.
  void wait() const;

  /// Adds the sums of another accumulator with the same dim.
  void merge(const MomentAccumulator& other);

  /// (dim) and (dim, dim, full symmetric) sums over rows.
  const std::vector<double>& sum() const { return state().sum; }
  std::vector<double> second_moment() const;

  /// Waits as wait() does.
  const MomentAccumulatorState& state() const;
  /// Writes the values of state() to the caller's memory, `sum` of (dim) and `second_moment` of
  /// (dim(dim+1)/2), from a device without an intermediate copy. Waits as wait() does.
  void copy_state(double* sum, double* second_moment) const;
  /// Replaces everything accumulated; checked as in AttentionScorer::load_state.
  void load_state(MomentAccumulatorState state);

  std::int64_t dim() const { return dim_; }
  const std::string& name() const { return name_; }
  /// Includes rows that were only enqueued.
  std::int64_t rows() const { return state_.rows; }

 private:
  std::string label(const char* argument) const;
  /// The images of a batch that belong to this object: first, first + step, ….
  struct Turn {
    std::int64_t first = 0, step = 1;
  };
  void check_magnitudes(const TensorView& x, const RowOptions& options, Turn turn) const;
  bool check_batch(const TensorView& x, const RowOptions& options) const;
  void update_on_host(const TensorView& batch, const RowOptions& options, Turn turn);
  static void update_on_device(const std::vector<MomentAccumulator*>& accumulators,
                               const TensorView& x, const std::vector<RowOptions>& options,
                               bool wait);
  std::size_t sum_size() const;
  std::size_t moment_size() const;
  bool is_sound() const;
  void bring_home() const;
  void go_home();

  std::int64_t dim_;
  std::string name_;
  // For sums on a device, state_ has the counts, and the values only after they were asked for;
  // before that, if nothing was added on the host, its vectors are empty instead of zero.
  mutable MomentAccumulatorState state_;
  mutable std::unique_ptr<DeviceState> device_;
};

}  // namespace secateur
