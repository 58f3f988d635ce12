#include <secateur/unpack.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "check.h"
#include "packed.h"
#include "parallel.h"

namespace secateur {
namespace {

/// Elements of the upper triangle of an (n, n) matrix, for n of at most 2^32.
std::uint64_t triangle(std::uint64_t n) { return n % 2 == 0 ? n / 2 * (n + 1) : (n + 1) / 2 * n; }

/// Of two arrays of float64, aligned.
bool overlap(const double* a, std::int64_t a_size, const double* b, std::int64_t b_size) {
  const auto first = reinterpret_cast<std::uintptr_t>(a),
             second = reinterpret_cast<std::uintptr_t>(b);
  return first <= second ? (second - first) / sizeof(double) < static_cast<std::uintptr_t>(a_size)
                         : (first - second) / sizeof(double) < static_cast<std::uintptr_t>(b_size);
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
  // Exact where size is a triangle's: 2n + 1 is the double next to the root of 8 size + 1, rounded
  // or not.
  const auto side =
      static_cast<std::uint64_t>((std::sqrt(8.0 * static_cast<double>(size) + 1) - 1) / 2);
  const auto n = static_cast<std::int64_t>(side);
  if (triangle(side) != static_cast<std::uint64_t>(size)) {
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
  if (overlap(from, packed.numel(), to, out.numel())) {
    fail<InvalidArgument>("out", "memory apart from that of packed", "memory that overlaps it");
  }
  const std::size_t strips = (side + kUnpackTile - 1) / kUnpackTile;
  const auto matrices = static_cast<std::size_t>(packed.numel() / size);
  parallel_for(matrices * strips, parallel_slots(), [&](std::size_t task, std::size_t) {
    const std::size_t matrix = task / strips;
    unpack_rows(from + matrix * packed_size(side), side, task % strips * kUnpackTile, divisor,
                to + matrix * side * side);
  });
}

}  // namespace secateur
