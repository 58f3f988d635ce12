#include "test_tensor.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace secateur_test {
namespace {

constexpr char kGuard = 0x5a;

/// IEEE-like with 1 sign bit, from the definition.
double decode_small(std::uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? kNaN : sign * kInf;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

std::uint16_t encode_f16(double value) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) return sign | 0x7e00;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520) return sign | 0x7c00;
  // Below 2^-14 the step is that of the subnormals.
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const double steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  return static_cast<std::uint16_t>(sign + ((exponent + 14) << 10) + static_cast<int>(steps));
}

}  // namespace

double decode(DType dtype, const char* at) {
  switch (dtype) {
    case DType::f64: {
      double value;
      std::memcpy(&value, at, sizeof(value));
      return value;
    }
    case DType::f32: {
      float value;
      std::memcpy(&value, at, sizeof(value));
      return value;
    }
    case DType::f16:
    case DType::bf16:
      break;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return decode_small(bits, dtype == DType::f16 ? 5 : 8);
}

void encode(DType dtype, double value, char* at) {
  switch (dtype) {
    case DType::f64:
      std::memcpy(at, &value, sizeof(value));
      return;
    case DType::f32: {
      const auto rounded = static_cast<float>(value);
      std::memcpy(at, &rounded, sizeof(rounded));
      return;
    }
    case DType::f16: {
      const std::uint16_t bits = encode_f16(value);
      std::memcpy(at, &bits, sizeof(bits));
      return;
    }
    case DType::bf16: {
      const auto rounded = static_cast<float>(value);
      std::uint32_t bits;
      std::memcpy(&bits, &rounded, sizeof(bits));
      const auto high = static_cast<std::uint16_t>(bits >> 16 | (std::isnan(value) ? 1u : 0u));
      std::memcpy(at, &high, sizeof(high));
      return;
    }
  }
}

TestTensor::TestTensor(DType dtype, const Dims& shape, const Layout& layout) {
  std::vector<std::size_t> order = layout.order;
  if (order.empty()) {
    order.resize(shape.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
  }
  Dims strides = shape;
  std::int64_t step = layout.gap, lowest = 0, highest = 0;
  for (std::size_t i = order.size(); i-- > 0;) {
    const std::size_t axis = order[i];
    const bool negative =
        std::find(layout.negative.begin(), layout.negative.end(), axis) != layout.negative.end();
    strides[axis] = negative ? -step : step;
    const std::int64_t span = strides[axis] * std::max<std::int64_t>(shape[axis] - 1, 0);
    (negative ? lowest : highest) += span;
    step *= shape[axis] + layout.gap - 1;
  }
  constexpr std::int64_t kMargin = 3;
  const auto size = static_cast<std::int64_t>(secateur::item_size(dtype));
  memory_.assign(static_cast<std::size_t>((highest - lowest + 1 + 2 * kMargin) * size), kGuard);
  origin_ = static_cast<std::size_t>((kMargin - lowest) * size);
  view_ = MutableTensorView(memory_.data() + origin_, dtype, shape, strides);
}

std::size_t TestTensor::position(std::int64_t index) const {
  std::int64_t offset = 0;
  for (std::size_t axis = view_.rank(); axis-- > 0;) {
    offset += index % view_.shape[axis] * view_.strides[axis];
    index /= view_.shape[axis];
  }
  return origin_ + static_cast<std::size_t>(
                       offset * static_cast<std::int64_t>(secateur::item_size(view_.dtype)));
}

double TestTensor::get(std::int64_t index) const {
  return decode(view_.dtype, memory_.data() + position(index));
}

void TestTensor::set(std::int64_t index, double value) {
  encode(view_.dtype, value, memory_.data() + position(index));
}

void TestTensor::fill(const std::function<double(std::int64_t)>& function) {
  for (std::int64_t i = 0; i < view_.numel(); ++i) set(i, function(i));
}

std::vector<std::vector<std::int64_t>> indices(const Dims& shape) {
  std::vector<std::vector<std::int64_t>> result{{}};
  for (const std::int64_t size : shape) {
    std::vector<std::vector<std::int64_t>> next;
    for (const auto& prefix : result) {
      for (std::int64_t i = 0; i < size; ++i) {
        next.push_back(prefix);
        next.back().push_back(i);
      }
    }
    result = std::move(next);
  }
  return result;
}

double Random::uniform() { return (static_cast<double>(engine_() >> 11) + 0.5) * 0x1p-53; }

double Random::normal() {
  return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * 3.14159265358979323846 * uniform());
}

reference::Matrix head_of(const TestTensor& x, std::int64_t image, std::int64_t head) {
  const Dims& shape = x.view().shape;
  reference::Matrix result(static_cast<std::size_t>(shape[1]), static_cast<std::size_t>(shape[3]));
  for (std::int64_t n = 0; n < shape[1]; ++n) {
    for (std::int64_t c = 0; c < shape[3]; ++c) {
      result(static_cast<std::size_t>(n), static_cast<std::size_t>(c)) =
          x.get(((image * shape[1] + n) * shape[2] + head) * shape[3] + c);
    }
  }
  return result;
}

}  // namespace secateur_test
