// SNP's ω (see score.cc) for as many small matrices as a vector has doubles, one in each lane.
// Every step is the same for all lanes and every choice a blend, so that a lane's result does not
// depend on its neighbours. The leading eigenvalues come from bisection, which needs next to no
// division and cannot fail; their vectors from twisted factorisations (Dhillon and Parlett 2004).
#include "vec.h"

namespace secateur::cpu {
namespace {

using V = Vec<double>;
typedef int64_t Mask __attribute__((vector_size(SECATEUR_VECTOR_BYTES)));
typedef uint64_t Bits __attribute__((vector_size(SECATEUR_VECTOR_BYTES)));

constexpr size_t kWidth = kLanes<double>;
// Rows of a register tile: accumulators and operands fit the register file.
constexpr size_t kTileRows = SECATEUR_VECTOR_BYTES == 64 ? 4 : 2;
constexpr size_t kTile = kLaneTile;

// Relative to the largest eigenvalue: the vectors of closer ones would not be orthogonal.
constexpr double kTie = 1e-9;
// Off-diagonal entries squared, of a matrix of norm 1: below is no change, but 0 would end a
// Sturm sequence.
constexpr double kFloor = 0x1p-120;
constexpr double kPivotFloor = 0x1p-100;
constexpr int kHalvings = 60;
constexpr size_t kRescale = 8;

inline V splat(double x) { return x - V{}; }

inline V root(V x) {
  V result = x;
  for (size_t lane = 0; lane < kWidth; ++lane) result[lane] = __builtin_sqrt(x[lane]);
  return result;
}

inline V absolute(V x) {
  return reinterpret_cast<V>(reinterpret_cast<Mask>(x) & INT64_C(0x7fffffffffffffff));
}

// The power of two at or below a positive normal number.
inline V power_of_two(V x) {
  return reinterpret_cast<V>(reinterpret_cast<Mask>(x) & INT64_C(0x7ff0000000000000));
}

inline V inverse_or_zero(V x) { return x > 0 ? 1 / x : V{}; }

// sum[r][c] += Σ_{k < n} a(r, k) b(k, c)
template <size_t kRowCount>
inline void multiply(const V* a, size_t row_step, size_t a_step, const V* b, size_t column_step,
                     size_t b_step, size_t n, V (&sum)[kRowCount][kTile]) {
  for (size_t k = 0; k < n; ++k, a += a_step, b += b_step) {
    V right[kTile];
#pragma GCC unroll 4
    for (size_t c = 0; c < kTile; ++c) right[c] = b[c * column_step];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRowCount; ++r) {
      const V left = a[r * row_step];
#pragma GCC unroll 4
      for (size_t c = 0; c < kTile; ++c) sum[r][c] += left * right[c];
    }
  }
}

// One row of the factor in a tile's columns, from x = the row of a less what the columns before
// took. Rows of the diagonal's own tile (pivot < kTile) end at their pivot, with zeros after it. A
// pivot lost to rounding gives a zero column.
inline void factor_row(const V* tile, size_t ld, size_t pivot, V* inverse, V (&x)[kTile], V* out) {
#pragma GCC unroll 4
  for (size_t c = 0; c < kTile; ++c) {
    if (c == pivot) inverse[c] = inverse_or_zero(root(x[c] > 0 ? x[c] : V{}));
    x[c] *= inverse[c];
    out[c] = c <= pivot ? x[c] : V{};
#pragma GCC unroll 4
    for (size_t e = c + 1; e < kTile; ++e) {
      if (e <= pivot) x[e] -= x[c] * (e == pivot ? x[c] : tile[e * ld + c]);
    }
  }
}

// a = L Lᵀ over a's lower triangle, with zeros above it inside the tiles of the diagonal.
void cholesky(V* a, size_t n, size_t ld) {
  for (size_t i = 0; i < n; ++i) a[i * ld + i] *= 1 + kRidge;
  for (size_t first = 0; first < n; first += kTile) {
    V inverse[kTile] = {};
    const V* tile = a + first * ld + first;
    for (size_t i = first; i < n; i += kTileRows) {
      V sum[kTileRows][kTile] = {};
      multiply(a + i * ld, ld, 1, a + first * ld, ld, 1, first, sum);
      for (size_t r = 0; r < kTileRows; ++r) {
        V* row = a + (i + r) * ld + first;
        V x[kTile];
        for (size_t c = 0; c < kTile; ++c) x[c] = row[c] - sum[r][c];
        factor_row(tile, ld, i + r - first, inverse, x, row);
      }
    }
  }
}

// The product of rows [i, i + kTileRows) of a symmetric matrix, given by its lower triangle with
// the tiles of the diagonal whole, and b(k, c) for k from `first` on.
inline void multiply_symmetric(const V* g, size_t n, size_t ld, size_t i, size_t first, const V* b,
                               size_t b_step, V (&sum)[kTileRows][kTile]) {
  const size_t end = i + kTileRows;
  if (first < end) {
    multiply(g + i * ld + first, ld, 1, b + first * b_step, 1, b_step, end - first, sum);
  }
  const size_t next = first > end ? first : end;
  multiply(g + next * ld + i, 1, ld, b + next * b_step, 1, b_step, n - next, sum);
}

// The lower triangle of t = Lᵀ g L; `panel` is room for kTile columns of g L.
void congruence(const V* l, const V* g, size_t n, size_t ld, V* panel, V* t) {
  for (size_t j = 0; j < n; j += kTile) {
    for (size_t i = 0; i < n; i += kTileRows) {
      V sum[kTileRows][kTile] = {};
      multiply_symmetric(g, n, ld, i, j, l + j, ld, sum);
      for (size_t r = 0; r < kTileRows; ++r) {
        for (size_t c = 0; c < kTile; ++c) panel[(i + r) * kTile + c] = sum[r][c];
      }
    }
    for (size_t i = j; i < n; i += kTileRows) {
      V sum[kTileRows][kTile] = {};
      // Rows above the tile's own are zero in L.
      const size_t top = i - i % kTile;
      multiply(l + top * ld + i, 1, ld, panel + top * kTile, 1, kTile, n - top, sum);
      for (size_t r = 0; r < kTileRows; ++r) {
        for (size_t c = 0; c < kTile; ++c) t[(i + r) * ld + j + c] = sum[r][c];
      }
    }
  }
}

// The reflection under way and the one before it, whose update of the matrix is still to be made.
struct Reflection {
  V* v;  // the one before: a -= v wᵀ + w vᵀ
  V* w;
  V* u;  // this one
  V* y;  // a u
};

// Rows [i, i + kRowCount) of the lower triangle from column `first` on: makes the update, and adds
// what the result contributes to a u. One pass over memory for both.
template <size_t kRowCount>
inline void sweep(V* t, size_t ld, size_t first, size_t i, const Reflection& h) {
  V vi[kRowCount], wi[kRowCount], ui[kRowCount], yi[kRowCount] = {};
#pragma GCC unroll 4
  for (size_t r = 0; r < kRowCount; ++r) {
    vi[r] = h.v[i + r];
    wi[r] = h.w[i + r];
    ui[r] = h.u[i + r];
  }
  for (size_t j = first; j < i; ++j) {
    const V vj = h.v[j], wj = h.w[j], uj = h.u[j];
    V yj = h.y[j];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRowCount; ++r) {
      V* at = t + (i + r) * ld + j;
      const V a = *at - vi[r] * wj - wi[r] * vj;
      *at = a;
      yi[r] += a * uj;
      yj += a * ui[r];
    }
    h.y[j] = yj;
  }
  for (size_t r = 0; r < kRowCount; ++r) {
    for (size_t c = 0; c < r; ++c) {
      V* at = t + (i + r) * ld + i + c;
      const V a = *at - vi[r] * wi[c] - wi[r] * vi[c];
      *at = a;
      yi[r] += a * ui[c];
      yi[c] += a * ui[r];
    }
    V* at = t + (i + r) * (ld + 1);
    *at -= 2 * (vi[r] * wi[r]);
    yi[r] += *at * ui[r];
  }
  for (size_t r = 0; r < kRowCount; ++r) h.y[i + r] += yi[r];
}

// Householder reflections to tridiagonal form, from t's lower triangle, which is destroyed.
// Reflection k, I - beta[k] u uᵀ, has its u in row k of the upper triangle. off_diagonal[k] stands
// between k and k + 1. `room` holds 4 n.
void tridiagonalise(V* t, size_t n, size_t ld, V* beta, V* diagonal, V* off_diagonal, V* room) {
  Reflection h{room, room + n, room + 2 * n, room + 3 * n};
  for (size_t i = 0; i < 2 * n; ++i) room[i] = V{};
  for (size_t k = 0; k < n; ++k) {
    const V vk = h.v[k], wk = h.w[k];
    diagonal[k] = t[k * (ld + 1)] - 2 * (vk * wk);
    const size_t first = k + 1;
    if (first == n) break;
    V tail = {};
    for (size_t i = first; i < n; ++i) {
      h.u[i] = t[i * ld + k] - h.v[i] * wk - h.w[i] * vk;
      h.y[i] = V{};
      if (i > first) tail += h.u[i] * h.u[i];
    }
    const V head = h.u[first];
    const V norm = root(head * head + tail);
    const V alpha = head > 0 ? -norm : norm;  // away from cancellation
    const Mask trivial = tail < kTrivial;
    off_diagonal[k] = trivial ? head : alpha;
    h.u[first] = trivial ? splat(1) : head - alpha;
    beta[k] = trivial ? V{} : 2 / (h.u[first] * h.u[first] + tail);
    for (size_t i = first; i < n; ++i) t[k * ld + i] = h.u[i];

    size_t i = first;
    for (; (n - i) % kTileRows != 0; ++i) sweep<1>(t, ld, first, i, h);
    for (; i < n; i += kTileRows) sweep<kTileRows>(t, ld, first, i, h);

    V inner = {};
    for (i = first; i < n; ++i) {
      h.y[i] *= beta[k];
      inner += h.y[i] * h.u[i];
    }
    const V shift = beta[k] / 2 * inner;
    for (i = first; i < n; ++i) h.y[i] -= shift * h.u[i];
    V* const free_v = h.v;
    V* const free_w = h.w;
    h.v = h.u;
    h.w = h.y;
    h.u = free_v;
    h.y = free_w;
  }
  off_diagonal[n - 1] = V{};
}

// Brings the largest row sum into [1, 2).
void scale_tridiagonal(V* diagonal, V* off_diagonal, size_t n) {
  V bound = {};
  for (size_t i = 0; i < n; ++i) {
    V sum = absolute(diagonal[i]) + absolute(off_diagonal[i]);
    if (i > 0) sum += absolute(off_diagonal[i - 1]);
    bound = sum > bound ? sum : bound;
  }
  const V unit = bound > 0x1p-1000 ? power_of_two(bound) : splat(1);
  const V factor = 1 / unit;
  for (size_t i = 0; i < n; ++i) {
    diagonal[i] *= factor;
    off_diagonal[i] *= factor;
  }
}

// The eigenvalues number rank, …, rank + kTile - 1 from the largest, counted from 0, of a matrix
// as scale_tridiagonal() leaves it, without negative ones. `square` is off_diagonal², at least
// kFloor.
void bisect(const V* diagonal, const V* square, size_t n, size_t rank, V* values) {
  V low[kTile] = {}, high[kTile];
  for (size_t c = 0; c < kTile; ++c) high[c] = splat(2);
  for (int halving = 0; halving < kHalvings; ++halving) {
    V x[kTile], p[kTile], before[kTile];
    Bits below[kTile] = {};
    for (size_t c = 0; c < kTile; ++c) {
      x[c] = 0.5 * (low[c] + high[c]);
      p[c] = splat(1);
      before[c] = V{};
    }
    // The characteristic polynomials of the leading submatrices at x: as many changes of sign as
    // eigenvalues below x.
    for (size_t start = 0; start < n; start += kRescale) {
      const size_t end = start + kRescale < n ? start + kRescale : n;
      for (size_t i = start; i < end; ++i) {
        const V entry = diagonal[i];
        const V coupling = i > 0 ? square[i - 1] : V{};
#pragma GCC unroll 4
        for (size_t c = 0; c < kTile; ++c) {
          const V next = (entry - x[c]) * p[c] - coupling * before[c];
          below[c] += (reinterpret_cast<Bits>(next) ^ reinterpret_cast<Bits>(p[c])) >> 63;
          before[c] = p[c];
          p[c] = next;
        }
      }
      for (size_t c = 0; c < kTile; ++c) {
        const V size = absolute(p[c]) > absolute(before[c]) ? absolute(p[c]) : absolute(before[c]);
        const V factor = 1 / power_of_two(size);
        p[c] *= factor;
        before[c] *= factor;
      }
    }
    for (size_t c = 0; c < kTile; ++c) {
      const int64_t smaller = static_cast<int64_t>(n) - static_cast<int64_t>(rank + c);
      const Mask under = reinterpret_cast<Mask>(below[c]) < smaller;
      low[c] = under ? x[c] : low[c];
      high[c] = under ? high[c] : x[c];
    }
  }
  for (size_t c = 0; c < kTile; ++c) values[c] = 0.5 * (low[c] + high[c]);
}

inline V away_from_zero(V x) { return absolute(x) < kPivotFloor ? splat(kPivotFloor) : x; }

// The unit eigenvectors of kTile eigenvalues, w[i * kTile + c]. `room` holds 3 n kTile.
void twist(const V* diagonal, const V* off_diagonal, size_t n, const V* values, V* room, V* w) {
  V* pivot = room;               // from the top
  V* down = room + n * kTile;    // multipliers of the factorisation from the top
  V* up = room + 2 * n * kTile;  // and from the bottom
  V q[kTile], best[kTile], where[kTile];
  for (size_t c = 0; c < kTile; ++c) q[c] = away_from_zero(diagonal[0] - values[c]);
  for (size_t i = 0;; ++i) {
    for (size_t c = 0; c < kTile; ++c) pivot[i * kTile + c] = q[c];
    if (i + 1 == n) break;
#pragma GCC unroll 4
    for (size_t c = 0; c < kTile; ++c) {
      const V ratio = off_diagonal[i] / q[c];
      down[i * kTile + c] = ratio;
      q[c] = away_from_zero(diagonal[i + 1] - values[c] - off_diagonal[i] * ratio);
    }
  }
  for (size_t c = 0; c < kTile; ++c) {
    best[c] = absolute(q[c]);
    where[c] = splat(static_cast<double>(n - 1));
    q[c] = away_from_zero(diagonal[n - 1] - values[c]);
  }
  for (size_t i = n - 1; i-- > 0;) {
#pragma GCC unroll 4
    for (size_t c = 0; c < kTile; ++c) {
      const V ratio = off_diagonal[i] / q[c];
      up[(i + 1) * kTile + c] = ratio;
      const V shifted = diagonal[i] - values[c];
      q[c] = away_from_zero(shifted - off_diagonal[i] * ratio);
      const V residual = absolute(pivot[i * kTile + c] + q[c] - shifted);
      const Mask better = residual < best[c];
      best[c] = better ? residual : best[c];
      where[c] = better ? splat(static_cast<double>(i)) : where[c];
    }
  }
  V last[kTile] = {}, norm[kTile] = {};
  for (size_t i = n; i-- > 0;) {
    const double index = static_cast<double>(i);
    for (size_t c = 0; c < kTile; ++c) {
      const V next = i + 1 < n ? -down[i * kTile + c] * last[c] : V{};
      last[c] = where[c] == index ? splat(1) : next;
      w[i * kTile + c] = last[c];
    }
  }
  for (size_t i = 0; i < n; ++i) {
    const double index = static_cast<double>(i);
    for (size_t c = 0; c < kTile; ++c) {
      V* at = w + i * kTile + c;
      if (i > 0) *at = where[c] < index ? -up[i * kTile + c] * last[c] : *at;
      last[c] = *at;
      norm[c] += *at * *at;
    }
  }
  for (size_t c = 0; c < kTile; ++c) norm[c] = 1 / root(norm[c]);
  for (size_t i = 0; i < n; ++i) {
    for (size_t c = 0; c < kTile; ++c) w[i * kTile + c] *= norm[c];
  }
}

// From the tridiagonal matrix's basis to that of the matrix it came from.
void reflect(const V* reflections, const V* beta, size_t n, size_t ld, V* w) {
  for (size_t k = n - 1; k-- > 0;) {
    const V* u = reflections + k * ld;
    V sum[kTile] = {};
    for (size_t i = k + 1; i < n; ++i) {
#pragma GCC unroll 4
      for (size_t c = 0; c < kTile; ++c) sum[c] += u[i] * w[i * kTile + c];
    }
    for (size_t c = 0; c < kTile; ++c) sum[c] *= beta[k];
    for (size_t i = k + 1; i < n; ++i) {
#pragma GCC unroll 4
      for (size_t c = 0; c < kTile; ++c) w[i * kTile + c] -= sum[c] * u[i];
    }
  }
}

uint32_t omega(size_t d, size_t limit, double* query_gram, const double* key_gram, double* work,
               double* out) {
  const size_t n = lane_rows(d), ld = lane_stride(d);
  V* const l = reinterpret_cast<V*>(query_gram);
  const V* const g = reinterpret_cast<const V*>(key_gram);
  V* const sums = reinterpret_cast<V*>(out);
  V* const t = reinterpret_cast<V*>(work);
  V* const norms = t + n * ld;
  V* const beta = norms + n;
  V* const diagonal = beta + n;
  V* const off_diagonal = diagonal + n;
  V* const square = off_diagonal + n;
  V* const w = square + n;
  V* const y = w + n * kTile;
  V* const room = y + n * kTile;

  for (size_t i = 0; i < d; ++i) {
    norms[i] = root(l[i * (ld + 1)]) * root(g[i * (ld + 1)]);
    sums[i] = V{};
  }
  cholesky(l, n, ld);
  congruence(l, g, n, ld, room, t);
  tridiagonalise(t, n, ld, beta, diagonal, off_diagonal, room);
  scale_tridiagonal(diagonal, off_diagonal, n);
  for (size_t i = 0; i < n; ++i) {
    const V x = off_diagonal[i] * off_diagonal[i];
    square[i] = x > kFloor ? x : splat(kFloor);
  }

  V largest = {}, previous = {};
  Mask tied = {};
  for (size_t rank = 0; rank < limit; rank += kTile) {
    V values[kTile];
    bisect(diagonal, square, n, rank, values);
    twist(diagonal, off_diagonal, n, values, room, w);
    reflect(t, beta, n, ld, w);
    for (size_t i = 0; i < n; i += kTileRows) {
      V sum[kTileRows][kTile] = {};
      multiply(l + i * ld, ld, 1, w, 1, kTile, i - i % kTile + kTile, sum);
      for (size_t r = 0; r < kTileRows; ++r) {
        for (size_t c = 0; c < kTile; ++c) y[(i + r) * kTile + c] = sum[r][c];
      }
    }
    V* const z = w;
    V energy[kTile] = {};
    for (size_t i = 0; i < n; i += kTileRows) {
      V sum[kTileRows][kTile] = {};
      multiply_symmetric(g, n, ld, i, 0, y, kTile, sum);
      for (size_t r = 0; r < kTileRows; ++r) {
        for (size_t c = 0; c < kTile; ++c) {
          const V product = y[(i + r) * kTile + c] * sum[r][c];
          energy[c] += product;  // yᵀ G_k y = s²
          z[(i + r) * kTile + c] = absolute(product);
        }
      }
    }
    for (size_t c = 0; c < kTile && rank + c < limit; ++c) {
      if (rank + c == 0) largest = values[0];
      const Mask counts = (values[c] > kCutoff * largest) & (energy[c] > 0);
      if (rank + c > 0) tied |= counts & (previous - values[c] < kTie * largest);
      previous = values[c];
      const V weight = counts ? 1 / root(energy[c]) : V{};
      for (size_t i = 0; i < d; ++i) sums[i] += z[i * kTile + c] * weight;
    }
  }
  Mask refused = tied;
  for (size_t i = 0; i < d; ++i) {
    sums[i] *= inverse_or_zero(norms[i]);
    refused |= sums[i] * 0 != V{};  // NaN or Inf
  }

  uint32_t lanes = 0;
  for (size_t lane = 0; lane < kWidth; ++lane) {
    if (refused[lane] != 0) lanes |= uint32_t{1} << lane;
  }
  return lanes;
}

}  // namespace

const ScoreLanesKernels SECATEUR_TABLE(score_lanes) = {kWidth, omega};

}  // namespace secateur::cpu
