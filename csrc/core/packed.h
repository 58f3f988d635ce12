// Symmetric matrices as their upper triangle, row by row.
#pragma once

#include <cstddef>
#include <vector>

namespace secateur {

inline std::size_t packed_size(std::size_t n) { return n * (n + 1) / 2; }

/// Where row i begins, less i: element (i, j) with j >= i is at packed_row(i, n) + j.
inline std::size_t packed_row(std::size_t i, std::size_t n) { return i * n - i * (i + 1) / 2; }

/// The full symmetric (n, n) matrix, row-major, into out.
inline void unpack(const double* packed, std::size_t n, double* out) {
  for (std::size_t i = 0; i < n; ++i) {
    const double* row = packed + packed_row(i, n);
    for (std::size_t j = i; j < n; ++j) out[i * n + j] = out[j * n + i] = row[j];
  }
}

/// to += from, of the same size.
inline void add(std::vector<double>& to, const std::vector<double>& from) {
  for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
}

}  // namespace secateur
