// Moments of rows: which rows count, how their work is dealt out, and one block of threads that
// multiplies a square of columns.
#pragma once

#include "block.h"
#include "index.h"

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

constexpr int kSide = 64;   ///< columns of a square
constexpr int kLanes = 16;  ///< threads along a side; each multiplies every 16th column
constexpr int kPerLane = kSide / kLanes;

/// Rows that are multiplied in T before they are added up in float64: strips of two squares are
/// 16 KiB in either precision, beside 32 KiB of sums.
template <typename T>
SECATEUR_DEVICE constexpr int strip_rows() {
  return static_cast<int>(128 / sizeof(T));
}

/// Of columns whose products a block of threads takes to tensor cores.
constexpr int kTile = 128;
/// Squares of float32 that are added up in float32, at most so many of them.
constexpr int kSplitRows = 4096;
/// The largest sum of them for which no product overflows, and the least for which what lies below
/// float32's range is nothing beside it.
constexpr float kHighSquare = 0x1p100f, kLowSquare = 0x1p-68f;
SECATEUR_DEVICE inline bool fits_float32(double peak) {
  return peak == 0 || (peak > 0x1p-40 && peak < 0x1p50);  // as csrc/core's
}
/// A row that is not there: zeros.
constexpr int64_t kNoRow = INT64_MIN;

/// What is known of the rows of one of the sums.
struct Verdict {
  unsigned long long peak;  ///< the bits of their largest magnitude: they have its order
  int faulty, fits;         ///< products of float32: some may not hold, the largest do
  unsigned done;            ///< blocks of threads that have searched for the peak
};

/// Which rows of x count.
struct RowChoice {
  Layout rows;        ///< x without its last axis
  int64_t count;      ///< of all rows
  bool in_turn;       ///< rows are (images, tokens), and sums take images in turn
  int64_t turns;      ///< image b is that of sums b mod turns
  int64_t stride;     ///< of tokens
  int64_t per_image;  ///< rows of an image, some of which may not be there
};

/// Elements from x's first to row r of sums s, whose phase is less than the stride, or kNoRow.
SECATEUR_DEVICE inline int64_t row_offset(const RowChoice& choice, int64_t s, int64_t phase,
                                          int64_t r) {
  if (!choice.in_turn) return r < choice.count ? offset_of(choice.rows, r) : kNoRow;
  const int64_t turn = r / choice.per_image;
  const int64_t image = s + turn * choice.turns;
  if (image >= choice.rows.shape[0]) return kNoRow;
  const int64_t token =
      (phase + turn % choice.stride) % choice.stride + r % choice.per_image * choice.stride;
  if (token >= choice.rows.shape[1]) return kNoRow;
  return image * choice.rows.strides[0] + token * choice.rows.strides[1];
}

SECATEUR_DEVICE inline int tiles_of(int dim) { return (dim + kTile - 1) / kTile; }

/// Tiles of `tall` tile columns by one that cover those on and above the diagonal.
SECATEUR_DEVICE inline int tiles_in(int side, int tall) {
  int count = 0;
  for (int i = 0; i < side; i += tall) count += side - i;
  return count;
}

/// Tile `index` of them, band by band: columns from `band` `tall` on by column `right`.
SECATEUR_DEVICE inline void tile_of(int index, int side, int tall, int* band, int* right) {
  int i = 0;
  for (; index >= side - i * tall; ++i) index -= side - i * tall;
  *band = i;
  *right = i * tall + index;
}

/// Rows that are multiplied by one block of threads: a multiple of kTile.
struct Splits {
  int rows, count;
};

/// For `blocks` of each split, of which a device takes `slots` at a time.
SECATEUR_DEVICE inline Splits split_rows(int64_t rows, int64_t blocks, int slots) {
  constexpr int64_t kOverhead = 512;  // rows that a block could take while it begins and ends
  const int64_t least = (rows + kSplitRows - 1) / kSplitRows;
  int64_t best_time = INT64_MAX;
  Splits best{kTile, 0};
  for (int64_t count = least; count <= least + slots; ++count) {
    const int64_t size = ((rows + count - 1) / count + kTile - 1) / kTile * kTile;
    const int64_t used = (rows + size - 1) / size;
    const int64_t time = (used * blocks + slots - 1) / slots * (size + kOverhead);
    if (time >= best_time) continue;
    best_time = time;
    best = {static_cast<int>(size), static_cast<int>(used)};
    if (size == kTile) break;
  }
  return best;
}

/// A normalised row's elements are (x - mean) factor.
struct RowNorm {
  double mean, factor;
  bool fits;  ///< in float64
};

/// Small squares are summed up times this, squared.
constexpr double kRowScale = 0x1p500;
SECATEUR_DEVICE inline bool needs_scale(double square) { return square < 0x1p-900; }

/// √dim over the root of `square` = Σ ((x - mean) scale)², or 0 where that is nothing but rounding.
/// As csrc/cpu/panel.cc's row_norm.
SECATEUR_DEVICE inline RowNorm row_norm(int dim, double mean, double scale, double square) {
  const double rounding = dim * 0x1p-53 * fabs(mean) * scale;
  double factor = square > dim * rounding * rounding
                      ? sqrt(static_cast<double>(dim)) / sqrt(square) * scale
                      : 0;
  if (!(factor < HUGE_VAL)) factor = 0;  // a row of nothing but subnormal numbers
  return {mean, factor, square <= 1e240 * scale && fabs(mean) <= 1e120};
}

SECATEUR_DEVICE inline float to_float(float x) { return x; }
SECATEUR_DEVICE inline float to_float(double x) { return static_cast<float>(x); }
SECATEUR_DEVICE inline float to_float(Half x) { return static_cast<float>(to_double(x)); }
SECATEUR_DEVICE inline float to_float(BFloat x) { return static_cast<float>(to_double(x)); }

/// Rows where they lie, read as T.
template <typename T, typename Source>
struct RowReader {
  const Source* data;
  const int64_t* offsets;
  int64_t stride;
  const RowNorm* norms;  ///< null: as they are

  SECATEUR_DEVICE T at(int64_t row, int64_t column) const {
    const int64_t offset = offsets[row];
    if (offset == kNoRow) return T(0);
    const Source x = data[offset + column * stride];
    if (norms != nullptr) {
      return static_cast<T>((to_double(x) - norms[row].mean) * norms[row].factor);
    }
    return sizeof(T) == sizeof(float) ? static_cast<T>(to_float(x)) : static_cast<T>(to_double(x));
  }
};

/// Adds square (left, right) of Σ x xᵀ over `count` rows to the packed upper triangle, and with
/// left = right its columns' sums. `strip` holds 2 strip_rows kSide of T, `sums` kSide².
template <typename T, typename Source>
SECATEUR_DEVICE void add_square(const Block& block, const RowReader<T, Source>& rows, int64_t count,
                                int dim, int left, int right, T* strip, double* sums, double* sum,
                                double* second_moment) {
  constexpr int kRows = strip_rows<T>();
  const int first = left * kSide, second = right * kSide;
  T* other = strip + kRows * kSide;
  block.each(kSide * kSide, [&](int i) { sums[i] = 0; });
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int here = count - begin < kRows ? static_cast<int>(count - begin) : kRows;
    block.each(here * kSide, [&](int i) {
      const int r = i / kSide, c = i % kSide;
      strip[i] = first + c < dim ? rows.at(begin + r, first + c) : T(0);
      other[i] = second + c < dim ? rows.at(begin + r, second + c) : T(0);
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
