// SNP's ω of one head of one image by one block of threads: csrc/cpu/score.cc's formulas, with the
// leading eigenvalues alone, by bisection, and their vectors by inverse iteration. Float64 from the
// first product: in float32, however short the sums, the Grams of a trained model miss the bar.
#pragma once

#include "../cpu/kernels.h"
#include "block.h"

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

// What the score means near singularity is the CPU's.
using cpu::kCutoff;
using cpu::kRidge;
using cpu::kTrivial;

constexpr int kMaxHeadDim = 128;
constexpr int kPatch = 4;       ///< a thread multiplies squares of that many columns
constexpr int kStripRows = 20;  ///< tokens that are read before they are multiplied
constexpr int kSections = 32;   ///< points at which an eigenvalue's interval is cut at once
constexpr int kAtOnce = 8;      ///< eigenvalues that are bisected side by side
constexpr int kSolves = 4;      ///< vectors of inverse iterations side by side
constexpr int kParts = 8;       ///< partial sums of a dot product

constexpr int kBisections = 12;  ///< (kSections + 1)^12 > 2^60
constexpr int kIterations = 3;   ///< of inverse iteration

/// What a block works on. Strides count elements.
struct HeadInput {
  const void* query;  ///< token 0, channel 0
  const void* key;
  int64_t query_token, query_channel;
  int64_t key_token, key_channel;
  int64_t tokens;
  int dim;
  int limit;  ///< singular triplets that may count: min(gamma, tokens, dim)
  bool moments;
};

enum HeadFault : int { kSound = 0, kNotFinite = 1, kTooLarge = 2 };

SECATEUR_DEVICE constexpr int row_stride(int dim) { return dim | 1; }  // odd: no bank conflicts
SECATEUR_DEVICE constexpr int strip_stride(int dim) {
  return (dim + kPatch - 1) / kPatch * kPatch + 1;
}

/// Doubles of the room that tiles, Sturm counts, factorisations and partial sums take in turn.
SECATEUR_DEVICE constexpr int strip_size(int dim, int limit) {
  int size = kStripRows * strip_stride(dim);
  if (size < kAtOnce * kSections) size = kAtOnce * kSections;
  if (size < kParts * limit) size = kParts * limit;
  return size;
}

/// Doubles of a block's workspace.
SECATEUR_DEVICE constexpr int64_t workspace_size(int dim, int limit) {
  return 2 * static_cast<int64_t>(dim) * row_stride(dim) + strip_size(dim, limit) +
         static_cast<int64_t>(limit) * dim + 3 * static_cast<int64_t>(limit) + 10 * dim;
}

/// Doubles of a head's result: ω, and with moments QᵀQ, K_cᵀK_c and their product, packed.
SECATEUR_DEVICE constexpr int64_t result_size(int dim, bool moments) {
  return dim + (moments ? 3 * (static_cast<int64_t>(dim) * (dim + 1) / 2) : 0);
}

/// A power of two that brings a largest magnitude into [1, 2); 1 for zero.
SECATEUR_DEVICE inline double normalising(double peak) {
  return peak > 0 ? ldexp(1.0, -larger(ilogb(peak), -1000)) : 1.0;
}

template <typename Source>
class HeadScore {
 public:
  /// `work` holds workspace_size(dim, limit) doubles, in shared memory or not.
  SECATEUR_DEVICE HeadScore(const Block& block, const HeadInput& input, double* work)
      : block_(block), in_(input), d_(input.dim), ld_(row_stride(input.dim)) {
    a_ = work;
    b_ = a_ + d_ * ld_;
    strip_ = b_ + d_ * ld_;
    vectors_ = strip_ + strip_size(d_, in_.limit);
    values_ = vectors_ + in_.limit * d_;
    low_ = values_ + in_.limit;
    high_ = low_ + in_.limit;
    mean_ = high_ + in_.limit;
    sums_ = mean_ + d_;
    query_factors_ = sums_ + d_;
    key_factors_ = query_factors_ + d_;
    norms_ = key_factors_ + d_;
    gram_diagonal_ = norms_ + d_;
    diagonal_ = gram_diagonal_ + d_;
    off_diagonal_ = diagonal_ + d_;
    beta_ = off_diagonal_ + d_;
    room_ = beta_ + d_;
  }

  /// Writes result_size(dim, moments) doubles, unless a fault is found.
  SECATEUR_DEVICE HeadFault run(double max_moment_magnitude, double* out) {
    double query_scale = 1, key_scale = 1;
    if (sizeof(Source) == sizeof(double)) {
      // Squares of the narrower types can neither overflow nor vanish in float64.
      const double query_peak = peak(in_.query, in_.query_token, in_.query_channel);
      const double key_peak = peak(in_.key, in_.key_token, in_.key_channel);
      if (!(query_peak < HUGE_VAL && key_peak < HUGE_VAL)) return kNotFinite;
      if (in_.moments &&
          !(query_peak <= max_moment_magnitude && key_peak <= max_moment_magnitude)) {
        return kTooLarge;
      }
      query_scale = normalising(query_peak);
      key_scale = normalising(key_peak);
    }
    gram(in_.query, in_.query_token, in_.query_channel, query_scale, false, a_);
    gram(in_.key, in_.key_token, in_.key_channel, key_scale, true, b_);
    // NaN or Inf anywhere in a column is in its norm.
    const double poison = block_.uniform([&] {
      double sum = 0;
      for (int i = 0; i < d_; ++i) sum += a_[i * (ld_ + 1)] * 0 + b_[i * (ld_ + 1)] * 0;
      return sum;
    });
    if (!(poison == 0)) return kNotFinite;
    if (in_.moments) write_moments(query_scale, key_scale, out + d_);
    add_mean();
    omega(out);
    return kSound;
  }

  /// ω alone, from Grams in a() and b() (upper triangles, rows row_stride(dim) apart).
  SECATEUR_DEVICE void omega(double* out) {
    balance();
    cholesky();
    congruence();
    tridiagonalise();
    const int count = eigenvalues();
    eigenvectors(count);
    back_transform(count);
    sum_up(count, out);
  }

  SECATEUR_DEVICE double* a() { return a_; }
  SECATEUR_DEVICE double* b() { return b_; }

 private:
  /// The largest magnitude of one head's elements; Inf where one is not finite.
  SECATEUR_DEVICE double peak(const void* source, int64_t token, int64_t channel) {
    const Source* x = static_cast<const Source*>(source);
    block_.each(d_, [&](int c) {
      double top = 0;
      for (int64_t n = 0; n < in_.tokens; ++n) {
        const double value = fabs(to_double(x[n * token + c * channel]));
        // Also false for a NaN.
        if (!(value <= top)) top = value < HUGE_VAL ? value : HUGE_VAL;
      }
      room_[c] = top;
    });
    return block_.uniform([&] {
      double top = 0;
      for (int c = 0; c < d_; ++c) top = room_[c] > top ? room_[c] : top;
      return top;
    });
  }

  /// The upper triangle of XᵀX, X one head's elements times `scale`; with `center` of X less its
  /// column means, which are left in mean_.
  SECATEUR_DEVICE void gram(const void* source, int64_t token, int64_t channel, double scale,
                            bool center, double* out) {
    const Source* x = static_cast<const Source*>(source);
    const int width = strip_stride(d_), padded = width - 1, squares = padded / kPatch;
    block_.each(d_ * ld_, [&](int i) { out[i] = 0; });
    block_.each(d_, [&](int c) { mean_[c] = sums_[c] = 0; });
    for (int64_t begin = 0; begin < in_.tokens; begin += kStripRows) {
      const int rows =
          in_.tokens - begin < kStripRows ? static_cast<int>(in_.tokens - begin) : kStripRows;
      block_.each(rows * padded, [&](int i) {
        const int r = i / padded, c = i % padded;
        strip_[r * width + c] =
            c < d_ ? to_double(x[(begin + r) * token + c * channel]) * scale : 0;
      });
      if (center) {
        // Less the first tokens' mean, so that a shared offset is gone before anything is squared.
        if (begin == 0) {
          block_.each(d_, [&](int c) {
            double sum = 0;
            for (int r = 0; r < rows; ++r) sum += strip_[r * width + c];
            mean_[c] = sum / rows;
          });
        }
        block_.each(d_, [&](int c) {
          double sum = 0;
          for (int r = 0; r < rows; ++r) sum += strip_[r * width + c] -= mean_[c];
          sums_[c] += sum;
        });
      }
      block_.each(squares * (squares + 1) / 2, [&](int p) {
        int left = 0, right = 0;
        square_of(p, squares, &left, &right);
        multiply(rows, width, left * kPatch, right * kPatch, out);
      });
    }
    if (!center) return;
    const double count = static_cast<double>(in_.tokens);
    block_.each(d_ * d_, [&](int e) {
      const int i = e / d_, j = e % d_;
      if (j >= i) out[i * ld_ + j] -= sums_[i] / count * sums_[j];
    });
    block_.each(d_, [&](int c) { mean_[c] += sums_[c] / count; });
  }

  /// One square of the product of the strip with itself, as far as it is in the upper triangle.
  SECATEUR_DEVICE void multiply(int rows, int width, int i0, int j0, double* out) const {
    double sum[kPatch][kPatch] = {};
    for (int r = 0; r < rows; ++r) {
      const double* row = strip_ + r * width;
      for (int i = 0; i < kPatch; ++i) {
        for (int j = 0; j < kPatch; ++j) sum[i][j] += row[i0 + i] * row[j0 + j];
      }
    }
    for (int i = 0; i < kPatch; ++i) {
      for (int j = 0; j < kPatch; ++j) {
        const int r = i0 + i, c = j0 + j;
        if (c < d_ && r <= c) out[r * ld_ + c] += sum[i][j];
      }
    }
  }

  SECATEUR_DEVICE void write_moments(double query_scale, double key_scale, double* out) {
    const int packed = d_ * (d_ + 1) / 2;
    const double query_unit = 1 / query_scale / query_scale, key_unit = 1 / key_scale / key_scale;
    block_.each(d_ * d_, [&](int e) {
      const int i = e / d_, j = e % d_;
      if (j < i) return;
      const double query = a_[i * ld_ + j] * query_unit, key = b_[i * ld_ + j] * key_unit;
      double* to = out + (i * d_ - i * (i + 1) / 2 + j);
      to[0] = query;
      to[packed] = key;
      to[2 * packed] = query * key;
    });
  }

  /// From the Gram of centred keys to that of the keys.
  SECATEUR_DEVICE void add_mean() {
    block_.each(d_ * d_, [&](int e) {
      const int i = e / d_, j = e % d_;
      if (j >= i) b_[i * ld_ + j] += static_cast<double>(in_.tokens) * mean_[i] * mean_[j];
    });
  }

  /// Gives neuron i of queries and of keys the same norm, and the largest about 1, by powers of
  /// two. Neurons without a part in Q Kᵀ become 0.
  SECATEUR_DEVICE void balance() {
    const int largest = block_.uniform([&] {
      int top = -100000;
      for (int i = 0; i < d_; ++i) {
        const double q = a_[i * (ld_ + 1)], k = b_[i * (ld_ + 1)];
        if (!(q > 0 && k > 0)) continue;
        const int shift = (ilogb(k) - ilogb(q)) / 4;
        top = larger(top, larger(ilogb(q) + 2 * shift, ilogb(k) - 2 * shift));
      }
      return top;
    });
    block_.each(d_, [&](int i) {
      const double q = a_[i * (ld_ + 1)], k = b_[i * (ld_ + 1)];
      const bool counts = q > 0 && k > 0;
      const int shift = counts ? (ilogb(k) - ilogb(q)) / 4 : 0;
      query_factors_[i] = counts ? ldexp(1.0, shift - largest / 2) : 0;
      key_factors_[i] = counts ? ldexp(1.0, -shift - largest / 2) : 0;
    });
    block_.each(d_ * d_, [&](int e) {
      const int i = e / d_, j = e % d_;
      if (j < i) return;
      // One factor after the other: their product may not fit.
      a_[i * ld_ + j] = a_[i * ld_ + j] * query_factors_[i] * query_factors_[j];
      b_[i * ld_ + j] = b_[i * ld_ + j] * key_factors_[i] * key_factors_[j];
    });
    block_.each(d_, [&](int i) {
      norms_[i] = sqrt(a_[i * (ld_ + 1)]) * sqrt(b_[i * (ld_ + 1)]);
      a_[i * (ld_ + 1)] *= 1 + kRidge;
    });
  }

  /// a = Uᵀ U, U upper triangular over a's upper triangle. A pivot lost to rounding gives a zero
  /// row.
  SECATEUR_DEVICE void cholesky() {
    for (int j = 0; j < d_; ++j) {
      double* row = a_ + j * ld_;
      const double inverse = block_.uniform([&] {
        const double pivot = row[j];
        return pivot > 0 ? 1 / sqrt(pivot) : 0.0;
      });
      block_.each(d_ - j, [&](int i) { row[j + i] *= inverse; });
      const int rest = d_ - j - 1;
      block_.each(rest * rest, [&](int e) {
        const int i = j + 1 + e / rest, k = j + 1 + e % rest;
        if (k >= i) a_[i * ld_ + k] -= row[i] * row[k];
      });
    }
  }

  /// b's lower triangle becomes that of T = U G Uᵀ. G moves to a's lower triangle, under U, and to
  /// gram_diagonal_.
  SECATEUR_DEVICE void congruence() {
    block_.each(d_ * d_, [&](int e) {
      const int i = e / d_, j = e % d_;
      if (j > i) a_[j * ld_ + i] = b_[i * ld_ + j];
      if (j == i) gram_diagonal_[i] = b_[i * (ld_ + 1)];
    });
    block_.each(d_ * d_, [&](int e) {
      const int i = e / d_, j = e % d_;
      const double* u = a_ + i * ld_;
      double sum = 0;
      for (int k = i; k < j; ++k) sum += u[k] * a_[j * ld_ + k];
      if (j >= i) sum += u[j] * gram_diagonal_[j];
      for (int k = larger(i, j + 1); k < d_; ++k) sum += u[k] * a_[k * ld_ + j];
      b_[i * ld_ + j] = sum;
    });
    // In place: T_ij takes the place of (U G)_ij, which no later j of this row needs.
    block_.each(d_, [&](int i) {
      double* row = b_ + i * ld_;
      for (int j = 0; j <= i; ++j) {
        const double* u = a_ + j * ld_;
        double sum = 0;
        for (int k = j; k < d_; ++k) sum += row[k] * u[k];
        row[j] = sum;
      }
    });
  }

  /// Element (i, j) of what b's lower triangle holds.
  SECATEUR_DEVICE double symmetric(int i, int j) const {
    return i >= j ? b_[i * ld_ + j] : b_[j * ld_ + i];
  }

  /// Householder reflections to tridiagonal form; reflection k, I - beta[k] v vᵀ, has its v below
  /// the diagonal in column k of b.
  SECATEUR_DEVICE void tridiagonalise() {
    for (int k = 0; k + 1 < d_; ++k) {
      const int first = k + 1, n = d_ - first;
      double* v = b_ + first * ld_ + k;  // rows ld_ apart
      const double head = block_.uniform([&] { return v[0]; });
      const double tail = block_.uniform([&] {
        double sum = 0;
        for (int i = 1; i < n; ++i) sum += v[i * ld_] * v[i * ld_];
        return sum;
      });
      if (tail < kTrivial) {
        block_.each(1, [&](int) {
          diagonal_[k] = b_[k * (ld_ + 1)];
          off_diagonal_[k] = head;
          beta_[k] = 0;
        });
        continue;
      }
      const double norm = sqrt(head * head + tail);
      const double alpha = head > 0 ? -norm : norm;  // away from cancellation
      const double first_of_v = head - alpha;
      const double beta = 2 / (first_of_v * first_of_v + tail);
      block_.each(1, [&](int) {
        diagonal_[k] = b_[k * (ld_ + 1)];
        off_diagonal_[k] = alpha;
        beta_[k] = beta;
        v[0] = first_of_v;
      });
      block_.each(n, [&](int i) {
        double sum = 0;
        for (int j = 0; j < n; ++j) sum += symmetric(first + i, first + j) * v[j * ld_];
        room_[i] = beta * sum;
      });
      const double shift = block_.uniform([&] {
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += room_[i] * v[i * ld_];
        return beta / 2 * sum;
      });
      block_.each(n, [&](int i) { room_[i] -= shift * v[i * ld_]; });
      block_.each(n * n, [&](int e) {
        const int i = e / n, j = e % n;
        if (j > i) return;
        b_[(first + i) * ld_ + first + j] -= v[i * ld_] * room_[j] + room_[i] * v[j * ld_];
      });
    }
    block_.each(1, [&](int) {
      diagonal_[d_ - 1] = b_[(d_ - 1) * (ld_ + 1)];
      off_diagonal_[d_ - 1] = 0;
    });
  }

  /// Eigenvalues of the tridiagonal matrix below x.
  SECATEUR_DEVICE int below(double x) const {
    double pivot = diagonal_[0] - x;
    int count = pivot < 0;
    for (int i = 1; i < d_; ++i) {
      if (fabs(pivot) < 1e-280) pivot = -1e-280;
      pivot = diagonal_[i] - x - off_diagonal_[i - 1] * off_diagonal_[i - 1] / pivot;
      count += pivot < 0;
    }
    return count;
  }

  /// The leading eigenvalues in descending order, into values_; how many count.
  SECATEUR_DEVICE int eigenvalues() {
    const double bound = block_.uniform([&] { return gershgorin(); });
    block_.each(in_.limit, [&](int j) {
      low_[j] = -bound;
      high_[j] = bound;
    });
    for (int begin = 0; begin < in_.limit; begin += kAtOnce) {
      const int group = smaller(kAtOnce, in_.limit - begin);
      for (int round = 0; round < kBisections; ++round) {
        block_.each(group * kSections, [&](int i) {
          strip_[i] = below(section(begin + i / kSections, i % kSections));
        });
        block_.each(group, [&](int g) {
          const int j = begin + g;
          // The j-th largest is at or above x exactly where more than j are.
          int s = 0;
          while (s < kSections && d_ - strip_[g * kSections + s] > j) ++s;
          const double low = s > 0 ? section(j, s - 1) : low_[j];
          const double high = s < kSections ? section(j, s) : high_[j];
          low_[j] = low;
          high_[j] = high;
        });
      }
    }
    block_.each(in_.limit, [&](int j) { values_[j] = low_[j] + (high_[j] - low_[j]) / 2; });
    return block_.uniform([&] {
      int count = 0;
      if (!(values_[0] > 0)) return count;
      while (count < in_.limit && values_[count] > kCutoff * values_[0]) ++count;
      return count;
    });
  }

  SECATEUR_DEVICE double section(int j, int s) const {
    return low_[j] + (high_[j] - low_[j]) * ((s + 1) / static_cast<double>(kSections + 1));
  }

  SECATEUR_DEVICE double gershgorin() const {
    double bound = 0;
    for (int i = 0; i < d_; ++i) {
      const double radius = fabs(off_diagonal_[i]) + (i > 0 ? fabs(off_diagonal_[i - 1]) : 0.0);
      const double reach = (fabs(diagonal_[i]) + radius) * (1 + 0x1p-50);
      bound = reach > bound ? reach : bound;
    }
    return bound;
  }

  /// Vectors of the first `count` values_, in the tridiagonal matrix's basis, into vectors_.
  SECATEUR_DEVICE void eigenvectors(int count) {
    const double norm = block_.uniform([&] { return gershgorin(); });
    block_.each(count * d_, [&](int e) {
      // Anything that is orthogonal to nothing.
      const uint32_t hash = (static_cast<uint32_t>(e) + 1) * 2654435761u;
      vectors_[e] = 0.5 + (hash >> 8) * 0x1p-24;
      if ((hash & 0x80u) != 0) vectors_[e] = -vectors_[e];
    });
    for (int begin = 0; begin < count; begin += kSolves) {
      const int group = smaller(kSolves, count - begin);
      block_.each(group, [&](int g) { factorise(values_[begin + g], norm, strip_ + g * 5 * d_); });
      for (int iteration = 0; iteration < kIterations; ++iteration) {
        block_.each(group, [&](int g) { solve(strip_ + g * 5 * d_, vectors_ + (begin + g) * d_); });
        for (int j = begin; j < begin + group; ++j) orthonormalise(j, norm);
      }
    }
  }

  /// T - x I = P L U with partial pivoting; five rows of d: multipliers, three diagonals of U, and
  /// whether rows were exchanged.
  SECATEUR_DEVICE void factorise(double x, double norm, double* room) const {
    double* multiplier = room;
    double* first = multiplier + d_;
    double* second = first + d_;
    double* third = second + d_;
    double* exchanged = third + d_;
    const double least = norm * 0x1p-52 + 1e-290;
    double pivot = diagonal_[0] - x, next = off_diagonal_[0];
    for (int i = 0; i + 1 < d_; ++i) {
      const double under = off_diagonal_[i], middle = diagonal_[i + 1] - x;
      const double right = i + 2 < d_ ? off_diagonal_[i + 1] : 0;
      if (fabs(pivot) >= fabs(under)) {
        if (fabs(pivot) < least) pivot = least;
        multiplier[i] = under / pivot;
        first[i] = pivot;
        second[i] = next;
        third[i] = 0;
        exchanged[i] = 0;
        pivot = middle - multiplier[i] * next;
        next = right;
      } else {
        multiplier[i] = pivot / under;
        first[i] = under;
        second[i] = middle;
        third[i] = right;
        exchanged[i] = 1;
        pivot = next - multiplier[i] * middle;
        next = -multiplier[i] * right;
      }
    }
    first[d_ - 1] = fabs(pivot) < least ? least : pivot;
    second[d_ - 1] = third[d_ - 1] = multiplier[d_ - 1] = exchanged[d_ - 1] = 0;
  }

  /// x ← (T - λ I)⁻¹ x, scaled to a largest magnitude of 1.
  SECATEUR_DEVICE void solve(const double* room, double* x) const {
    const double* multiplier = room;
    const double* first = multiplier + d_;
    const double* second = first + d_;
    const double* third = second + d_;
    const double* exchanged = third + d_;
    for (int i = 0; i + 1 < d_; ++i) {
      const double low = x[i + 1];
      if (exchanged[i] > 0) {
        x[i + 1] = x[i] - multiplier[i] * low;
        x[i] = low;
      } else {
        x[i + 1] = low - multiplier[i] * x[i];
      }
    }
    double peak = 0;
    for (int i = d_ - 1; i >= 0; --i) {
      double value = x[i];
      if (i + 1 < d_) value -= second[i] * x[i + 1];
      if (i + 2 < d_) value -= third[i] * x[i + 2];
      x[i] = value / first[i];
      peak = fabs(x[i]) > peak ? fabs(x[i]) : peak;
    }
    if (!(peak > 0)) return;
    for (int i = 0; i < d_; ++i) x[i] /= peak;
  }

  /// Vector j less its parts along earlier ones that inverse iteration cannot tell from it.
  SECATEUR_DEVICE void orthonormalise(int j, double norm) {
    double* x = vectors_ + j * d_;
    for (int p = 0; p < j; ++p) {
      if (values_[p] - values_[j] > 1e-3 * norm) continue;  // the same for all threads
      const double* other = vectors_ + p * d_;
      const double part = block_.uniform([&] { return dot(x, other); });
      block_.each(d_, [&](int i) { x[i] -= part * other[i]; });
    }
    const double length = block_.uniform([&] { return sqrt(dot(x, x)); });
    if (length > 0) block_.each(d_, [&](int i) { x[i] /= length; });
  }

  SECATEUR_DEVICE double dot(const double* x, const double* y) const {
    double sum = 0;
    for (int i = 0; i < d_; ++i) sum += x[i] * y[i];
    return sum;
  }

  /// From the tridiagonal matrix's basis to T's: all reflections, last first.
  SECATEUR_DEVICE void back_transform(int count) {
    for (int k = d_ - 2; k >= 0; --k) {
      const int first = k + 1, n = d_ - first;
      const double* v = b_ + first * ld_ + k;
      block_.each(count * kParts, [&](int e) {
        const double* w = vectors_ + e / kParts * d_ + first;
        double sum = 0;
        for (int i = e % kParts; i < n; i += kParts) sum += v[i * ld_] * w[i];
        strip_[e] = sum;
      });
      block_.each(count * n, [&](int e) {
        const int j = e / n, i = e % n;
        double sum = 0;
        for (int part = 0; part < kParts; ++part) sum += strip_[j * kParts + part];
        vectors_[j * d_ + first + i] -= beta_[k] * sum * v[i * ld_];
      });
    }
  }

  /// y_j = Uᵀ w_j, then Σ_j |y_ij| |(G y_j)_i| / s_j over the norms.
  SECATEUR_DEVICE void sum_up(int count, double* out) {
    block_.each(count * d_, [&](int e) {
      const double* w = vectors_ + e / d_ * d_;
      const int i = e % d_;
      double sum = 0;
      for (int k = 0; k <= i; ++k) sum += w[k] * a_[k * ld_ + i];
      b_[e] = sum;
    });
    block_.each(count * d_, [&](int e) {
      const double* y = b_ + e / d_ * d_;
      const int i = e % d_;
      double sum = gram_diagonal_[i] * y[i];
      for (int k = 0; k < i; ++k) sum += a_[i * ld_ + k] * y[k];
      for (int k = i + 1; k < d_; ++k) sum += a_[k * ld_ + i] * y[k];
      vectors_[e] = fabs(y[i] * sum) / sqrt(values_[e / d_]);
    });
    block_.each(d_, [&](int i) {
      double sum = 0;
      for (int j = 0; j < count; ++j) sum += vectors_[j * d_ + i];
      out[i] = norms_[i] > 0 ? sum / norms_[i] : 0;
    });
  }

  const Block& block_;
  const HeadInput& in_;
  int d_;
  int ld_;
  double* a_;              ///< Gram of queries, then U over G
  double* b_;              ///< Gram of keys, then T and the reflections, then y
  double* strip_;          ///< strip_size(): tokens, counts, factors, partial sums
  double* vectors_;        ///< (limit, d)
  double* values_;         ///< (limit)
  double* low_;            ///< (limit)
  double* high_;           ///< (limit)
  double* mean_;           ///< of keys, over the tokens
  double* sums_;           ///< of keys less the first tokens' mean
  double* query_factors_;  ///< powers of two
  double* key_factors_;
  double* norms_;
  double* gram_diagonal_;
  double* diagonal_;
  double* off_diagonal_;
  double* beta_;
  double* room_;
};

}  // namespace SECATEUR_SIDE
}  // namespace secateur::cuda
