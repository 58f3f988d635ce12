// Expands packed symmetric matrices, as in the states of scorers and accumulators.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

namespace secateur {

/// Expands packed upper triangles (row by row) to full matrices and divides each element by
/// `divisor`: `packed` is float64 (..., n(n+1)/2), `out` is float64 (..., n, n) with the same
/// leading sizes, both contiguous and not overlapping. The result has the same bits for any number
/// of threads.
/// Throws InvalidArgument (shapes, dtypes, strides, memory that overlaps, divisor <= 0 or not
/// finite) or Unsupported, before anything is written.
SECATEUR_API void unpack(const TensorView& packed, const MutableTensorView& out,
                         double divisor = 1.0);

}  // namespace secateur
