// Scores one head of one image: what AttentionScorer does in parallel.
#pragma once

#include <secateur/tensor.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.h"

namespace secateur {

/// Where a head's Grams go, packed, in units of the input; all null where they are not wanted.
struct HeadMoments {
  double* query_gram = nullptr;
  double* key_gram = nullptr;
  double* score_gram = nullptr;
};

/// Owns the memory that one thread needs for it.
class HeadScorer {
 public:
  HeadScorer(std::size_t tokens, std::size_t head_dim);

  /// ω of one head of (images, tokens, heads, head_dim) into scores[head_dim].
  /// False when the eigenvalue iteration does not converge.
  bool score(const TensorView& q, const TensorView& k, std::int64_t image, std::int64_t head,
             std::size_t gamma, double* scores, const HeadMoments& moments);

 private:
  /// The upper triangle of the Gram of the input times a power of two, whose square it returns.
  double gram(const TensorView& x, std::int64_t image, std::int64_t head, bool center, double* out);
  /// Fills the panels and returns the largest magnitude.
  double pack(const TensorView& x, std::int64_t image, std::int64_t head);
  /// From the Gram of centred keys to that of the keys.
  void add_mean(double* gram) const;
  void mirror(double* gram) const;
  void pack_moments(double query_unit, double key_unit, const HeadMoments& moments) const;
  double* panel(std::size_t p);

  std::size_t tokens_;
  std::size_t dim_;
  std::size_t panels_;
  std::size_t ld_;  ///< distance of the Grams' rows: whole panels
  std::vector<std::int64_t> rows_;
  std::vector<std::int64_t> columns_;
  Buffer<double> packed_;
  Buffer<double> query_gram_;
  Buffer<double> key_gram_;
  Buffer<double> mean_;
  Buffer<double> work_;
};

}  // namespace secateur
