#include <secateur/tensor.h>

#include <algorithm>
#include <limits>

#include "check.h"

namespace secateur {

std::size_t item_size(DType dtype) {
  switch (dtype) {
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
      return 4;
    case DType::f64:
      return 8;
  }
  fail<InvalidArgument>("dtype", "a member of DType", std::to_string(static_cast<int>(dtype)));
}

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f64:
      return "float64";
  }
  fail<InvalidArgument>("dtype", "a member of DType", std::to_string(static_cast<int>(dtype)));
}

Dims::Dims(const std::int64_t* values, std::size_t count) : size_(count) {
  if (count > kMaxRank) {
    fail<InvalidArgument>("shape", "at most " + std::to_string(kMaxRank) + " dimensions",
                          std::to_string(count));
  }
  std::copy_n(values, count, values_.begin());
}

Dims::Dims(std::initializer_list<std::int64_t> values) : Dims(values.begin(), values.size()) {}

Dims::Dims(const std::vector<std::int64_t>& values) : Dims(values.data(), values.size()) {}

bool Dims::operator==(const Dims& other) const {
  return std::equal(begin(), end(), other.begin(), other.end());
}

std::string to_string(const Dims& dims) {
  std::string text = "(";
  for (std::size_t i = 0; i < dims.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  }
  return text + (dims.size() == 1 ? ",)" : ")");
}

namespace {

/// a · b, both at least 0.
std::int64_t times(std::int64_t a, std::int64_t b, const Dims& shape) {
  if (b != 0 && a > std::numeric_limits<std::int64_t>::max() / b) {
    fail<InvalidArgument>("shape", "fewer than 2^63 elements", to_string(shape));
  }
  return a * b;
}

}  // namespace

Dims contiguous_strides(const Dims& shape) {
  Dims strides = shape;
  std::int64_t step = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = step;
    // The first axis' size is a factor of no stride.
    if (i > 0) step = times(step, std::max<std::int64_t>(shape[i], 1), shape);
  }
  return strides;
}

std::int64_t TensorGeometry::numel() const {
  if (std::any_of(shape.begin(), shape.end(), [](std::int64_t size) { return size <= 0; })) {
    return 0;
  }
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count = times(count, size, shape);
  return count;
}

bool TensorGeometry::is_contiguous() const {
  if (numel() == 0) return true;
  const Dims wanted = contiguous_strides(shape);
  for (std::size_t i = 0; i < rank(); ++i) {
    if (shape[i] != 1 && strides[i] != wanted[i]) return false;
  }
  return true;
}

namespace {

TensorGeometry geometry(DType dtype, Device device, const Dims& shape, const Dims& strides) {
  if (shape.size() != strides.size()) {
    fail<InvalidArgument>("strides", std::to_string(shape.size()) + " values, one per dimension",
                          std::to_string(strides.size()));
  }
  TensorGeometry result;
  result.dtype = dtype;
  result.device = device;
  result.shape = shape;
  result.strides = strides;
  return result;
}

}  // namespace

TensorView::TensorView(const void* memory, DType type, const Dims& sizes, Device where)
    : TensorView(memory, type, sizes, contiguous_strides(sizes), where) {}

TensorView::TensorView(const void* memory, DType type, const Dims& sizes, const Dims& steps,
                       Device where)
    : TensorGeometry(geometry(type, where, sizes, steps)), data(memory) {}

MutableTensorView::MutableTensorView(void* memory, DType type, const Dims& sizes, Device where)
    : MutableTensorView(memory, type, sizes, contiguous_strides(sizes), where) {}

MutableTensorView::MutableTensorView(void* memory, DType type, const Dims& sizes, const Dims& steps,
                                     Device where)
    : TensorGeometry(geometry(type, where, sizes, steps)), data(memory) {}

MutableTensorView::operator TensorView() const { return {data, dtype, shape, strides, device}; }

}  // namespace secateur
