// Scores some heads of a batch: what AttentionScorer does in parallel.
#pragma once

#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"
#include "buffer.h"

namespace secateur {

/// Fourth powers of this, over 1e60 tokens, still fit into float64.
constexpr double kMaxMomentMagnitude = 1e60;

/// And Grams up to this.
constexpr double kMaxGramMagnitude = 1e130;

/// Heads by their Grams: AttentionScorer::update_grams's arguments, checked.
struct HeadGrams {
  const TensorView& query;
  const TensorView& key;
  const TensorView& key_mean;
  std::size_t tokens;
};

/// Owns the memory that one thread needs for it. Heads are numbered image * heads + head.
class HeadScorer {
 public:
  /// q, k: (images, tokens, heads, head_dim), checked; they must outlive the object.
  HeadScorer(const TensorView& q, const TensorView& k, std::size_t gamma, bool moments);
  /// The same from Grams.
  HeadScorer(const HeadGrams& grams, std::size_t gamma, bool moments);

  /// How many heads are scored best in one call, and at most.
  static std::size_t lanes(std::size_t head_dim);

  /// Doubles per head: ω, and with moments QᵀQ, K_cᵀK_c and their elementwise product, packed.
  static std::size_t result_size(std::size_t head_dim, bool moments);

  /// Scores heads [first, first + count). A head's result does not depend on the others.
  /// False when a value is not finite, or with moments beyond kMaxMomentMagnitude, or when an
  /// eigenvalue iteration does not converge.
  bool score(std::size_t first, std::size_t count, double* results);

 private:
  HeadScorer(std::size_t tokens, std::size_t heads, std::size_t dim, std::size_t gamma,
             bool moments, std::size_t packed_rows);

  /// A Gram of the input times a power of two, whose square is `unit`.
  struct Gram {
    Buffer<double> values;  ///< upper triangle
    double unit = 1;
  };

  /// Both Grams of a head as the kernels want them; its moments where they are wanted. False for
  /// values that score() does not take.
  bool load(std::size_t head, double* moments);
  bool gram(const TensorView& x, std::size_t head, bool center, Gram& out);
  /// Both Grams and mean_ as they were given.
  bool read_grams(std::size_t head);
  void pack(const TensorView& x, std::size_t head);
  /// Multiplies the panels by a factor, a power of two, that brings the largest magnitude, which it
  /// returns, into [1, 2).
  double rescale(double* factor);
  /// From the Gram of centred keys to that of the keys.
  void add_mean(Gram& gram) const;
  /// Gives neuron i of queries and of keys the same norm, and the largest about 1, by powers of
  /// two: Q Kᵀ stays what it is up to one of them. Neurons without a part in it become 0.
  void balance();
  void mirror(Gram& gram) const;
  void pack_moments(double* out) const;
  void to_lane(const Gram& gram, std::size_t lane, double* out) const;
  /// One head by itself: of a size, or with singular values, that lanes do not suit.
  bool score_alone(std::size_t head, double* scores, double* moments);
  double* panel(std::size_t p) { return packed_.data() + p * tokens_ * cpu::kPanelF64; }

  const TensorView* q_ = nullptr;  ///< and k_, or grams_
  const TensorView* k_ = nullptr;
  const HeadGrams* grams_ = nullptr;
  std::size_t tokens_;
  std::size_t heads_;
  std::size_t dim_;
  std::size_t limit_;  ///< singular triplets that may count
  bool moments_;
  std::size_t panels_;
  std::size_t ld_;  ///< distance of the Grams' rows: whole panels
  std::vector<std::int64_t> rows_;
  std::vector<std::int64_t> columns_;
  Buffer<double> packed_;
  Gram query_gram_;
  Gram key_gram_;
  Buffer<double> mean_;
  std::vector<int> exponents_;
  std::vector<double> query_factors_, key_factors_;
  std::size_t lanes_;
  Buffer<double> query_lanes_;
  Buffer<double> key_lanes_;
  Buffer<double> scores_;
  Buffer<double> work_;
};

}  // namespace secateur
