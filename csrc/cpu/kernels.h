// The kernels' interface. Kernels trust their arguments; they do not allocate, check, throw or
// print. This header is included by sources compiled for wide instruction sets, so it may not
// include a standard header that has inline code (nor may they).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace secateur::cpu {

// Matrices are multiplied from panels: the rows of kPanel<…> adjacent columns, row-major, zeros
// after the last column. One panel of kRows rows is 32 KiB.
constexpr size_t kPanelF64 = 16;
constexpr size_t kPanelF32 = 32;
constexpr size_t kRows = 256;

// In the order of secateur::DType.
constexpr size_t kDTypes = 4;

struct PanelKernels {
  // Whether all of `count` elements, `stride` apart, are finite; raises *peak to the largest
  // magnitude among them.
  bool (*scan[kDTypes])(const void* src, int64_t stride, size_t count, double* peak);

  // Packs one panel: element (r, c) is src[rows[r] + columns[c]], or src[rows[r] + c] where
  // columns is null.
  void (*pack_f64[kDTypes])(const void* src, const int64_t* rows, size_t row_count,
                            const int64_t* columns, size_t column_count, double* panel);
  // The same in float32; null for float64 sources.
  void (*pack_f32[kDTypes])(const void* src, const int64_t* rows, size_t row_count,
                            const int64_t* columns, size_t column_count, float* panel);

  // For rows of `count` elements, `stride` apart: the row's mean (0 unless `center`), and
  // sqrt(count) over the norm of the row less that mean, 0 where that is nothing but rounding.
  // False when an element is not finite, or perhaps above 1e120.
  bool (*row_norm[kDTypes])(const void* src, int64_t stride, size_t count, bool center,
                            double* mean, double* factor);
  // (x - mean[r]) * factor[r] for each row of a panel, in float64.
  void (*normalise_f64)(double* panel, size_t rows, const double* mean, const double* factor);
  void (*normalise_f32)(float* panel, size_t rows, const double* mean, const double* factor);

  // Whether |upper[i, j] - lower[j, i]| <= row_limits[i] column_limits[j] all over two squares of
  // kPanelF64; false with a NaN.
  bool (*symmetric)(const double* upper, const double* lower, const double* row_limits,
                    const double* column_limits);

  // Multiplies the panel by `factor`.
  void (*scale)(double* panel, size_t rows, double factor);
  // Subtracts each column's mean, which it leaves in mean[kPanelF64].
  void (*center)(double* panel, size_t rows, double* mean);

  // Adds each column's sum to sums[…].
  void (*column_sums_f64)(const double* panel, size_t rows, double* sums);
  void (*column_sums_f32)(const float* panel, size_t rows, double* sums);
};

struct GramKernels {
  // c[i * ldc + j] += Σ_r a[r, i] b[r, j] over two panels. f32: at most kRows rows, which are
  // summed in float32 and then added in float64.
  void (*tile_f64)(const double* a, const double* b, size_t rows, double* c, size_t ldc);
  void (*tile_f32)(const float* a, const float* b, size_t rows, double* c, size_t ldc);
};

// What SNP's score means near singularity: one head's definition may not depend on which of the
// kernels below ran. G_q is singular to working precision in trained models: its ridge is relative
// to each diagonal entry. σ_j counts above 1e-7 σ_1: T = Lᵀ G_k L holds σ², and below that is
// rounding. What a reflection would take away is nothing below kTrivial.
constexpr double kRidge = 64 * 0x1p-52;
constexpr double kCutoff = 1e-14;
constexpr double kTrivial = 0x1p-900;

struct ScoreKernels {
  // SNP's ω from the symmetric (d, d) Grams of one head's queries and keys, rows `ld` apart.
  // limit: how many leading singular triplets may count. The Grams are overwritten; `work` holds
  // score_workspace(ld) doubles. The largest entries should be near 1, and neurons i of queries and
  // keys of about the same norm.
  // False when the eigenvalue iteration does not converge.
  bool (*omega)(size_t d, size_t ld, size_t limit, double* query_gram, double* key_gram,
                double* work, double* out);
};

constexpr size_t score_workspace(size_t ld) { return 2 * ld * ld + 6 * ld; }

// Matrices in lanes: element (i, j) of lane l is m[(i * lane_stride(d) + j) * lanes + l], in
// lane_rows(d) rows. The stride is odd, or columns would crowd into a few sets of the cache.
constexpr size_t kLaneTile = 4;
constexpr size_t lane_rows(size_t d) { return (d + kLaneTile - 1) / kLaneTile * kLaneTile; }
constexpr size_t lane_stride(size_t d) { return lane_rows(d) + 1; }
constexpr size_t lane_matrix(size_t d) { return lane_rows(d) * lane_stride(d); }

struct ScoreLanesKernels {
  size_t lanes;
  // omega for `lanes` pairs of Grams at once: lower triangles, with the squares of kLaneTile on
  // the diagonal whole, and zeros from row and column d on. `out` takes (d, lanes). The Grams of
  // queries are overwritten; `work` holds lanes * score_lanes_workspace(d) doubles. Bit l of the
  // result says that lane l is not to be used: its leading singular values are too close, or a
  // product was lost to overflow.
  uint32_t (*omega)(size_t d, size_t limit, double* query_gram, const double* key_gram,
                    double* work, double* out);
};

constexpr size_t score_lanes_workspace(size_t d) {
  return lane_matrix(d) + lane_rows(d) * (5 + 5 * kLaneTile);
}

// Removals whose downdates of the weights are pending before they are multiplied out.
constexpr size_t kPending = 64;

// One removal of greedy elimination. With A = C⁻¹ and W as they were at the last flush, the current
// ones are A − Σ_t u_t u_tᵀ and W + Σ_t u_t v_tᵀ over the removals pending since. Arrays over
// inputs are whole panels.
struct Removal {
  size_t panels;
  size_t rank;                 // pending removals before this one
  const double* negated_row;   // the removed input's row of −A at the last flush
  const double* gram_row;      // W w_j at the last flush
  const double* coefficients;  // u_t at the removed input
  const double* products;      // v_t · its current weights
  double inverse_root;         // 1 / sqrt of its diagonal
  double norm;                 // ‖its current weights‖²
  const double* alive;         // 1 for inputs that remain, 0 for the removed one and others
  const double* floors;        // a diagonal that is not above these is lost
  double* columns;             // panels of u_t, `stride` apart; this removal's is appended
  size_t stride;
  double* images;    // panels of W v_t, kPending rows each; this removal's is appended
  double* diagonal;  // of the current A; 1 where not alive
  double* norms;     // ‖w_i‖²; infinite where not alive
  double* costs;     // ‖w_i‖² / diagonal
};

struct EliminateKernels {
  // Each column's largest magnitude; false when one is not finite.
  bool (*peaks)(const double* panel, size_t rows, double* out);
  // Each column's sum of squares.
  void (*squares)(const double* panel, size_t rows, double* sums);
  // Brings a row of weights up to date with `rank` pending rows v_t (`length` apart), leaves
  // products[t] = v_t · row and returns ‖row‖².
  double (*weights_row)(size_t length, size_t rank, const double* rows, const double* coefficients,
                        double* row, double* products);
  // False when a diagonal is lost.
  bool (*remove)(const Removal& removal);
};

// One table per kernel source and instruction set, named e.g. gram_avx2.
#define SECATEUR_DECLARE_KERNELS(isa)               \
  extern const PanelKernels panel_##isa;            \
  extern const GramKernels gram_##isa;              \
  extern const ScoreKernels score_##isa;            \
  extern const ScoreLanesKernels score_lanes_##isa; \
  extern const EliminateKernels eliminate_##isa;
SECATEUR_DECLARE_KERNELS(baseline)
SECATEUR_DECLARE_KERNELS(avx2)
SECATEUR_DECLARE_KERNELS(avx512)
SECATEUR_DECLARE_KERNELS(neon)
#undef SECATEUR_DECLARE_KERNELS

// The name of the table that the source at hand defines.
#define SECATEUR_JOIN_(name, isa) name##_##isa
#define SECATEUR_JOIN(name, isa) SECATEUR_JOIN_(name, isa)
#define SECATEUR_TABLE(name) SECATEUR_JOIN(name, SECATEUR_KERNEL_ISA)

}  // namespace secateur::cpu
