// One removal of greedy backward elimination, on downdates that are still pending.
#include "vec.h"

namespace secateur::cpu {
namespace {

constexpr size_t kWidth = 2 * kLanes<double>;
static_assert(kPanelF64 % kWidth == 0, "chunks tile the panel");

// poison stays 0 until something that is not finite is added: x - x is NaN then.
bool peaks(const double* panel, size_t rows, double* out) {
  double top[kPanelF64] = {}, poison[kPanelF64] = {};
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < kPanelF64; ++c) {
      const double value = panel[r * kPanelF64 + c];
      const double magnitude = __builtin_fabs(value);
      poison[c] += value - value;
      top[c] = magnitude > top[c] ? magnitude : top[c];
    }
  }
  double poisoned = 0;
  for (size_t c = 0; c < kPanelF64; ++c) {
    poisoned += poison[c];
    out[c] = top[c];
  }
  return poisoned == 0;
}

void squares(const double* panel, size_t rows, double* sums) {
  double partial[kPanelF64] = {};
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < kPanelF64; ++c) {
      partial[c] += panel[r * kPanelF64 + c] * panel[r * kPanelF64 + c];
    }
  }
  for (size_t c = 0; c < kPanelF64; ++c) sums[c] = partial[c];
}

double weights_row(size_t length, size_t rank, const double* factors, const double* coefficients,
                   double* row, double* products) {
  for (size_t t = 0; t < rank; ++t) axpy(coefficients[t], factors + t * length, row, length);
  for (size_t t = 0; t < rank; ++t) products[t] = dot(factors + t * length, row, length);
  return dot(row, row, length);
}

bool remove(const Removal& x) {
  constexpr size_t lanes = kLanes<double>;
  int64_t lost = 0;
  for (size_t p = 0; p < x.panels; ++p) {
    double* columns = x.columns + p * x.stride;
    double* images = x.images + p * kPending * kPanelF64;
    double column[kPanelF64], image[kPanelF64], cross[kPanelF64];
    for (size_t c = 0; c < kPanelF64; c += kWidth) {
      Vec<double> sums[3][2] = {};
      for (size_t t = 0; t < x.rank; ++t) {
        const double coefficient = x.coefficients[t], product = x.products[t];
#pragma GCC unroll 2
        for (size_t v = 0; v < 2; ++v) {
          const Vec<double> left = load(columns + t * kPanelF64 + c + v * lanes);
          sums[0][v] += coefficient * left;
          sums[1][v] += coefficient * load(images + t * kPanelF64 + c + v * lanes);
          sums[2][v] += product * left;
        }
      }
      for (size_t v = 0; v < 2; ++v) {
        for (size_t lane = 0; lane < lanes; ++lane) {
          column[c + v * lanes + lane] = sums[0][v][lane];
          image[c + v * lanes + lane] = sums[1][v][lane];
          cross[c + v * lanes + lane] = sums[2][v][lane];
        }
      }
    }
    const size_t first = p * kPanelF64;
    for (size_t c = 0; c < kPanelF64; ++c) {
      const size_t i = first + c;
      const double u = -x.inverse_root * x.alive[i] * (x.negated_row[i] + column[c]);
      const double flushed = x.gram_row[i] + image[c];
      columns[x.rank * kPanelF64 + c] = u;
      images[x.rank * kPanelF64 + c] = -x.inverse_root * flushed;

      const double diagonal = x.diagonal[i] - u * u;
      const double step = x.inverse_root * u;
      const double norm = x.norms[i] + step * (step * x.norm - 2 * (flushed + cross[c]));
      x.diagonal[i] = diagonal;
      x.norms[i] = norm > 0 ? norm : 0;
      lost |= diagonal > x.floors[i] ? 0 : 1;
      x.costs[i] = x.norms[i] / diagonal;
    }
  }
  return lost == 0;
}

}  // namespace

const EliminateKernels SECATEUR_TABLE(eliminate) = {peaks, squares, weights_row, remove};

}  // namespace secateur::cpu
