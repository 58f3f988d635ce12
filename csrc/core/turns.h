// What takes images in turn: image i of a batch is for the one of number i mod n.
#pragma once

#include <secateur/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../cuda/backend.h"
#include "check.h"

namespace secateur {

/// Refuses none, too many, null pointers and the same object twice.
template <typename T>
void check_turns(const std::vector<T*>& objects, const std::string& argument) {
  if (objects.empty() || objects.size() > cuda::kMaxTurns) {
    fail<InvalidArgument>(argument, "1 to " + std::to_string(cuda::kMaxTurns),
                          std::to_string(objects.size()));
  }
  for (std::size_t i = 0; i < objects.size(); ++i) {
    if (objects[i] == nullptr) fail<InvalidArgument>(argument, "objects", "a null pointer");
    if (std::find(objects.begin(), objects.begin() + static_cast<std::ptrdiff_t>(i), objects[i]) !=
        objects.begin() + static_cast<std::ptrdiff_t>(i)) {
      fail<InvalidArgument>(argument, "different objects", "the same one twice");
    }
  }
}

/// The images of one turn, first, first + step, …; at least one is there.
inline TensorView every(const TensorView& x, std::int64_t first, std::int64_t step) {
  TensorView result = x;
  result.data = static_cast<const char*>(x.data) +
                first * x.strides[0] * static_cast<std::int64_t>(item_size(x.dtype));
  result.shape[0] = (x.shape[0] - first + step - 1) / step;
  if (result.shape[0] > 1) result.strides[0] *= step;
  return result;
}

}  // namespace secateur
