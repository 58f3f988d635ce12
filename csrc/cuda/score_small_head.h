// SNP's ω of one head of at most 64 neurons by one team: score_head.h's steps with matrices in
// registers and products by float64 tensor cores.
#pragma once

#include "score_head.h"
#include "team.h"

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

constexpr int kSmallHead = 64;   ///< neurons at most
constexpr int kSmallLimit = 8;   ///< singular triplets at most
constexpr int kPiece = 16;       ///< tokens that are read before they are multiplied
constexpr int kMatrixLd = 68;    ///< rows of shared matrices: fragments without bank conflicts
constexpr int kExchangeLd = 66;  ///< and where threads read rows
constexpr int kStageLd = 20;     ///< and of a warp's 16 columns

constexpr int kMatrixSize = kSmallHead * kMatrixLd;
constexpr int kStripSize = 2 * kPiece * kMatrixLd;
/// Doubles of a team's workspace: 56 KiB, of which four fit into a multiprocessor's 228.
constexpr int kSmallWork = kMatrixSize + kStripSize + 9 * kSmallHead + 3 * kSmallLimit + 24;
static_assert(kSmallWork * sizeof(double) <= 57344, "four teams a multiprocessor");

template <typename Source>
class SmallHeadScore {
 public:
  /// `work` holds kSmallWork doubles. input.dim is at most kSmallHead, its limit at most
  /// kSmallLimit.
  SECATEUR_DEVICE SmallHeadScore(const Team& team, const HeadInput& input, double* work)
      : team_(team), in_(input), d_(input.dim) {
    matrix_ = work;
    strip_ = matrix_ + kMatrixSize;
    mean_ = strip_ + kStripSize;
    sums_ = mean_ + kSmallHead;
    norms_ = sums_ + kSmallHead;
    diagonal_ = norms_ + kSmallHead;
    off_diagonal_ = diagonal_ + kSmallHead;
    beta_ = off_diagonal_ + kSmallHead;
    products_ = beta_ + kSmallHead;
    column_ = products_ + kSmallHead;
    values_ = column_ + 2 * kSmallHead;
    scales_ = values_ + kSmallLimit;
    parts_ = scales_ + kSmallLimit;
  }

  /// Writes result_size(dim, moments) doubles, unless a fault is found.
  SECATEUR_DEVICE HeadFault run(double max_moment_magnitude, double* out) {
    double query_scale = 1, key_scale = 1;
    if (sizeof(Source) == sizeof(double)) {
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
    grams(query_scale, key_scale);
    // NaN or Inf anywhere in a column is in its norm.
    PerThread<bool> bad;
    team_.run([&](int t) {
      const int i = t % kSmallHead;
      bad[t] = !(query_at(i, i) * 0 + key_at(i, i) * 0 == 0);
    });
    if (team_.any(bad)) return kNotFinite;
    if (in_.moments) {
      write_moments(query_scale, key_scale, out + d_);
      add_mean();
    }
    team_.sync();
    omega(out);
    return kSound;
  }

  /// ω alone, from Grams in query_at() and key_at(), upper and lower triangle.
  SECATEUR_DEVICE void omega(double* out) {
    balance();
    cholesky();
    congruence();
    tridiagonalise();
    eigenvalues();
    eigenvectors();
    back_transform();
    sum_up(out);
    team_.sync();
  }

  /// Both matrices lie in one: i <= j of the queries' (and of U), i >= j of the keys'.
  SECATEUR_DEVICE double& query_at(int i, int j) const { return matrix_[i * kMatrixLd + j + 1]; }
  SECATEUR_DEVICE double& key_at(int i, int j) const { return matrix_[i * kMatrixLd + j]; }

 private:
  /// A thread's part of a matrix: rows row(t) + 16 a, columns column(t) + 8 b.
  using Part = Array<Array<double, 8>, 4>;

  SECATEUR_DEVICE static int row(int t) { return t / 8; }
  SECATEUR_DEVICE static int column(int t) { return t % 8; }
  SECATEUR_DEVICE static int lane_row(int t) { return t % kWarp / 4; }
  SECATEUR_DEVICE static int lane_column(int t) { return t % 4; }

  /// The largest of what the threads have; the same for all of them.
  template <typename T>
  SECATEUR_DEVICE T largest(PerThread<T>& x) const {
    team_.largest(x);
    team_.run([&](int t) {
      if (t % kWarp == 0) parts_[t / kWarp] = static_cast<double>(x[t]);
    });
    team_.sync();
    double top = parts_[0];
    for (int i = 1; i < kTeam / kWarp; ++i) top = parts_[i] > top ? parts_[i] : top;
    team_.sync();
    return static_cast<T>(top);
  }

  /// The largest magnitude of one head's elements; Inf where one is not finite.
  SECATEUR_DEVICE double peak(const void* source, int64_t token, int64_t channel) {
    const Source* x = static_cast<const Source*>(source);
    PerThread<double> top;
    team_.run([&](int t) {
      top[t] = 0;
      for (int64_t n = t; n < in_.tokens; n += kTeam) {
        for (int c = 0; c < d_; ++c) {
          const double value = fabs(to_double(x[n * token + c * channel]));
          // Also false for a NaN.
          if (!(value <= top[t])) top[t] = value < HUGE_VAL ? value : HUGE_VAL;
        }
      }
    });
    return largest(top);
  }

  /// Tokens [begin, begin + kPiece) of queries and keys into the strip, as doubles; zeros behind
  /// the last token and neuron.
  SECATEUR_DEVICE void read_piece(int64_t begin, double query_scale, double key_scale) {
    team_.run([&](int t) {
      const bool key = t >= kTeam / 2;
      const int r = t % kPiece, c0 = t / kPiece % 4 * 16;
      const int64_t token = begin + r;
      const int64_t step = key ? in_.key_channel : in_.query_channel;
      const Source* x = static_cast<const Source*>(key ? in_.key : in_.query) +
                        (token < in_.tokens ? token * (key ? in_.key_token : in_.query_token) : 0) +
                        c0 * step;
      double* to = strip_ + (key ? kPiece * kMatrixLd : 0) + r * kMatrixLd + c0;
      const double scale = key ? key_scale : query_scale;
      Source values[16];
      read_row(x, step, token < in_.tokens ? d_ - c0 : 0, values);
      for (int c = 0; c < 16; ++c) {
        const double value = to_double(values[c]);
        to[c] = sizeof(Source) == sizeof(double) ? value * scale : value;
      }
    });
    team_.sync();
  }

  /// `count` elements, and zeros up to 16.
  SECATEUR_DEVICE static void read_row(const Source* x, int64_t step, int count,
                                       Source (&values)[16]) {
#if defined(__CUDA_ARCH__)
    if (step == 1 && count >= 16 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
      const uint4* from = reinterpret_cast<const uint4*>(x);
      uint4* to = reinterpret_cast<uint4*>(values);
      SECATEUR_UNROLL
      for (int i = 0; i < static_cast<int>(sizeof(values) / sizeof(uint4)); ++i) to[i] = from[i];
      return;
    }
#endif
    for (int c = 0; c < 16; ++c) values[c] = c < count ? x[c * step] : Source{};
  }

  /// Of the keys' piece, less the first piece's mean, so that a shared offset is gone before
  /// anything is squared.
  SECATEUR_DEVICE void centre_piece(int64_t begin) {
    const int rows = in_.tokens - begin < kPiece ? static_cast<int>(in_.tokens - begin) : kPiece;
    team_.run([&](int t) {
      if (t >= kSmallHead) return;
      double* x = strip_ + kPiece * kMatrixLd + t;
      double sum = 0;
      if (begin == 0) {
        for (int r = 0; r < rows; ++r) sum += x[r * kMatrixLd];
        mean_[t] = sum / rows;
        sums_[t] = sum = 0;
      }
      for (int r = 0; r < rows; ++r) sum += x[r * kMatrixLd] -= mean_[t];
      sums_[t] += sum;
    });
    team_.sync();
  }

  /// Warps 0 and 1 multiply queries, 2 and 3 keys: one of each pair the 16 rows of squares from 0
  /// and from 48 on, the other those from 16 and 32 on, ten (16, 8) tiles each.
  using TenTiles = PerThread<Array<Sums16x8, 10>>;

  SECATEUR_DEVICE static int tile_row(bool outer, int tile) {
    return outer ? (tile < 8 ? 0 : 3) : (tile < 6 ? 1 : 2);
  }
  SECATEUR_DEVICE static int tile_column(bool outer, int tile) {
    return outer ? (tile < 8 ? tile : tile - 2) : (tile < 6 ? tile + 2 : tile - 2);
  }

  template <bool kOuter>
  SECATEUR_DEVICE void multiply_piece(TenTiles& tiles, int k) const {
    const auto mine = [](int t) { return is_outer(t) == kOuter; };
    if (team_.absent(mine)) return;
    PerThread<Array<FragmentB, 8>> columns;
    PerThread<FragmentA> rows[2];
    team_.run([&](int t) {
      if (!mine(t)) return;
      const double* x = strip_ + (t / kWarp / 2) * kPiece * kMatrixLd +
                        (k + lane_column(t)) * kMatrixLd + lane_row(t);
      SECATEUR_UNROLL
      for (int n = kOuter ? 0 : 2; n < 8; ++n) {
        columns[t][n][0] = x[n * 8];
        columns[t][n][1] = x[4 * kMatrixLd + n * 8];
      }
      SECATEUR_UNROLL
      for (int half = 0; half < 2; ++half) {
        // XᵀX: what are columns on the right are rows on the left.
        const int n = 2 * tile_row(kOuter, half == 0 ? 0 : 9);
        rows[half][t][0] = columns[t][n][0];
        rows[half][t][1] = columns[t][n + 1][0];
        rows[half][t][2] = columns[t][n][1];
        rows[half][t][3] = columns[t][n + 1][1];
      }
    });
    SECATEUR_UNROLL
    for (int tile = 0; tile < 10; ++tile) {
      const int half = tile < (kOuter ? 8 : 6) ? 0 : 1, n = tile_column(kOuter, tile);
      team_.multiply_if(
          mine, [&](int t) -> FragmentA& { return rows[half][t]; },
          [&](int t) -> FragmentB& { return columns[t][n]; },
          [&](int t) -> Sums16x8& { return tiles[t][tile]; });
    }
  }

  SECATEUR_DEVICE static bool is_outer(int t) { return t / kWarp % 2 == 0; }

  /// QᵀQ into the upper triangle, KᵀK into the lower one, with moments of centred keys.
  SECATEUR_DEVICE void grams(double query_scale, double key_scale) {
    TenTiles tiles;
    team_.run([&](int t) {
      SECATEUR_UNROLL
      for (int tile = 0; tile < 10; ++tile) tiles[t][tile] = Sums16x8{};
    });
    for (int64_t begin = 0; begin < in_.tokens; begin += kPiece) {
      read_piece(begin, query_scale, key_scale);
      if (in_.moments) centre_piece(begin);
      SECATEUR_UNROLL
      for (int k = 0; k < kPiece; k += 8) {
        multiply_piece<true>(tiles, k);
        multiply_piece<false>(tiles, k);
      }
      team_.sync();
    }
    const double count = static_cast<double>(in_.tokens);
    team_.run([&](int t) {
      const bool key = t / kWarp >= 2, outer = is_outer(t);
      SECATEUR_UNROLL
      for (int tile = 0; tile < 10; ++tile) {
        SECATEUR_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int i = tile_row(outer, tile) * 16 + lane_row(t) + e / 2 * 8;
          const int j = tile_column(outer, tile) * 8 + lane_column(t) * 2 + e % 2;
          if (j < i) continue;
          double sum = tiles[t][tile][e];
          if (key && in_.moments) sum -= sums_[i] / count * sums_[j];
          if (key) {
            key_at(j, i) = sum;
          } else {
            query_at(i, j) = sum;
          }
        }
      }
    });
    team_.sync();
    if (!in_.moments) return;
    team_.run([&](int t) {
      if (t < kSmallHead) mean_[t] += sums_[t] / count;
    });
    team_.sync();
  }

  SECATEUR_DEVICE void write_moments(double query_scale, double key_scale, double* out) {
    const int packed = d_ * (d_ + 1) / 2;
    const double query_unit = 1 / query_scale / query_scale, key_unit = 1 / key_scale / key_scale;
    team_.run([&](int t) {
      for (int e = t; e < d_ * d_; e += kTeam) {
        const int i = e / d_, j = e % d_;
        if (j < i) continue;
        const double query = query_at(i, j) * query_unit, key = key_at(j, i) * key_unit;
        double* to = out + (i * d_ - i * (i + 1) / 2 + j);
        to[0] = query;
        to[packed] = key;
        to[2 * packed] = query * key;
      }
    });
    team_.sync();
  }

  /// From the Gram of centred keys to that of the keys.
  SECATEUR_DEVICE void add_mean() {
    team_.run([&](int t) {
      for (int e = t; e < kSmallHead * kSmallHead; e += kTeam) {
        const int i = e / kSmallHead, j = e % kSmallHead;
        if (j <= i) key_at(i, j) += static_cast<double>(in_.tokens) * mean_[i] * mean_[j];
      }
    });
  }

  /// As HeadScore::balance.
  SECATEUR_DEVICE void balance() {
    double* query_factors = products_;
    double* key_factors = column_;
    PerThread<int> top;
    team_.run([&](int t) {
      const int i = t % kSmallHead;
      const double q = query_at(i, i), k = key_at(i, i);
      top[t] = -100000;
      if (q > 0 && k > 0) {
        const int shift = (ilogb(k) - ilogb(q)) / 4;
        top[t] = larger(ilogb(q) + 2 * shift, ilogb(k) - 2 * shift);
      }
    });
    const int all = largest(top);
    team_.run([&](int t) {
      if (t >= kSmallHead) return;
      const double q = query_at(t, t), k = key_at(t, t);
      const bool counts = q > 0 && k > 0;
      const int shift = counts ? (ilogb(k) - ilogb(q)) / 4 : 0;
      query_factors[t] = counts ? ldexp(1.0, shift - all / 2) : 0;
      key_factors[t] = counts ? ldexp(1.0, -shift - all / 2) : 0;
    });
    team_.sync();
    team_.run([&](int t) {
      // A thread takes half a row of either triangle; one factor after the other: their product
      // may not fit.
      const int i = t / 2;
      for (int j = t % 2; j < kSmallHead; j += 2) {
        if (j >= i) query_at(i, j) = query_at(i, j) * query_factors[i] * query_factors[j];
        if (j <= i) key_at(i, j) = key_at(i, j) * key_factors[i] * key_factors[j];
      }
    });
    team_.sync();
    team_.run([&](int t) {
      if (t >= kSmallHead) return;
      norms_[t] = sqrt(query_at(t, t)) * sqrt(key_at(t, t));
      query_at(t, t) *= 1 + kRidge;
    });
    team_.sync();
  }

  /// The queries' triangle becomes U, A = Uᵀ U. A pivot lost to rounding gives a zero row.
  SECATEUR_DEVICE void cholesky() {
    PerThread<Part> rest;
    team_.run([&](int t) {
      SECATEUR_UNROLL
      for (int a = 0; a < 4; ++a) {
        SECATEUR_UNROLL
        for (int b = 0; b < 8; ++b) {
          const int i = row(t) + 16 * a, j = column(t) + 8 * b;
          rest[t][a][b] = j >= i ? query_at(i, j) : 0;
        }
      }
    });
    team_.sync();
    SECATEUR_UNROLL
    for (int block = 0; block < 4; ++block) {
      for (int step = 0; step < 16; ++step) {
        const int j = 16 * block + step;
        team_.run([&](int t) {
          if (row(t) != step) return;
          SECATEUR_UNROLL
          for (int b = 2 * block; b < 8; ++b) {
            const int k = column(t) + 8 * b;
            if (k >= j) query_at(j, k) = rest[t][block][b];
          }
        });
        team_.sync();
        team_.run([&](int t) {
          const double pivot = query_at(j, j), inverse = pivot > 0 ? 1 / pivot : 0;
          double right[8];
          SECATEUR_UNROLL
          for (int b = 2 * block; b < 8; ++b) {
            const int k = column(t) + 8 * b;
            right[b] = k > j ? query_at(j, k) : 0;
          }
          SECATEUR_UNROLL
          for (int a = block; a < 4; ++a) {
            const int i = row(t) + 16 * a;
            const double left = i > j ? query_at(j, i) * inverse : 0;
            SECATEUR_UNROLL
            for (int b = 2 * block; b < 8; ++b) rest[t][a][b] -= left * right[b];
          }
        });
      }
    }
    team_.sync();
    team_.run([&](int t) {
      if (t >= kSmallHead) return;
      const double pivot = query_at(t, t);
      beta_[t] = pivot > 0 ? 1 / sqrt(pivot) : 0;
    });
    team_.sync();
    team_.run([&](int t) {
      const int i = t / 2;
      for (int j = t % 2; j < kSmallHead; j += 2) {
        if (j >= i) query_at(i, j) *= beta_[i];
      }
    });
    team_.sync();
  }

  SECATEUR_DEVICE double upper(int i, int j) const { return i <= j ? query_at(i, j) : 0; }
  SECATEUR_DEVICE double keys(int i, int j) const { return i >= j ? key_at(i, j) : key_at(j, i); }

  /// T = U G Uᵀ into the threads' parts. A warp makes 16 columns of G Uᵀ, 16 rows after the other,
  /// and multiplies them by U.
  SECATEUR_DEVICE void congruence() {
    PerThread<Array<Sums16x8, 8>> tiles;  // 4 squares of rows by 2 tiles of 8 columns
    team_.run([&](int t) {
      SECATEUR_UNROLL
      for (int i = 0; i < 8; ++i) tiles[t][i] = Sums16x8{};
    });
    PerThread<FragmentA> a;
    PerThread<FragmentB> b[2];
    const auto times = [&](PerThread<Array<Sums16x8, 2>>& sums) {
      SECATEUR_UNROLL
      for (int n = 0; n < 2; ++n) {
        team_.multiply([&](int t) -> FragmentA& { return a[t]; },
                       [&](int t) -> FragmentB& { return b[n][t]; },
                       [&](int t) -> Sums16x8& { return sums[t][n]; });
      }
    };
    SECATEUR_UNROLL
    for (int square = 0; square < 4; ++square) {
      PerThread<Array<Sums16x8, 2>> right;
      team_.run([&](int t) { right[t][0] = right[t][1] = Sums16x8{}; });
      for (int k = 0; k < kSmallHead; k += 8) {
        team_.run([&](int t) {
          const int first = t / kWarp * 16, g = lane_row(t), c = k + lane_column(t);
          const int i = square * 16 + g;
          SECATEUR_UNROLL
          for (int e = 0; e < 4; ++e) a[t][e] = keys(i + e % 2 * 8, c + e / 2 * 4);
          SECATEUR_UNROLL
          for (int n = 0; n < 2; ++n) {
            b[n][t][0] = upper(first + n * 8 + g, c);
            b[n][t][1] = upper(first + n * 8 + g, c + 4);
          }
        });
        times(right);
      }
      team_.sync_warps();
      team_.run([&](int t) {
        double* stage = strip_ + t / kWarp * kPiece * kStageLd;
        SECATEUR_UNROLL
        for (int n = 0; n < 2; ++n) {
          SECATEUR_UNROLL
          for (int e = 0; e < 4; ++e) {
            stage[(lane_row(t) + e / 2 * 8) * kStageLd + n * 8 + lane_column(t) * 2 + e % 2] =
                right[t][n][e];
          }
        }
      });
      team_.sync_warps();
      SECATEUR_UNROLL
      for (int k = 0; k < 16; k += 8) {
        team_.run([&](int t) {
          const double* stage = strip_ + t / kWarp * kPiece * kStageLd +
                                (k + lane_column(t)) * kStageLd + lane_row(t);
          SECATEUR_UNROLL
          for (int n = 0; n < 2; ++n) {
            b[n][t][0] = stage[n * 8];
            b[n][t][1] = stage[4 * kStageLd + n * 8];
          }
        });
        SECATEUR_UNROLL
        for (int i = 0; i <= square; ++i) {
          team_.run([&](int t) {
            const int r = i * 16 + lane_row(t), c = square * 16 + k + lane_column(t);
            SECATEUR_UNROLL
            for (int e = 0; e < 4; ++e) a[t][e] = upper(r + e % 2 * 8, c + e / 2 * 4);
          });
          SECATEUR_UNROLL
          for (int n = 0; n < 2; ++n) {
            team_.multiply([&](int t) -> FragmentA& { return a[t]; },
                           [&](int t) -> FragmentB& { return b[n][t]; },
                           [&](int t) -> Sums16x8& { return tiles[t][i * 2 + n]; });
          }
        }
      }
    }
    SECATEUR_UNROLL
    for (int half = 0; half < 2; ++half) {
      team_.sync();
      team_.run([&](int t) {
        SECATEUR_UNROLL
        for (int i = 0; i < 4; ++i) {
          SECATEUR_UNROLL
          for (int e = 0; e < 4; ++e) {
            strip_[(i / 2 * 16 + lane_row(t) + e / 2 * 8) * kExchangeLd + t / kWarp * 16 +
                   i % 2 * 8 + lane_column(t) * 2 + e % 2] = tiles[t][half * 4 + i][e];
          }
        }
      });
      team_.sync();
      team_.run([&](int t) {
        SECATEUR_UNROLL
        for (int a2 = 0; a2 < 2; ++a2) {
          SECATEUR_UNROLL
          for (int b2 = 0; b2 < 8; ++b2) {
            part_[t][2 * half + a2][b2] =
                strip_[(row(t) + 16 * a2) * kExchangeLd + column(t) + 8 * b2];
          }
        }
      });
    }
    team_.sync();
  }

  /// Householder reflections to tridiagonal form; reflection k, I - beta[k] v vᵀ, is left with its
  /// v below the diagonal in column k of the parts.
  SECATEUR_DEVICE void tridiagonalise() {
    team_.run([&](int t) {
      if (t < kSmallHead) diagonal_[t] = off_diagonal_[t] = beta_[t] = 0;
    });
    team_.sync();
    double* tails = parts_;  // of a column, one for each warp
    double* shifts = parts_ + 4;
    PerThread<double> sum;
    PerThread<Array<double, 4>> rows;
    SECATEUR_UNROLL
    for (int block = 0; block < 8; ++block) {
      // Rows before the first that is left are done; row k + 1 has a = begin or end, column k + 1
      // has b = block or block + 1: the compiler knows which.
      const int begin = block / 2, end = (block + 1) / 2;
      for (int step = 0; step < 8; ++step) {
        const int k = 8 * block + step;
        if (k >= d_) break;
        double* v = column_ + step % 2 * kSmallHead;
        team_.run([&](int t) {
          sum[t] = 0;
          if (column(t) != step) return;
          SECATEUR_UNROLL
          for (int a = begin; a < 4; ++a) {
            const int i = row(t) + 16 * a;
            const double x = part_[t][a][block];
            if (i == k) diagonal_[k] = x;
            v[i] = i > k ? x : 0;
            if (i > k + 1) sum[t] += x * x;
          }
        });
        team_.template sum<24>(sum);
        team_.run([&](int t) {
          if (t % kWarp == step) tails[t / kWarp] = sum[t];
        });
        team_.sync();
        if (k + 1 >= d_) break;
        const double tail = (tails[0] + tails[1]) + (tails[2] + tails[3]), head = v[k + 1];
        if (tail < kTrivial) {
          team_.run([&](int t) {
            if (t == 0) off_diagonal_[k] = head;
          });
          team_.sync();
          continue;
        }
        const double norm = sqrt(head * head + tail);
        const double alpha = head > 0 ? -norm : norm;  // away from cancellation
        const double first = head - alpha;
        const double beta = 2 / (first * first + tail);
        team_.run([&](int t) {
          if (t == 0) {
            off_diagonal_[k] = alpha;
            beta_[k] = beta;
          }
          Array<double, 4>& y = rows[t];
          y = {};
          SECATEUR_UNROLL
          for (int b = block; b < 8; ++b) {
            const int j = column(t) + 8 * b;
            const double x = b <= block + 1 && j == k + 1 ? first : v[j];
            SECATEUR_UNROLL
            for (int a = begin; a < 4; ++a) y[a] += part_[t][a][b] * x;
          }
          sum[t] = 0;
          SECATEUR_UNROLL
          for (int a = begin; a < 4; ++a) {
            const int i = row(t) + 16 * a;
            const bool is_first = a <= end && i == k + 1;
            sum[t] += (is_first ? first : v[i]) * y[a];
            if (is_first && column(t) == step) part_[t][a][block] = first;
          }
        });
        team_.scatter_sums(rows);
        team_.template sum<31>(sum);
        team_.run([&](int t) {
          const int i = row(t) + 16 * (column(t) / 2);
          if (column(t) % 2 == 0) products_[i] = i > k ? beta * rows[t][0] : 0;
          if (t % kWarp == 0) shifts[t / kWarp] = sum[t];
        });
        team_.sync();
        const double shift = beta * beta / 2 * ((shifts[0] + shifts[1]) + (shifts[2] + shifts[3]));
        team_.run([&](int t) {
          double left_v[4], left_w[4];
          SECATEUR_UNROLL
          for (int a = begin; a < 4; ++a) {
            const int i = row(t) + 16 * a;
            left_v[a] = a <= end && i == k + 1 ? first : v[i];
            left_w[a] = products_[i] - shift * left_v[a];
          }
          SECATEUR_UNROLL
          for (int b = block; b < 8; ++b) {
            const int j = column(t) + 8 * b;
            const double right_v = b <= block + 1 && j == k + 1 ? first : v[j];
            const double right_w = products_[j] - shift * right_v;
            SECATEUR_UNROLL
            for (int a = begin; a < 4; ++a) {
              // Apart, both are fused into the subtraction.
              part_[t][a][b] -= left_v[a] * right_w;
              part_[t][a][b] -= left_w[a] * right_v;
            }
          }
        });
      }
    }
    team_.sync();
  }

  /// Squared off-diagonal elements of a matrix of norm at most 1, at least: no minor is lost for
  /// good, and eigenvalues move by less than 2^-59.
  static constexpr double kLeastSquare = 0x1p-120;

  /// Eigenvalues of the tridiagonal matrix below x, by the signs of its leading minors. Row i of
  /// `minors` has the squared off-diagonal element before it and its diagonal element; rows that
  /// are not there have 2. Zero is positive here: the minor behind it has the other sign of the one
  /// before, so that the pair counts once whatever zero counts as.
  SECATEUR_DEVICE static int below(const double* minors, double x) {
    double before = 0, now = 1;
    int count = 0;
    for (int begin = 0; begin < kSmallHead; begin += 4) {
      SECATEUR_UNROLL
      for (int i = begin; i < begin + 4; ++i) {
        const double next = (minors[2 * i + 1] - x) * now - minors[2 * i] * before;
        count += (high_word(next) < 0) != (high_word(now) < 0) ? 1 : 0;
        before = now;
        now = next;
      }
      // Both below 2^-511: four minors later they would still be numbers, and many more not.
      if (((high_word(now) | high_word(before)) & 0x7fffffff) < 0x20000000) {
        before *= 0x1p600;
        now *= 0x1p600;
      }
    }
    return count;
  }

  /// The leading eigenvalues in descending order, into values_; how many count, into count_. First
  /// all threads look at points of the whole range, then 16 at those of one eigenvalue's interval.
  SECATEUR_DEVICE void eigenvalues() {
    PerThread<double> low, high;
    PerThread<int> count;
    PerThread<bool> above;
    PerThread<double> reach;
    team_.run([&](int t) {
      const int i = t % kSmallHead;
      const double radius = fabs(off_diagonal_[i]) + (i > 0 ? fabs(off_diagonal_[i - 1]) : 0.0);
      reach[t] = (fabs(diagonal_[i]) + radius) * (1 + 0x1p-50);
    });
    bound_ = largest(reach);
    double* minors = strip_;
    double* counts = strip_ + 2 * kSmallHead;
    const double unit = normalising(bound_) / 2;  // norms in [1/2, 1)
    team_.run([&](int t) {
      if (t >= kSmallHead) return;
      const double off = t > 0 ? off_diagonal_[t - 1] * unit : 0.0;
      minors[2 * t] = off * off > kLeastSquare ? off * off : kLeastSquare;
      minors[2 * t + 1] = t < d_ ? diagonal_[t] * unit : 2.0;
    });
    team_.sync();
    const double end = bound_ * unit;
    team_.run([&](int t) { counts[t] = below(minors, end * ((t + 1) / (kTeam + 1.0))); });
    team_.sync();
    team_.run([&](int t) {
      const int j = t / 16;
      // The j-th largest is at or above x exactly where more than j are.
      int first = 0, last = kTeam;  // points below `first` have it above them
      while (first < last) {
        const int middle = (first + last) / 2;
        if (d_ - counts[middle] > j) {
          first = middle + 1;
        } else {
          last = middle;
        }
      }
      low[t] = end * (first / (kTeam + 1.0));
      high[t] = end * ((first + 1) / (kTeam + 1.0));
    });
    for (int round = 0; round < kRounds; ++round) {
      team_.run([&](int t) {
        const double x = low[t] + (high[t] - low[t]) * ((t % 16 + 1) * kPart);
        above[t] = d_ - below(minors, x) > t / 16;
      });
      team_.votes(above, count);
      team_.run([&](int t) {
        const double from = low[t], width = high[t] - low[t];
        const int s = count[t];
        if (s > 0) low[t] = from + width * (s * kPart);
        if (s < 16) high[t] = from + width * ((s + 1) * kPart);
      });
    }
    team_.run([&](int t) {
      if (t % 16 == 0) values_[t / 16] = (low[t] + (high[t] - low[t]) / 2) / unit;
    });
    team_.sync();
    count_ = 0;
    if (!(values_[0] > 0)) return;
    while (count_ < in_.limit && values_[count_] > kCutoff * values_[0]) ++count_;
  }

  static constexpr int kRounds = 12;  // 129 · 17^12 > 2^55
  static constexpr double kPart = 1.0 / 17;
  static constexpr int kSolves = 2;

  /// Vectors of the first count_ values_, in the tridiagonal matrix's basis, by inverse iteration
  /// into strip_ (64, 8), to be divided by the norms that scales_ has the inverses of. A thread
  /// each: the rows of T - x I = P L U are one after the other.
  SECATEUR_DEVICE void eigenvectors() {
    team_.sync();
    team_.run([&](int t) {
      for (int e = t; e < kSmallHead * kSmallLimit; e += kTeam) {
        // Anything that is orthogonal to nothing.
        const uint32_t hash = (static_cast<uint32_t>(e) + 1) * 2654435761u;
        const double value = 0.5 + (hash >> 8) * 0x1p-24;
        strip_[e] = (hash & 0x80u) != 0 ? -value : value;
      }
    });
    team_.sync();
    PerThread<uint64_t> exchanged;
    team_.run([&](int t) {
      exchanged[t] = 0;
      if (t < count_) exchanged[t] = factorise(t);
    });
    for (int round = 0; round < kSolves; ++round) {
      team_.run([&](int t) {
        if (t < count_) solve(t, exchanged[t]);
      });
      team_.sync();
      for (int j = 1; j < count_; ++j) separate(j);
    }
  }

  SECATEUR_DEVICE double& vector_at(int i, int j) const { return strip_[i * kSmallLimit + j]; }
  /// Rows of the factors: multipliers, inverse pivots, first off-diagonal of U.
  SECATEUR_DEVICE double& factor_at(int which, int i, int j) const {
    return strip_[((which + 1) * kSmallHead + i) * kSmallLimit + j];
  }

  SECATEUR_DEVICE uint64_t factorise(int t) const {
    const double x = values_[t], least = bound_ * 0x1p-52 + 1e-290;
    double pivot = diagonal_[0] - x, next = off_diagonal_[0];
    uint64_t exchanged = 0;
    for (int i = 0; i + 1 < d_; ++i) {
      const double under = off_diagonal_[i], middle = diagonal_[i + 1] - x;
      const double right = off_diagonal_[i + 1];
      if (fabs(pivot) >= fabs(under)) {
        if (fabs(pivot) < least) pivot = least;
        const double inverse = 1 / pivot, multiplier = under * inverse;
        factor_at(0, i, t) = multiplier;
        factor_at(1, i, t) = inverse;
        factor_at(2, i, t) = next;
        pivot = middle - multiplier * next;
        next = right;
      } else {
        const double inverse = 1 / under, multiplier = pivot * inverse;
        exchanged |= uint64_t{1} << i;
        factor_at(0, i, t) = multiplier;
        factor_at(1, i, t) = inverse;
        factor_at(2, i, t) = middle;
        pivot = next - multiplier * middle;
        next = -multiplier * right;
      }
    }
    factor_at(1, d_ - 1, t) = 1 / (fabs(pivot) < least ? least : pivot);
    factor_at(2, d_ - 1, t) = 0;
    return exchanged;
  }

  /// x ← (T - λ I)⁻¹ x; the inverse of its norm into scales_. What it grows by is at most
  /// 2^52 over the norm of T, each time.
  SECATEUR_DEVICE void solve(int t, uint64_t exchanged) const {
    double now = vector_at(0, t);
    for (int i = 0; i + 1 < d_; ++i) {
      const double low = vector_at(i + 1, t), multiplier = factor_at(0, i, t);
      const bool swap = (exchanged >> i & 1) != 0;
      vector_at(i, t) = swap ? low : now;
      now = swap ? now - multiplier * low : low - multiplier * now;
    }
    double first = 0, second = 0, square = 0;
    for (int i = d_ - 1; i >= 0; --i) {
      const double third = (exchanged >> i & 1) != 0 ? off_diagonal_[i + 1] : 0;
      const double value = (i == d_ - 1 ? now : vector_at(i, t)) - third * second;
      const double x = (value - factor_at(2, i, t) * first) * factor_at(1, i, t);
      vector_at(i, t) = x;
      square += x * x;
      second = first;
      first = x;
    }
    scales_[t] = square > 0 ? 1 / sqrt(square) : 0;
  }

  /// Vector j less its parts along earlier ones that inverse iteration cannot tell from it.
  SECATEUR_DEVICE void separate(int j) const {
    PerThread<double> product;
    const auto total = [&](int p) {
      team_.run([&](int t) {
        product[t] = t < d_ ? vector_at(t, j) * scales_[j] * vector_at(t, p) * scales_[p] : 0;
      });
      team_.template sum<31>(product);
      team_.run([&](int t) {
        if (t % kWarp == 0) parts_[t / kWarp] = product[t];
      });
      team_.sync();
      return parts_[0] + parts_[1];
    };
    bool changed = false;
    for (int p = 0; p < j; ++p) {
      if (values_[p] - values_[j] > 1e-9 * bound_) continue;  // the same for all threads
      const double part = total(p);
      team_.run([&](int t) {
        if (t < d_) {
          vector_at(t, j) = vector_at(t, j) * scales_[j] - part * vector_at(t, p) * scales_[p];
        }
      });
      team_.sync();
      team_.run([&](int t) {
        if (t == 0) scales_[j] = 1;
      });
      team_.sync();
      changed = true;
    }
    if (!changed) return;
    const double square = total(j);
    team_.sync();
    team_.run([&](int t) {
      if (t == 0) scales_[j] = square > 0 ? 1 / sqrt(square) : 0;
    });
    team_.sync();
  }

  /// From the tridiagonal matrix's basis to T's: all reflections, last first. 16 threads a vector.
  SECATEUR_DEVICE void back_transform() {
    PerThread<Array<double, 4>> w;
    PerThread<double> sum;
    team_.run([&](int t) {
      const int j = t / 16;
      SECATEUR_UNROLL
      for (int a = 0; a < 4; ++a) {
        const int i = t % 16 + 16 * a;
        w[t][a] = j < count_ && i < d_ ? vector_at(i, j) * scales_[j] : 0;
      }
    });
    team_.sync();
    SECATEUR_UNROLL
    for (int block = 7; block >= 0; --block) {
      double* room = strip_ + kSmallHead * kSmallLimit + block % 2 * 8 * kMatrixLd;
      if (8 * block >= d_) continue;
      team_.run([&](int t) {
        const int k = 8 * block + column(t);
        SECATEUR_UNROLL
        for (int a = block / 2; a < 4; ++a) {
          const int i = row(t) + 16 * a;
          room[column(t) * kMatrixLd + i] = i > k ? part_[t][a][block] : 0;
        }
      });
      team_.sync();
      for (int step = 7; step >= 0; --step) {
        const double beta = beta_[8 * block + step];
        if (beta == 0) continue;  // also of neurons that are not there
        const double* v = room + step * kMatrixLd;
        team_.run([&](int t) {
          sum[t] = 0;
          SECATEUR_UNROLL
          for (int a = block / 2; a < 4; ++a) sum[t] += v[t % 16 + 16 * a] * w[t][a];
        });
        team_.template sum<15>(sum);
        team_.run([&](int t) {
          const double times = beta * sum[t];
          SECATEUR_UNROLL
          for (int a = block / 2; a < 4; ++a) w[t][a] -= times * v[t % 16 + 16 * a];
        });
      }
    }
    team_.run([&](int t) {
      SECATEUR_UNROLL
      for (int a = 0; a < 4; ++a) vector_at(t % 16 + 16 * a, t / 16) = w[t][a];
    });
    team_.sync();
  }

  /// y_j = Uᵀ w_j, then Σ_j |y_ij| |(G y_j)_i| / s_j over the norms. A warp has 16 rows.
  SECATEUR_DEVICE void sum_up(double* out) {
    double* images = strip_ + kSmallHead * kSmallLimit;  // y, (64, 8)
    PerThread<FragmentA> a;
    PerThread<FragmentB> b;
    PerThread<Sums16x8> y, z;
    team_.run([&](int t) { y[t] = z[t] = Sums16x8{}; });
    const auto times = [&](PerThread<Sums16x8>& sums) {
      team_.multiply([&](int t) -> FragmentA& { return a[t]; },
                     [&](int t) -> FragmentB& { return b[t]; },
                     [&](int t) -> Sums16x8& { return sums[t]; });
    };
    for (int k = 0; k < kSmallHead; k += 8) {
      team_.run([&](int t) {
        const int i = t / kWarp * 16 + lane_row(t), c = k + lane_column(t);
        SECATEUR_UNROLL
        for (int e = 0; e < 4; ++e) a[t][e] = upper(c + e / 2 * 4, i + e % 2 * 8);
        b[t][0] = vector_at(c, lane_row(t));
        b[t][1] = vector_at(c + 4, lane_row(t));
      });
      times(y);
    }
    team_.run([&](int t) {
      SECATEUR_UNROLL
      for (int e = 0; e < 4; ++e) {
        images[(t / kWarp * 16 + lane_row(t) + e / 2 * 8) * kSmallLimit + lane_column(t) * 2 +
               e % 2] = y[t][e];
      }
    });
    team_.sync();
    for (int k = 0; k < kSmallHead; k += 8) {
      team_.run([&](int t) {
        const int i = t / kWarp * 16 + lane_row(t), c = k + lane_column(t);
        SECATEUR_UNROLL
        for (int e = 0; e < 4; ++e) a[t][e] = keys(i + e % 2 * 8, c + e / 2 * 4);
        b[t][0] = images[c * kSmallLimit + lane_row(t)];
        b[t][1] = images[(c + 4) * kSmallLimit + lane_row(t)];
      });
      times(z);
    }
    PerThread<double> sums[2];
    team_.run([&](int t) {
      SECATEUR_UNROLL
      for (int half = 0; half < 2; ++half) {
        sums[half][t] = 0;
        SECATEUR_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int j = lane_column(t) * 2 + e;
          if (j < count_) {
            sums[half][t] += fabs(y[t][2 * half + e] * z[t][2 * half + e]) / sqrt(values_[j]);
          }
        }
      }
    });
    team_.template sum<3>(sums[0]);
    team_.template sum<3>(sums[1]);
    team_.run([&](int t) {
      if (lane_column(t) != 0) return;
      SECATEUR_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = t / kWarp * 16 + lane_row(t) + half * 8;
        if (i < d_) out[i] = norms_[i] > 0 ? sums[half][t] / norms_[i] : 0;
      }
    });
  }

  const Team& team_;
  const HeadInput& in_;
  int d_;
  int count_ = 0;         ///< eigenvalues that count
  double bound_ = 0;      ///< of the eigenvalues
  PerThread<Part> part_;  ///< of T, then of reflections
  double* matrix_;        ///< Gram of queries, then U, over that of keys
  double* strip_;         ///< tokens, exchanges, vectors and factors
  double* mean_;          ///< of keys, over the tokens
  double* sums_;          ///< of keys less the first tokens' mean
  double* norms_;
  double* diagonal_;
  double* off_diagonal_;
  double* beta_;
  double* products_;
  double* column_;  ///< two of them
  double* values_;  ///< (kSmallLimit)
  double* scales_;  ///< (kSmallLimit)
  double* parts_;   ///< of the warps
};

}  // namespace SECATEUR_SIDE
}  // namespace secateur::cuda
