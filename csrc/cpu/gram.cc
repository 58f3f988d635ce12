// Products of two panels: the inner loop of every Gram matrix.
#include "vec.h"

namespace secateur::cpu {
namespace {

// Accumulators that fit the register file: 8 rows of 2 vectors where there are 32 registers.
constexpr size_t kBlockRows = SECATEUR_VECTOR_BYTES == 64 ? 8 : 4;
constexpr size_t kBlockVectors = 2;

template <typename T, size_t kPanel>
inline void block(const T* a, const T* b, size_t rows, double* c, size_t ldc) {
  constexpr size_t lanes = kLanes<T>;
  Vec<T> sum[kBlockRows][kBlockVectors] = {};
  for (size_t r = 0; r < rows; ++r) {
    Vec<T> right[kBlockVectors];
#pragma GCC unroll 2
    for (size_t v = 0; v < kBlockVectors; ++v) right[v] = load(b + r * kPanel + v * lanes);
#pragma GCC unroll 8
    for (size_t i = 0; i < kBlockRows; ++i) {
      const T left = a[r * kPanel + i];
#pragma GCC unroll 2
      for (size_t v = 0; v < kBlockVectors; ++v) sum[i][v] += left * right[v];
    }
  }
  if constexpr (__is_same(T, double)) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
      for (size_t v = 0; v < kBlockVectors; ++v) {
        double* out = c + i * ldc + v * lanes;
        store(out, load(out) + sum[i][v]);
      }
    }
    return;
  }
  // Through memory: taking lanes out of registers one by one would cost as much as many rows.
  T sums[kBlockRows][kBlockVectors * lanes];
  for (size_t i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 2
    for (size_t v = 0; v < kBlockVectors; ++v) store(sums[i] + v * lanes, sum[i][v]);
  }
  for (size_t i = 0; i < kBlockRows; ++i) {
    double* out = c + i * ldc;
    for (size_t j = 0; j < kBlockVectors * lanes; ++j) out[j] += static_cast<double>(sums[i][j]);
  }
}

template <typename T, size_t kPanel>
void tile(const T* a, const T* b, size_t rows, double* c, size_t ldc) {
  constexpr size_t width = kBlockVectors * kLanes<T>;
  static_assert(kPanel % kBlockRows == 0 && kPanel % width == 0, "blocks tile the panel");
  for (size_t i = 0; i < kPanel; i += kBlockRows) {
    for (size_t j = 0; j < kPanel; j += width) {
      block<T, kPanel>(a + i, b + j, rows, c + i * ldc + j, ldc);
    }
  }
}

}  // namespace

const GramKernels SECATEUR_TABLE(gram) = {
    tile<double, kPanelF64>,
    tile<float, kPanelF32>,
};

}  // namespace secateur::cpu
