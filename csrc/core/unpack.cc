#include <secateur/unpack.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "packed.h"
#include "parallel.h"

namespace secateur {
namespace {

// Rows of a task, and the side of the tiles that are written to both triangles: one of them fits
// into the first-level cache, where the columns of a whole matrix would not.
constexpr std::size_t kTile = 64;

/// Rows [begin, begin + kTile) from the diagonal on, and the columns below them.
void unpack_rows(const double* packed, std::size_t n, std::size_t begin, double divisor,
                 double* out) {
  const std::size_t end = std::min(n, begin + kTile);
  double tile[kTile][kTile];
  for (std::size_t first = begin; first < n; first += kTile) {
    const std::size_t last = std::min(n, first + kTile);
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

}  // namespace

void unpack(const TensorView& packed, const MutableTensorView& out, double divisor) {
  check_view(packed, "packed");
  check_view(out, "out");
  const auto check_memory = [](const TensorGeometry& view, const char* argument) {
    if (view.dtype != DType::f64) fail<InvalidArgument>(argument, "float64", name(view.dtype));
    if (!view.is_contiguous()) {
      fail<InvalidArgument>(argument, "contiguous memory", "strides " + to_string(view.strides));
    }
  };
  check_memory(packed, "packed");
  check_memory(out, "out");
  if (packed.rank() < 1) {
    fail<InvalidArgument>("packed", "shape (..., n(n+1)/2)", to_string(packed.shape));
  }
  const std::size_t leading = packed.rank() - 1;
  const std::int64_t size = packed.shape[leading];
  const auto n =
      static_cast<std::int64_t>((std::sqrt(8.0 * static_cast<double>(size) + 1) - 1) / 2);
  if (n * (n + 1) / 2 != size) {
    fail<InvalidArgument>("packed", "shape (..., n(n+1)/2)", to_string(packed.shape));
  }
  bool alike = out.rank() == leading + 2 && out.shape[leading] == n && out.shape[leading + 1] == n;
  for (std::size_t axis = 0; alike && axis < leading; ++axis) {
    alike = out.shape[axis] == packed.shape[axis];
  }
  if (!alike) {
    fail<InvalidArgument>(
        "out", "the leading sizes of packed, then n twice (n = " + std::to_string(n) + ")",
        to_string(out.shape));
  }
  if (!(divisor > 0) || !std::isfinite(divisor)) {
    fail<InvalidArgument>("divisor", "a finite number above 0", number(divisor));
  }
  if (packed.numel() == 0) return;

  const auto* from = static_cast<const double*>(packed.data);
  auto* to = static_cast<double*>(out.data);
  const auto side = static_cast<std::size_t>(n);
  const std::size_t strips = (side + kTile - 1) / kTile;
  const auto matrices = static_cast<std::size_t>(packed.numel() / size);
  parallel_for(matrices * strips, parallel_slots(), [&](std::size_t task, std::size_t) {
    const std::size_t matrix = task / strips;
    unpack_rows(from + matrix * packed_size(side), side, task % strips * kTile, divisor,
                to + matrix * side * side);
  });
}

}  // namespace secateur
