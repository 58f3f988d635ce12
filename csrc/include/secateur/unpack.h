// Packed symmetric matrices, as the states of scorers and accumulators hold them, in full.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

namespace secateur {

/// The full matrices, each element over `divisor`, of packed upper triangles (row by row): `packed`
/// is float64 (..., n(n+1)/2), `out` float64 (..., n, n) with the same leading sizes, both
/// contiguous and apart from each other. The same bits for any number of threads.
/// Throws InvalidArgument (shapes, dtypes, strides, memory that overlaps, divisor <= 0 or not
/// finite) or Unsupported, before anything is written.
SECATEUR_API void unpack(const TensorView& packed, const MutableTensorView& out,
                         double divisor = 1.0);

}  // namespace secateur
