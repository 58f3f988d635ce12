// Selects the neurons that stay, the same number in each group.
#pragma once

#include <secateur/export.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <vector>

namespace secateur {

/// Returns the `keep` highest scores of each row of scores (groups, n), as ascending indices,
/// row-major (groups, keep). Among equal scores, the lower index is kept.
/// Throws InvalidArgument (1 <= keep <= n), Unsupported, or NumericalError for a NaN.
SECATEUR_API std::vector<std::int64_t> select(const TensorView& scores, std::int64_t keep);

}  // namespace secateur
