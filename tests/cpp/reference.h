// Literal forms of the formulas: scalar, float64, nothing shared with the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace reference {

/// Row-major.
struct Matrix {
  Matrix(std::size_t r, std::size_t c) : rows(r), columns(c), values(r * c) {}
  double& operator()(std::size_t i, std::size_t j) { return values[i * columns + j]; }
  double operator()(std::size_t i, std::size_t j) const { return values[i * columns + j]; }

  std::size_t rows;
  std::size_t columns;
  std::vector<double> values;
};

struct Scores {
  std::vector<double> omega;
  /// False where the score is ill-defined: singular values that count (or the first that does not)
  /// tie within 1e-5, or one is within a factor of two of the cutoff at 1e-7.
  bool comparable = true;
};

/// SNP's ω_i = Σ_{j ≤ γ} |cos(σ_j u_j v_jᵀ, q_i k_iᵀ)| (Frobenius) by the SVD of the (N, N) QKᵀ.
Scores attention_scores(const Matrix& q, const Matrix& k, std::size_t gamma);

/// xᵀx; first less each column's mean where `center`.
Matrix gram(const Matrix& x, bool center);

/// Σ over all other rows of 1 − |cos|.
std::vector<double> value_similarity(const Matrix& rows);

struct Elimination {
  std::vector<std::int64_t> order;
  std::vector<double> costs;
};

/// One input after the other, C⁻¹ and the weights downdated whole, in long double.
Elimination eliminate(const Matrix& inverse, const Matrix& weights, std::size_t count);

/// a⁻¹ b of a symmetric positive definite a, by elimination in long double.
Matrix solve(const Matrix& a, const Matrix& b);

}  // namespace reference
