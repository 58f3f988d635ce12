// SNP's ω from two Gram matrices, without a factor of the second and without an N×N matrix:
// G_q = L Lᵀ, T = Lᵀ G_k L = Σ_j s_j² w_j w_jᵀ, y_j = L w_j, and then
// ω_i = Σ_j |y_ij| |(G_k y_j)_i| / s_j / sqrt((G_q)_ii (G_k)_ii).
#include "vec.h"

namespace secateur::cpu {
namespace {

constexpr double kEpsilon = 0x1p-52;
constexpr int kMaxIterations = 60;

inline double square_root(double x) { return __builtin_sqrt(x); }

// a = Uᵀ U, U upper triangular over a's upper triangle. A pivot lost to rounding gives a zero row.
void cholesky(double* a, size_t d, size_t ld) {
  for (size_t j = 0; j < d; ++j) a[j * ld + j] *= 1 + kRidge;
  for (size_t j = 0; j < d; ++j) {
    double* row = a + j * ld;
    const double pivot = row[j];
    const double inverse = pivot > 0 ? 1 / square_root(pivot) : 0;
    for (size_t i = j; i < d; ++i) row[i] *= inverse;
    for (size_t i = j + 1; i < d; ++i) axpy(-row[i], row + i, a + i * ld + i, d - i);
  }
}

// t = U g Uᵀ, both triangles; `product` is room for U g.
void congruence(const double* u, const double* g, size_t d, size_t ld, double* product, double* t) {
  for (size_t i = 0; i < d; ++i) {
    double* row = product + i * ld;
    for (size_t j = 0; j < d; ++j) row[j] = 0;
    for (size_t k = i; k < d; ++k) axpy(u[i * ld + k], g + k * ld, row, d);
    for (size_t j = 0; j <= i; ++j) {
      t[i * ld + j] = t[j * ld + i] = dot(row + j, u + j * ld + j, d - j);
    }
  }
}

// Householder reflections to tridiagonal form. `a` (both triangles) is destroyed; reflection k,
// I - beta[k] v vᵀ, has its v in reflectors[k * ld + k + 1 …].
void tridiagonalise(double* a, size_t d, size_t ld, double* reflectors, double* beta,
                    double* diagonal, double* off_diagonal, double* room) {
  for (size_t k = 0; k + 1 < d; ++k) {
    diagonal[k] = a[k * ld + k];
    const size_t first = k + 1, n = d - first;
    double* v = reflectors + k * ld + first;
    for (size_t i = 0; i < n; ++i) v[i] = a[k * ld + first + i];
    const double tail = dot(v + 1, v + 1, n - 1);
    if (tail < kTrivial) {
      off_diagonal[k] = v[0];
      beta[k] = 0;
      continue;
    }
    const double norm = square_root(v[0] * v[0] + tail);
    const double alpha = v[0] > 0 ? -norm : norm;  // away from cancellation
    v[0] -= alpha;
    off_diagonal[k] = alpha;
    beta[k] = 2 / (v[0] * v[0] + tail);

    double* p = room;
    for (size_t i = 0; i < n; ++i) p[i] = beta[k] * dot(a + (first + i) * ld + first, v, n);
    const double shift = beta[k] / 2 * dot(p, v, n);
    axpy(-shift, v, p, n);
    for (size_t i = 0; i < n; ++i) {
      double* row = a + (first + i) * ld + first;
      const double vi = v[i], pi = p[i];
      for (size_t j = 0; j < n; ++j) row[j] -= vi * p[j] + pi * v[j];
    }
  }
  diagonal[d - 1] = a[(d - 1) * ld + d - 1];
  off_diagonal[d - 1] = 0;
}

// Implicit QL with Wilkinson's shift. On return row i of `vectors` is the eigenvector of
// diagonal[i] in the tridiagonal matrix's basis.
bool diagonalise(double* diagonal, double* off_diagonal, size_t d, size_t ld, double* vectors) {
  double norm = 0;
  for (size_t i = 0; i < d; ++i) {
    for (size_t j = 0; j < d; ++j) vectors[i * ld + j] = i == j ? 1 : 0;
    norm += __builtin_fabs(diagonal[i]) + __builtin_fabs(off_diagonal[i]);
  }
  const double noise = 0x1p-60 * norm;
  for (size_t l = 0; l < d; ++l) {
    for (int iteration = 0;; ++iteration) {
      size_t m = l;
      for (; m + 1 < d; ++m) {
        const double scale = __builtin_fabs(diagonal[m]) + __builtin_fabs(diagonal[m + 1]);
        const double size = __builtin_fabs(off_diagonal[m]);
        if (size <= kEpsilon * scale || size <= noise) break;
      }
      if (m == l) break;
      if (iteration == kMaxIterations) return false;

      double g = (diagonal[l + 1] - diagonal[l]) / (2 * off_diagonal[l]);
      double r = square_root(g * g + 1);
      g = diagonal[m] - diagonal[l] + off_diagonal[l] / (g + (g < 0 ? -r : r));
      double s = 1, c = 1, p = 0;
      bool split = false;
      for (size_t i = m; i-- > l;) {
        const double f = s * off_diagonal[i];
        const double b = c * off_diagonal[i];
        r = square_root(f * f + g * g);
        off_diagonal[i + 1] = r;
        if (r == 0) {
          diagonal[i + 1] -= p;
          off_diagonal[m] = 0;
          split = true;
          break;
        }
        s = f / r;
        c = g / r;
        g = diagonal[i + 1] - p;
        r = (diagonal[i] - g) * s + 2 * c * b;
        p = s * r;
        diagonal[i + 1] = g + p;
        g = c * r - b;
        double* __restrict low = vectors + i * ld;
        double* __restrict high = vectors + (i + 1) * ld;
        for (size_t k = 0; k < d; ++k) {
          const double x = high[k], y = low[k];
          high[k] = s * y + c * x;
          low[k] = c * y - s * x;
        }
      }
      if (split) continue;
      diagonal[l] -= p;
      off_diagonal[l] = g;
      off_diagonal[m] = 0;
    }
  }
  return true;
}

// Puts the `count` largest eigenvalues first, in descending order; order[] holds their rows.
void leading(const double* values, size_t d, size_t count, double* order) {
  for (size_t j = 0; j < d; ++j) order[j] = static_cast<double>(j);
  for (size_t j = 0; j < count; ++j) {
    size_t best = j;
    for (size_t i = j + 1; i < d; ++i) {
      if (values[static_cast<size_t>(order[i])] > values[static_cast<size_t>(order[best])]) {
        best = i;
      }
    }
    const double row = order[j];
    order[j] = order[best];
    order[best] = row;
  }
}

bool omega(size_t d, size_t ld, size_t limit, double* query_gram, double* key_gram, double* work,
           double* out) {
  double* reflectors = work;
  double* matrix = reflectors + ld * ld;
  double* norms = matrix + ld * ld;
  double* beta = norms + ld;
  double* values = beta + ld;
  double* off_diagonal = values + ld;
  double* room = off_diagonal + ld;
  double* y = room + ld;

  for (size_t i = 0; i < d; ++i) {
    norms[i] = square_root(query_gram[i * ld + i]) * square_root(key_gram[i * ld + i]);
    out[i] = 0;
  }
  cholesky(query_gram, d, ld);
  congruence(query_gram, key_gram, d, ld, reflectors, matrix);
  tridiagonalise(matrix, d, ld, reflectors, beta, values, off_diagonal, room);
  double* vectors = matrix;
  if (!diagonalise(values, off_diagonal, d, ld, vectors)) return false;

  double* order = room;
  leading(values, d, limit, order);
  const double largest = values[static_cast<size_t>(order[0])];
  if (!(largest > 0)) return true;
  for (size_t j = 0; j < limit; ++j) {
    const size_t row = static_cast<size_t>(order[j]);
    if (!(values[row] > kCutoff * largest)) break;
    double* w = vectors + row * ld;
    for (size_t k = d - 1; k-- > 0;) {
      const double* v = reflectors + k * ld + k + 1;
      axpy(-beta[k] * dot(v, w + k + 1, d - k - 1), v, w + k + 1, d - k - 1);
    }
    for (size_t i = 0; i < d; ++i) y[i] = 0;
    for (size_t k = 0; k < d; ++k) axpy(w[k], query_gram + k * ld + k, y + k, d - k);
    const double inverse = 1 / square_root(values[row]);
    for (size_t i = 0; i < d; ++i) {
      out[i] += __builtin_fabs(y[i] * dot(key_gram + i * ld, y, d)) * inverse;
    }
  }
  for (size_t i = 0; i < d; ++i) out[i] = norms[i] > 0 ? out[i] / norms[i] : 0;
  return true;
}

}  // namespace

const ScoreKernels SECATEUR_TABLE(score) = {omega};

}  // namespace secateur::cpu
