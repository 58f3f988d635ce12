#include <secateur/compact.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "check.h"

namespace secateur {
namespace {

using Keep = std::vector<std::int64_t>;

void check_keep(const Keep& keep, std::int64_t size) {
  if (keep.empty()) fail<InvalidArgument>("keep", "at least one index", "none");
  for (std::size_t i = 0; i < keep.size(); ++i) {
    if (keep[i] < 0 || keep[i] >= size) {
      fail<InvalidArgument>("keep", "indices in [0, " + std::to_string(size) + ")",
                            std::to_string(keep[i]));
    }
    if (i > 0 && keep[i] <= keep[i - 1]) {
      fail<InvalidArgument>("keep", "ascending, unique indices",
                            std::to_string(keep[i]) + " after " + std::to_string(keep[i - 1]));
    }
  }
}

/// Sufficient for no two indices to share memory: with the axes ordered by stride, each steps over
/// everything that the ones before it span.
bool surely_disjoint(const TensorGeometry& tensor) {
  std::vector<std::size_t> axes;
  for (std::size_t i = 0; i < tensor.rank(); ++i) {
    if (tensor.shape[i] > 1) axes.push_back(i);
  }
  std::sort(axes.begin(), axes.end(), [&](std::size_t a, std::size_t b) {
    return std::llabs(tensor.strides[a]) < std::llabs(tensor.strides[b]);
  });
  std::int64_t span = 0;
  for (const std::size_t axis : axes) {
    const std::int64_t step = std::llabs(tensor.strides[axis]);
    if (step <= span) return false;
    span += step * (tensor.shape[axis] - 1);
  }
  return true;
}

/// Packs the kept slices, run by run of adjacent indices, at the front of the memory.
void compact_contiguous(char* data, std::size_t outer, std::size_t size, std::size_t slice,
                        const Keep& keep) {
  char* to = data;
  for (std::size_t o = 0; o < outer; ++o) {
    const char* from = data + o * size * slice;
    for (std::size_t i = 0; i < keep.size();) {
      std::size_t end = i + 1;
      while (end < keep.size() && keep[end] == keep[end - 1] + 1) ++end;
      const std::size_t bytes = (end - i) * slice;
      const char* run = from + static_cast<std::size_t>(keep[i]) * slice;
      if (run != to) std::memmove(to, run, bytes);
      to += bytes;
      i = end;
    }
  }
}

/// Moves element by element along the axis; every line along it is a world of its own.
void compact_strided(char* data, const TensorGeometry& tensor, std::size_t axis, const Keep& keep) {
  const std::size_t size = item_size(tensor.dtype);
  const auto bytes = static_cast<std::int64_t>(size);
  TensorGeometry lines = tensor;
  lines.shape[axis] = 1;
  for (const std::int64_t start : offsets(lines, lines.rank())) {
    for (std::size_t i = 0; i < keep.size(); ++i) {
      const auto to = static_cast<std::int64_t>(i);
      if (to == keep[i]) continue;
      std::memcpy(data + (start + to * tensor.strides[axis]) * bytes,
                  data + (start + keep[i] * tensor.strides[axis]) * bytes, size);
    }
  }
}

}  // namespace

MutableTensorView compact(const MutableTensorView& tensor, std::int64_t dim,
                          const std::vector<std::int64_t>& keep) {
  check_view(tensor, "tensor");
  if (tensor.rank() == 0) {
    fail<InvalidArgument>("tensor", "at least one dimension", to_string(tensor.shape));
  }
  check_range(dim, 0, static_cast<std::int64_t>(tensor.rank()) - 1, "dim");
  const auto axis = static_cast<std::size_t>(dim);
  check_keep(keep, tensor.shape[axis]);

  MutableTensorView result = tensor;
  result.shape[axis] = static_cast<std::int64_t>(keep.size());
  if (tensor.is_contiguous()) {
    const auto product = [&](std::size_t first, std::size_t last) {
      return static_cast<std::size_t>(
          std::accumulate(tensor.shape.begin() + first, tensor.shape.begin() + last,
                          std::int64_t{1}, [](std::int64_t a, std::int64_t b) { return a * b; }));
    };
    result.strides = contiguous_strides(result.shape);
    compact_contiguous(static_cast<char*>(tensor.data), product(0, axis),
                       static_cast<std::size_t>(tensor.shape[axis]),
                       product(axis + 1, tensor.rank()) * item_size(tensor.dtype), keep);
    return result;
  }
  if (!surely_disjoint(tensor)) {
    fail<InvalidArgument>(
        "tensor", "elements that do not share memory",
        "strides " + to_string(tensor.strides) + " for shape " + to_string(tensor.shape));
  }
  compact_strided(static_cast<char*>(tensor.data), tensor, axis, keep);
  return result;
}

}  // namespace secateur
