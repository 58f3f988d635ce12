#include "reference.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace reference {
namespace {

double column_dot(const Matrix& a, std::size_t i, const Matrix& b, std::size_t j) {
  long double sum = 0;
  for (std::size_t r = 0; r < a.rows; ++r) sum += static_cast<long double>(a(r, i)) * b(r, j);
  return static_cast<double>(sum);
}

void rotate(Matrix& a, std::size_t i, std::size_t j, double c, double s) {
  for (std::size_t r = 0; r < a.rows; ++r) {
    const double x = a(r, i), y = a(r, j);
    a(r, i) = c * x - s * y;
    a(r, j) = s * x + c * y;
  }
}

/// One-sided Jacobi: turns a's columns into σ_j u_j, and v's (from the identity) into v_j.
void jacobi(Matrix& a, Matrix& v) {
  const std::size_t n = a.columns;
  for (std::size_t i = 0; i < n; ++i) v(i, i) = 1;
  const double floor =
      1e-40 * std::inner_product(a.values.begin(), a.values.end(), a.values.begin(), 0.0);
  for (int sweep = 0; sweep < 60; ++sweep) {
    bool done = true;
    for (std::size_t i = 0; i + 1 < n; ++i) {
      for (std::size_t j = i + 1; j < n; ++j) {
        const double alpha = column_dot(a, i, a, i), beta = column_dot(a, j, a, j);
        const double gamma = column_dot(a, i, a, j);
        if (std::fabs(gamma) <= 1e-15 * std::sqrt(alpha * beta) + floor) continue;
        done = false;
        const double zeta = (beta - alpha) / (2 * gamma);
        const double t = std::copysign(1.0, zeta) / (std::fabs(zeta) + std::hypot(1.0, zeta));
        const double c = 1 / std::hypot(1.0, t), s = c * t;
        rotate(a, i, j, c, s);
        rotate(v, i, j, c, s);
      }
    }
    if (done) return;
  }
}

}  // namespace

Scores attention_scores(const Matrix& q, const Matrix& k, std::size_t gamma) {
  const std::size_t n = q.rows, d = q.columns;
  Matrix scores(n, n), v(n, n);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      long double sum = 0;
      for (std::size_t c = 0; c < d; ++c) sum += static_cast<long double>(q(i, c)) * k(j, c);
      scores(i, j) = static_cast<double>(sum);
    }
  }
  jacobi(scores, v);
  std::vector<double> sigma(n);
  for (std::size_t j = 0; j < n; ++j) sigma[j] = std::sqrt(column_dot(scores, j, scores, j));
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return sigma[a] > sigma[b]; });

  Scores result;
  result.omega.assign(d, 0.0);
  const double largest = sigma[order[0]];
  if (largest == 0) return result;
  const std::size_t limit = std::min({gamma, n, d});
  for (std::size_t rank = 0; rank < limit; ++rank) {
    const std::size_t j = order[rank];
    const double ratio = sigma[j] / largest;
    if (ratio > 0.5e-7 && ratio < 2e-7) result.comparable = false;
    if (ratio <= 1e-7) break;
    if (rank + 1 < n && sigma[order[rank + 1]] > (1 - 1e-5) * sigma[j]) result.comparable = false;
    for (std::size_t i = 0; i < d; ++i) {
      // ⟨σ u vᵀ, q kᵀ⟩ = σ (u·q)(v·k), and the norms are σ and ‖q‖‖k‖; the column holds σ u.
      const double norm = std::sqrt(column_dot(q, i, q, i)) * std::sqrt(column_dot(k, i, k, i));
      if (norm == 0) continue;
      const double inner = column_dot(scores, j, q, i) * column_dot(v, j, k, i);
      result.omega[i] += std::fabs(inner) / (sigma[j] * norm);
    }
  }
  return result;
}

Matrix gram(const Matrix& x, bool center) {
  Matrix shifted = x;
  for (std::size_t c = 0; c < x.columns && center; ++c) {
    long double sum = 0;
    for (std::size_t r = 0; r < x.rows; ++r) sum += x(r, c);
    for (std::size_t r = 0; r < x.rows; ++r) {
      shifted(r, c) = static_cast<double>(x(r, c) - sum / static_cast<long double>(x.rows));
    }
  }
  Matrix result(x.columns, x.columns);
  for (std::size_t i = 0; i < x.columns; ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      result(i, j) = result(j, i) = column_dot(shifted, i, shifted, j);
    }
  }
  return result;
}

std::vector<double> value_similarity(const Matrix& rows) {
  std::vector<double> scores(rows.rows, 0.0);
  const auto dot = [&](std::size_t a, std::size_t b) {
    long double sum = 0;
    for (std::size_t c = 0; c < rows.columns; ++c) {
      sum += static_cast<long double>(rows(a, c)) * rows(b, c);
    }
    return static_cast<double>(sum);
  };
  for (std::size_t a = 0; a < rows.rows; ++a) {
    const double mine = std::sqrt(dot(a, a));
    if (mine == 0) continue;
    for (std::size_t b = 0; b < rows.rows; ++b) {
      if (a == b) continue;
      const double theirs = std::sqrt(dot(b, b));
      scores[a] += theirs > 0 ? 1 - std::fabs(dot(a, b)) / (mine * theirs) : 1;
    }
  }
  return scores;
}

Elimination eliminate(const Matrix& inverse, const Matrix& weights, std::size_t count) {
  const std::size_t n = weights.rows, outputs = weights.columns;
  std::vector<long double> a(inverse.values.begin(), inverse.values.end());
  std::vector<long double> w(weights.values.begin(), weights.values.end());
  std::vector<bool> alive(n, true);
  Elimination result;
  for (std::size_t step = 0; step < count; ++step) {
    std::size_t best = n;
    long double least = 0;
    for (std::size_t i = 0; i < n; ++i) {
      if (!alive[i]) continue;
      long double cost = 0;
      for (std::size_t o = 0; o < outputs; ++o) cost += w[i * outputs + o] * w[i * outputs + o];
      cost /= a[i * n + i];
      if (best == n || cost < least) {
        best = i;
        least = cost;
      }
    }
    alive[best] = false;
    result.order.push_back(static_cast<std::int64_t>(best));
    result.costs.push_back(static_cast<double>(least));
    const long double pivot = a[best * n + best];
    const std::vector<long double> row(a.begin() + static_cast<std::ptrdiff_t>(best * n),
                                       a.begin() + static_cast<std::ptrdiff_t>((best + 1) * n));
    for (std::size_t i = 0; i < n; ++i) {
      if (!alive[i]) continue;
      const long double factor = row[i] / pivot;
      for (std::size_t o = 0; o < outputs; ++o)
        w[i * outputs + o] -= factor * w[best * outputs + o];
      for (std::size_t j = 0; j < n; ++j) a[i * n + j] -= factor * row[j];
    }
  }
  return result;
}

Matrix solve(const Matrix& a, const Matrix& b) {
  const std::size_t n = a.rows, columns = b.columns;
  std::vector<long double> left(a.values.begin(), a.values.end());
  std::vector<long double> right(b.values.begin(), b.values.end());
  for (std::size_t j = 0; j < n; ++j) {
    for (std::size_t i = 0; i < n; ++i) {
      if (i == j) continue;
      const long double factor = left[i * n + j] / left[j * n + j];
      for (std::size_t k = j; k < n; ++k) left[i * n + k] -= factor * left[j * n + k];
      for (std::size_t c = 0; c < columns; ++c) {
        right[i * columns + c] -= factor * right[j * columns + c];
      }
    }
  }
  Matrix result(n, columns);
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t c = 0; c < columns; ++c) {
      result(i, c) = static_cast<double>(right[i * columns + c] / left[i * n + i]);
    }
  }
  return result;
}

}  // namespace reference
