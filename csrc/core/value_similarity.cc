#include <secateur/value_similarity.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "../cpu/dispatch.h"
#include "buffer.h"
#include "check.h"
#include "parallel.h"
#include "scale.h"
#include "subnormals.h"

namespace secateur {
namespace {

using cpu::kPanelF64;
using cpu::kRows;

// Panels of rows that a task compares with all others: they stay in the second-level cache.
constexpr std::size_t kGroup = 4;

/// Scales each column of a panel to norm 1 (by way of a power of two, so that no square overflows).
/// A zero column stays zero and is marked.
void normalise(double* panel, std::size_t rows, char* zero) {
  double peak[kPanelF64] = {}, squares[kPanelF64] = {};
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < kPanelF64; ++c) {
      peak[c] = std::max(peak[c], std::fabs(panel[r * kPanelF64 + c]));
    }
  }
  double factor[kPanelF64];
  for (std::size_t c = 0; c < kPanelF64; ++c) {
    factor[c] = normalising_factor(peak[c]);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < kPanelF64; ++c) {
      double& value = panel[r * kPanelF64 + c];
      value *= factor[c];
      squares[c] += value * value;
    }
  }
  for (std::size_t c = 0; c < kPanelF64; ++c) {
    zero[c] = squares[c] == 0;
    factor[c] = zero[c] ? 0.0 : 1 / std::sqrt(squares[c]);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = 0; c < kPanelF64; ++c) panel[r * kPanelF64 + c] *= factor[c];
  }
}

/// 1 − |cos|, free of what rounding adds beyond [0, 1].
double distance(double cosine) { return std::max(0.0, 1 - std::fabs(cosine)); }

}  // namespace

std::vector<double> value_similarity(const TensorView& weights) {
  const KeepSubnormals keep;
  check_view(weights, "weights");
  const std::size_t rank = weights.rank();
  if ((rank != 2 && rank != 3) || weights.numel() == 0) {
    fail<InvalidArgument>("weights", "shape (rows, D) or (heads, head_dim, D), none of them 0",
                          to_string(weights.shape));
  }
  check_finite(weights, "weights",
               rank == 2 ? std::vector<std::string>{"row", "column"}
                         : std::vector<std::string>{"head", "row", "column"});

  // The rows become the columns of a matrix whose Gram holds the cosines.
  const std::vector<std::int64_t> rows = offsets(weights, rank - 1);
  const std::size_t count = rows.size();
  const auto length = static_cast<std::size_t>(weights.shape[rank - 1]);
  std::vector<std::int64_t> elements(length);
  for (std::size_t i = 0; i < length; ++i) {
    elements[i] = static_cast<std::int64_t>(i) * weights.strides[rank - 1];
  }
  const std::size_t panels = (count + kPanelF64 - 1) / kPanelF64;
  Buffer<double> packed(panels * length * kPanelF64);
  const auto panel_at = [&](std::size_t p) { return packed.data() + p * length * kPanelF64; };
  const auto pack = cpu::kernels().panel.pack_f64[static_cast<std::size_t>(weights.dtype)];
  const auto tile = cpu::kernels().gram.tile_f64;
  const std::size_t slots = parallel_slots();

  std::vector<char> zero(panels * kPanelF64);
  parallel_for(panels, slots, [&](std::size_t p, std::size_t) {
    const std::size_t first = p * kPanelF64;
    const std::size_t width = std::min(kPanelF64, count - first);
    pack(weights.data, elements.data(), length, rows.data() + first, width, panel_at(p));
    normalise(panel_at(p), length, zero.data() + first);
  });

  std::vector<double> scores(count, 0.0);
  parallel_for((panels + kGroup - 1) / kGroup, slots, [&](std::size_t task, std::size_t) {
    const std::size_t end = std::min(panels, (task + 1) * kGroup);
    double cosines[kPanelF64 * kPanelF64];
    for (std::size_t j = 0; j < panels; ++j) {
      for (std::size_t i = task * kGroup; i < end; ++i) {
        std::fill_n(cosines, kPanelF64 * kPanelF64, 0.0);
        for (std::size_t r = 0; r < length; r += kRows) {
          tile(panel_at(i) + r * kPanelF64, panel_at(j) + r * kPanelF64,
               std::min(kRows, length - r), cosines, kPanelF64);
        }
        const std::size_t row_end = std::min(count, (i + 1) * kPanelF64);
        const std::size_t column_end = std::min(count, (j + 1) * kPanelF64);
        for (std::size_t a = i * kPanelF64; a < row_end; ++a) {
          if (zero[a]) continue;
          const double* row = cosines + (a - i * kPanelF64) * kPanelF64;
          for (std::size_t b = j * kPanelF64; b < column_end; ++b) {
            if (a != b) scores[a] += distance(row[b - j * kPanelF64]);
          }
        }
      }
    }
  });
  return scores;
}

std::vector<double> value_similarity_from_moment(const TensorView& moment) {
  const KeepSubnormals keep;
  check_view(moment, "moment");
  if (moment.rank() != 2 || moment.shape[0] != moment.shape[1] || moment.shape[0] < 1) {
    fail<InvalidArgument>("moment", "shape (R, R), R >= 1", to_string(moment.shape));
  }
  check_finite(moment, "moment", {"row", "column"});
  const auto count = static_cast<std::size_t>(moment.shape[0]);
  std::vector<double> norms(count);
  read(moment, 0, diagonal_stride(moment), count, norms.data());
  for (std::size_t i = 0; i < count; ++i) {
    if (norms[i] < 0) {
      fail<InvalidArgument>("moment", "a diagonal of at least 0", number(norms[i]) + place(i, i));
    }
    norms[i] = std::sqrt(norms[i]);
  }

  check_symmetric(moment, "moment", norms);
  const std::size_t slots = parallel_slots();
  std::vector<std::vector<double>> room(slots, std::vector<double>(count));
  std::vector<double> scores(count, 0.0);
  parallel_for(count, slots, [&](std::size_t i, std::size_t slot) {
    double* row = room[slot].data();
    const auto at = static_cast<std::int64_t>(i);
    read(moment, at * moment.strides[0], moment.strides[1], count, row);
    for (std::size_t j = 0; j < count; ++j) {
      if (i != j && norms[i] > 0) {
        scores[i] += norms[i] * norms[j] > 0 ? distance(row[j] / norms[i] / norms[j]) : 1;
      }
    }
  });
  return scores;
}

}  // namespace secateur
