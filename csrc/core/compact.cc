#include <secateur/compact.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <utility>

#include "../cuda/backend.h"
#include "check.h"

namespace secateur {
namespace {

using Keep = std::vector<std::int64_t>;

// Elements of any type, as their bits.
typedef std::uint16_t Bits16 __attribute__((may_alias));
typedef std::uint32_t Bits32 __attribute__((may_alias));
typedef std::uint64_t Bits64 __attribute__((may_alias));

// Elements from which on a run is worth a memmove.
constexpr std::size_t kLongRun = 16;

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

/// Runs of adjacent indices: where each begins, and how many.
std::vector<std::pair<std::size_t, std::size_t>> runs_of(const Keep& keep) {
  std::vector<std::pair<std::size_t, std::size_t>> runs;
  for (std::size_t i = 0; i < keep.size(); ++i) {
    if (i > 0 && keep[i] == keep[i - 1] + 1) {
      ++runs.back().second;
    } else {
      runs.emplace_back(static_cast<std::size_t>(keep[i]), 1);
    }
  }
  return runs;
}

/// Packs single elements at the front of the memory. Elements only move towards the front, so none
/// is written over before it was read.
template <typename Bits>
void compact_elements(Bits* data, std::size_t outer, std::size_t size, const Keep& keep) {
  Bits* to = data;
  for (std::size_t o = 0; o < outer; ++o, data += size) {
    for (const std::int64_t index : keep) *to++ = data[index];
  }
}

/// Packs the kept slices at the front of the memory.
void compact_contiguous(void* memory, DType dtype, std::size_t outer, std::size_t size,
                        std::size_t inner, const Keep& keep) {
  const auto runs = runs_of(keep);
  if (inner == 1 && keep.size() < kLongRun * runs.size()) {
    switch (item_size(dtype)) {
      case 2:
        return compact_elements(static_cast<Bits16*>(memory), outer, size, keep);
      case 4:
        return compact_elements(static_cast<Bits32*>(memory), outer, size, keep);
      default:
        return compact_elements(static_cast<Bits64*>(memory), outer, size, keep);
    }
  }
  const std::size_t slice = inner * item_size(dtype);
  char* from = static_cast<char*>(memory);
  char* to = from;
  for (std::size_t o = 0; o < outer; ++o, from += size * slice) {
    for (const auto& [first, count] : runs) {
      if (from + first * slice != to) std::memmove(to, from + first * slice, count * slice);
      to += count * slice;
    }
  }
}

/// Moves element by element along the axis; every line along it is a world of its own.
void compact_strided(char* data, const TensorGeometry& tensor, std::size_t axis, const Keep& keep) {
  const std::size_t size = item_size(tensor.dtype);
  const auto bytes = static_cast<std::int64_t>(size);
  std::vector<std::int64_t> index(tensor.rank(), 0);
  std::int64_t start = 0;
  // Row-major over all axes but this one.
  const auto next_line = [&] {
    for (std::size_t i = tensor.rank(); i-- > 0;) {
      if (i == axis || tensor.shape[i] == 1) continue;
      start += tensor.strides[i];
      if (++index[i] < tensor.shape[i]) return true;
      start -= tensor.strides[i] * tensor.shape[i];
      index[i] = 0;
    }
    return false;
  };
  do {
    for (std::size_t i = 0; i < keep.size(); ++i) {
      const auto to = static_cast<std::int64_t>(i);
      if (to == keep[i]) continue;
      std::memcpy(data + (start + to * tensor.strides[axis]) * bytes,
                  data + (start + keep[i] * tensor.strides[axis]) * bytes, size);
    }
  } while (next_line());
}

}  // namespace

MutableTensorView compact(const MutableTensorView& tensor, std::int64_t dim,
                          const std::vector<std::int64_t>& keep) {
  const bool on_cuda = check_device_view(tensor, "tensor");
  if (tensor.rank() == 0) {
    fail<InvalidArgument>("tensor", "at least one dimension", to_string(tensor.shape));
  }
  check_range(dim, 0, static_cast<std::int64_t>(tensor.rank()) - 1, "dim");
  const auto axis = static_cast<std::size_t>(dim);
  check_keep(keep, tensor.shape[axis]);

  MutableTensorView result = tensor;
  result.shape[axis] = static_cast<std::int64_t>(keep.size());
  if (tensor.is_contiguous()) {
    result.strides = contiguous_strides(result.shape);
    if (tensor.numel() == 0) return result;
    if (on_cuda) {
      cuda::compact(tensor, result, axis, keep);
      return result;
    }
    const auto product = [&](std::size_t first, std::size_t last) {
      return static_cast<std::size_t>(
          std::accumulate(tensor.shape.begin() + first, tensor.shape.begin() + last,
                          std::int64_t{1}, [](std::int64_t a, std::int64_t b) { return a * b; }));
    };
    compact_contiguous(tensor.data, tensor.dtype, product(0, axis),
                       static_cast<std::size_t>(tensor.shape[axis]),
                       product(axis + 1, tensor.rank()), keep);
    return result;
  }
  if (!surely_disjoint(tensor)) {
    fail<InvalidArgument>(
        "tensor", "elements that do not share memory",
        "strides " + to_string(tensor.strides) + " for shape " + to_string(tensor.shape));
  }
  if (on_cuda) {
    cuda::compact(tensor, result, axis, keep);
  } else {
    compact_strided(static_cast<char*>(tensor.data), tensor, axis, keep);
  }
  return result;
}

}  // namespace secateur
