// Strided test tensors with guard elements, and what every test file needs.
#pragma once

#include <gtest/gtest.h>
#include <secateur/secateur.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "reference.h"

namespace secateur_test {

using secateur::Dims;
using secateur::DType;
using secateur::MutableTensorView;
using secateur::TensorView;

/// Around the widths of every vector and panel.
inline const std::vector<std::int64_t> kSizes{1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65};
inline const std::vector<DType> kDTypes{DType::f32, DType::f16, DType::bf16, DType::f64};

/// An element's value, from its definition and not by the library's conversion.
double decode(DType dtype, const char* at);
/// The nearest representable value (for bfloat16: rounded towards zero).
void encode(DType dtype, double value, char* at);

/// How a tensor lies in memory.
struct Layout {
  std::vector<std::size_t> order{};     ///< axes from outermost to innermost; empty: row-major
  std::int64_t gap = 1;                 ///< steps of the innermost axis, and of every other one
  std::vector<std::size_t> negative{};  ///< axes that run backwards
};

/// Owns memory with guard bytes before, between and after the elements of its view.
class TestTensor {
 public:
  TestTensor(DType dtype, const Dims& shape, const Layout& layout = {});
  // A moved vector keeps its memory, which the view points to; a copied one does not.
  TestTensor(TestTensor&&) = default;
  TestTensor& operator=(TestTensor&&) = default;

  const MutableTensorView& view() const { return view_; }
  operator TensorView() const { return view_; }  // NOLINT

  /// The element at row-major `index`, whatever the layout.
  double get(std::int64_t index) const;
  void set(std::int64_t index, double value);
  /// set(i, function(i)) for all.
  void fill(const std::function<double(std::int64_t)>& function);

  const std::vector<char>& memory() const { return memory_; }
  /// Bytes of memory() that the element begins at.
  std::size_t position(std::int64_t index) const;

 private:
  std::vector<char> memory_;
  std::size_t origin_ = 0;
  MutableTensorView view_;
};

/// Every index of a shape, row-major.
std::vector<std::vector<std::int64_t>> indices(const Dims& shape);

/// One head of one image of (images, tokens, heads, dim) as the matrix that the library should see.
reference::Matrix head_of(const TestTensor& x, std::int64_t image, std::int64_t head);

/// Normally distributed, the same on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double normal();
  double uniform();  ///< (0, 1)

 private:
  std::mt19937_64 engine_;
};

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
inline constexpr double kInf = std::numeric_limits<double>::infinity();

/// The call throws exactly E with exactly this text.
template <typename E, typename Call>
void expect_error(Call&& call, const std::string& text) {
  try {
    call();
  } catch (const E& error) {
    EXPECT_EQ(error.what(), text);
    return;
  } catch (const std::exception& error) {
    FAIL() << "another exception: " << error.what();
  }
  FAIL() << "no exception: " << text;
}

/// Sets the number of threads for a scope.
class Threads {
 public:
  explicit Threads(int n) : before_(secateur::threads()) { secateur::set_threads(n); }
  ~Threads() { secateur::set_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

}  // namespace secateur_test
