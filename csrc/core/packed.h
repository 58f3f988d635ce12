// Symmetric matrices as their upper triangle, row by row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace secateur {

inline std::size_t packed_size(std::size_t n) { return n * (n + 1) / 2; }

/// Where row i begins, less i: element (i, j) with j >= i is at packed_row(i, n) + j.
inline std::size_t packed_row(std::size_t i, std::size_t n) { return i * n - i * (i + 1) / 2; }

/// Rows that unpack_rows writes, and the side of the tiles that it writes to both triangles: one of
/// them fits into the first-level cache, where the columns of a whole matrix would not.
inline constexpr std::size_t kUnpackTile = 64;

/// Rows [begin, begin + kUnpackTile) of the full (n, n) matrix from the diagonal on, and the
/// columns below them, each element over `divisor`.
inline void unpack_rows(const double* packed, std::size_t n, std::size_t begin, double divisor,
                        double* out) {
  const std::size_t end = std::min(n, begin + kUnpackTile);
  double tile[kUnpackTile][kUnpackTile];
  for (std::size_t first = begin; first < n; first += kUnpackTile) {
    const std::size_t last = std::min(n, first + kUnpackTile);
    for (std::size_t i = begin; i < end; ++i) {
      const double* row = packed + packed_row(i, n);
      for (std::size_t j = std::max(i, first); j < last; ++j) {
        tile[j - first][i - begin] = out[i * n + j] = row[j] / divisor;
      }
    }
    for (std::size_t j = first; j < last; ++j) {
      std::copy_n(tile[j - first], std::min(j, end) - begin, out + j * n + begin);
    }
  }
}

/// The full symmetric (n, n) matrix, row-major, into out.
inline void unpack(const double* packed, std::size_t n, double* out) {
  for (std::size_t begin = 0; begin < n; begin += kUnpackTile) {
    unpack_rows(packed, n, begin, 1.0, out);
  }
}

/// to += from, of the same size.
inline void add(std::vector<double>& to, const std::vector<double>& from) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
}

}  // namespace secateur
