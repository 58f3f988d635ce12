// SNP's importance of query/key neurons (Shim et al., ECCV 2024, arXiv:2404.11630).
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace secateur {

class DeviceState;

/// Everything an AttentionScorer has accumulated: sums over images, float64, row-major.
/// A packed matrix is its upper triangle, row by row: (0,0) (0,1) … (0,d-1) (1,1) ….
struct AttentionScorerState {
  std::int64_t images = 0;
  std::int64_t tokens = 0;         ///< over all images
  std::vector<double> score_sum;   ///< (heads, head_dim)
  std::vector<double> query_gram;  ///< (heads, d(d+1)/2), with moments only: Σ QᵀQ
  std::vector<double> key_gram;    ///< Σ K_cᵀK_c, keys centred over each image's tokens
  std::vector<double> score_gram;  ///< Σ (QᵀQ)∘(K_cᵀK_c)
};

/// Scores the query/key neurons of one attention layer over a stream of images.
///
/// For an image and a head, QKᵀ = Σ_i q_i k_iᵀ = Σ_j σ_j u_j v_jᵀ, and neuron i scores
///     ω_i = Σ_{j ≤ min(γ, N, d), σ_j > 1e-7 σ_1} |cos(u_j, q_i)| |cos(v_j, k_i)|,
/// computed from the d×d Gram matrices in float64. A neuron or head of zero norm scores 0; in
/// float64 inputs, values below 1e-150 of a head's largest magnitude count as zero. The score of a
/// layer is the mean over images. Images are added in order, one by one, so the sums have the same
/// bits for any split into batches and any number of threads.
///
/// Not synchronised: use an object from one thread at a time. A moved-from object can only be
/// assigned to or destroyed.
class SECATEUR_API AttentionScorer {
 public:
  /// gamma: leading singular triplets that count. moments: also accumulate the Grams.
  /// name: a prefix of every error of this object. Throws InvalidArgument.
  AttentionScorer(std::int64_t heads, std::int64_t head_dim, std::int64_t gamma = 8,
                  bool moments = false, std::string name = "");

  AttentionScorer(const AttentionScorer& other);
  AttentionScorer& operator=(const AttentionScorer& other);
  AttentionScorer(AttentionScorer&&) noexcept;
  AttentionScorer& operator=(AttentionScorer&&) noexcept;
  ~AttentionScorer();

  /// Adds a batch. q, k: (images, tokens, heads, head_dim), the same shape, any strides and dtype,
  /// on the CPU, or both on one CUDA device if the build has CUDA (see runtime.h) and head_dim is
  /// at most 128. The device then computes on q's stream, and the call waits for it. The sums stay
  /// on the device until they are asked for. Throws InvalidArgument, Unsupported (another device),
  /// NumericalError (NaN, Inf; with moments also magnitudes above 1e60) or Error (a device that
  /// fails); the object is then as it was before the call.
  void update(const TensorView& q, const TensorView& k);

  /// Adds image i of a batch to scorer i mod n, for n different scorers (1 to 8) with the same
  /// heads, head_dim, gamma and moments; on a device in one pass. Without `wait`, a call for CUDA
  /// tensors returns when the work is enqueued on q's stream, and values that are not finite (or
  /// too large) are reported by the scorer's wait(), or by any function that asks for its sums; the
  /// scorer is then as it was before the first of its batches with such a value. The memory must
  /// not change until the stream has read it. Throws as update(), but scorers whose own images are
  /// valid may have added them.
  static void update_in_turn(const std::vector<AttentionScorer*>& scorers, const TensorView& q,
                             const TensorView& k, bool wait = true);

  /// Waits for the work that update_in_turn() has enqueued. Throws NumericalError and Error as
  /// update_in_turn() would with `wait`.
  void wait() const;

  /// Adds a batch by its Gram matrices, for programs that already have them or whose queries and
  /// keys are on a device where the library cannot compute. query_gram, key_gram: (images, heads,
  /// head_dim, head_dim), QᵀQ and K_cᵀK_c of keys minus their mean over the image's tokens; only
  /// the upper triangles are read. Use float64 from the first product on, or the scores of trained
  /// models are lost to rounding. key_mean: (images, heads, head_dim), that mean. tokens: of each
  /// image, at least 1. All on the CPU. Throws as update() does.
  void update_grams(const TensorView& query_gram, const TensorView& key_gram,
                    const TensorView& key_mean, std::int64_t tokens);

  /// Adds the sums of another scorer with the same heads, head_dim, gamma and moments.
  void merge(const AttentionScorer& other);

  /// (heads, head_dim) mean scores. Throws InvalidArgument if no image has been added.
  std::vector<double> scores() const;

  /// (heads, head_dim, head_dim) sums, full symmetric. They throw InvalidArgument without moments.
  std::vector<double> query_gram() const;
  std::vector<double> key_gram() const;
  std::vector<double> score_gram() const;

  /// Waits as wait() does.
  const AttentionScorerState& state() const;
  /// Replaces everything accumulated. Throws InvalidArgument for sizes or counts that do not fit
  /// this object and NumericalError for a value that is not finite, before anything is replaced.
  void load_state(AttentionScorerState state);

  std::int64_t heads() const { return heads_; }
  std::int64_t head_dim() const { return head_dim_; }
  std::int64_t gamma() const { return gamma_; }
  bool moments() const { return moments_; }
  const std::string& name() const { return name_; }
  /// Includes images that were only enqueued.
  std::int64_t images() const { return state_.images; }

 private:
  std::string label(const char* argument) const;
  void check_batch(const TensorView& q, const TensorView& k) const;
  void check_same(const AttentionScorer& other, const char* argument) const;
  void check_values(const TensorView& q, const TensorView& k) const;
  void update_on_host(const TensorView& q, const TensorView& k);
  std::vector<double> results() const;
  bool is_sound() const;
  void bring_home() const;
  void go_home();
  std::vector<double> full(const std::vector<double>& packed, const char* what) const;

  std::int64_t heads_;
  std::int64_t head_dim_;
  std::int64_t gamma_;
  bool moments_;
  std::string name_;
  // For sums on a device, state_ has the counts, and the values only after they were asked for.
  mutable AttentionScorerState state_;
  mutable std::unique_ptr<DeviceState> device_;
};

}  // namespace secateur
