#include <secateur/select.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "check.h"
#include "subnormals.h"

namespace secateur {

std::vector<std::int64_t> select(const TensorView& scores, std::int64_t keep) {
  const KeepSubnormals subnormals;
  check_view(scores, "scores");
  if (scores.rank() != 2 || scores.shape[1] < 1) {
    fail<InvalidArgument>("scores", "shape (groups, n), n >= 1", to_string(scores.shape));
  }
  check_range(keep, 1, scores.shape[1], "keep");

  const auto groups = static_cast<std::size_t>(scores.shape[0]);
  const auto n = static_cast<std::size_t>(scores.shape[1]);
  std::vector<double> row(n);
  std::vector<std::int64_t> order(n);
  std::vector<std::int64_t> result;
  result.reserve(groups * static_cast<std::size_t>(keep));
  for (std::size_t g = 0; g < groups; ++g) {
    read(scores, static_cast<std::int64_t>(g) * scores.strides[0], scores.strides[1], n,
         row.data());
    // Infinite scores have an order; NaN has none.
    const auto nan = std::find_if(row.begin(), row.end(), [](double x) { return std::isnan(x); });
    if (nan != row.end()) {
      fail<NumericalError>(
          "scores", "values with an order",
          "nan at (" + std::to_string(g) + ", " + std::to_string(nan - row.begin()) + ")");
    }
    std::iota(order.begin(), order.end(), std::int64_t{0});
    const auto end = order.begin() + keep;
    std::partial_sort(order.begin(), end, order.end(), [&](std::int64_t a, std::int64_t b) {
      const double left = row[static_cast<std::size_t>(a)];
      const double right = row[static_cast<std::size_t>(b)];
      return left > right || (left == right && a < b);
    });
    std::sort(order.begin(), end);
    result.insert(result.end(), order.begin(), end);
  }
  return result;
}

}  // namespace secateur
