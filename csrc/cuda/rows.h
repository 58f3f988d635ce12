// Moments of rows: one block of threads packs a row, or multiplies a square of columns.
#pragma once

#include "block.h"

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

constexpr int kRowParts = 32;  ///< partial sums of a row
constexpr int kSide = 64;      ///< columns of a square
constexpr int kLanes = 16;     ///< threads along a side; each multiplies every 16th column
constexpr int kPerLane = kSide / kLanes;

/// Rows that are multiplied in T before they are added up in float64: strips of two squares are
/// 16 KiB in either precision, beside 32 KiB of sums.
template <typename T>
SECATEUR_DEVICE constexpr int strip_rows() {
  return static_cast<int>(128 / sizeof(T));
}

struct RowNorms {
  bool normalise;
  bool center;
};

/// Converts one row into out (dim); with norms to (x - mean) √dim / ‖x - mean‖, or zeros where that
/// is nothing but rounding. `room` holds kRowParts doubles. Returns the largest magnitude of what
/// was read, Inf where it is not finite; with norms 1, or Inf where float64 may not hold them.
template <typename T, typename Source>
SECATEUR_DEVICE double pack_row(const Block& block, const Source* x, int64_t stride, int dim,
                                const RowNorms& norms, double* room, T* out) {
  const auto total = [&](double shift, double scale, bool square) {
    block.each(kRowParts, [&](int part) {
      double sum = 0;
      for (int c = part; c < dim; c += kRowParts) {
        const double value = (to_double(x[c * stride]) - shift) * scale;
        sum += square ? value * value : value;
      }
      room[part] = sum;
    });
    return block.uniform([&] {
      double sum = 0;
      for (int part = 0; part < kRowParts; ++part) sum += room[part];
      return sum;
    });
  };
  if (!norms.normalise) {
    block.each(kRowParts, [&](int part) {
      double top = 0;
      for (int c = part; c < dim; c += kRowParts) {
        const double value = to_double(x[c * stride]), magnitude = fabs(value);
        // Also false for a NaN.
        if (!(magnitude <= top)) top = magnitude < HUGE_VAL ? magnitude : HUGE_VAL;
        out[c] = static_cast<T>(value);
      }
      room[part] = top;
    });
    return block.uniform([&] {
      double top = 0;
      for (int part = 0; part < kRowParts; ++part) top = room[part] > top ? room[part] : top;
      return top;
    });
  }
  // As csrc/cpu/panel.cc's row_norm.
  const double mean = norms.center ? total(0, 1, false) / dim : 0;
  double scale = 1, square = total(mean, scale, true);
  if (square < 0x1p-900) {
    scale = 0x1p500;
    square = total(mean, scale, true);
  }
  const double rounding = dim * 0x1p-53 * fabs(mean) * scale;
  double factor = square > dim * rounding * rounding
                      ? sqrt(static_cast<double>(dim)) / sqrt(square) * scale
                      : 0;
  if (!(factor < HUGE_VAL)) factor = 0;  // a row of nothing but subnormal numbers
  block.each(dim,
             [&](int c) { out[c] = static_cast<T>((to_double(x[c * stride]) - mean) * factor); });
  return square <= 1e240 * scale && fabs(mean) <= 1e120 ? 1 : HUGE_VAL;
}

/// Adds square (left, right) of Σ x xᵀ over packed rows (count, dim) to the packed upper triangle,
/// and with left = right its columns' sums. `strip` holds 2 strip_rows kSide of T, `sums` kSide².
template <typename T>
SECATEUR_DEVICE void add_square(const Block& block, const T* rows, int count, int dim, int left,
                                int right, T* strip, double* sums, double* sum,
                                double* second_moment) {
  constexpr int kRows = strip_rows<T>();
  const int first = left * kSide, second = right * kSide;
  T* other = strip + kRows * kSide;
  block.each(kSide * kSide, [&](int i) { sums[i] = 0; });
  for (int begin = 0; begin < count; begin += kRows) {
    const int here = smaller(kRows, count - begin);
    block.each(here * kSide, [&](int i) {
      const int r = i / kSide, c = i % kSide;
      const T* row = rows + static_cast<int64_t>(begin + r) * dim;
      strip[i] = first + c < dim ? row[first + c] : T(0);
      other[i] = second + c < dim ? row[second + c] : T(0);
    });
    block.each(kLanes * kLanes, [&](int i) {
      const T* a = strip + i / kLanes;
      const T* b = other + i % kLanes;
      T products[kPerLane][kPerLane] = {};
      for (int r = 0; r < here; ++r) {
        for (int p = 0; p < kPerLane; ++p) {
          for (int q = 0; q < kPerLane; ++q) {
            products[p][q] += a[r * kSide + p * kLanes] * b[r * kSide + q * kLanes];
          }
        }
      }
      double* to = sums + i / kLanes * kSide + i % kLanes;
      for (int p = 0; p < kPerLane; ++p) {
        for (int q = 0; q < kPerLane; ++q) {
          to[p * kLanes * kSide + q * kLanes] += static_cast<double>(products[p][q]);
        }
      }
    });
    if (left != right) continue;
    block.each(kSide, [&](int c) {
      if (first + c >= dim) return;
      double total = 0;
      for (int r = 0; r < here; ++r) total += static_cast<double>(strip[r * kSide + c]);
      sum[first + c] += total;
    });
  }
  block.each(kSide * kSide, [&](int e) {
    const int64_t i = first + e / kSide, j = second + e % kSide;
    if (j >= dim || i > j) return;
    second_moment[i * dim - i * (i + 1) / 2 + j] += sums[e];
  });
}

}  // namespace SECATEUR_SIDE
}  // namespace secateur::cuda
