// The checks every public function makes before it changes anything, in one place.
#pragma once

#include <secateur/error.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace secateur {

/// Throws E with the library's one form of text.
template <typename E>
[[noreturn]] void fail(const std::string& argument, const std::string& expected,
                       const std::string& got) {
  throw E(argument + ": expected " + expected + ", got " + got);
}

/// An argument as errors name it: "blocks.3.attn q", or "q" for an object without a name.
std::string label(const std::string& owner, const char* argument);

/// "cpu" or "cuda:0".
std::string to_string(const Device& device);

/// A CPU view with sizes >= 0 and memory that is there and aligned.
void check_view(const TensorView& view, const std::string& argument);

/// The same for a view of any device that this build computes on; whether it is one of CUDA.
bool check_device_view(const TensorView& view, const std::string& argument);

/// low <= value <= high.
void check_range(std::int64_t value, std::int64_t low, std::int64_t high,
                 const std::string& argument);

/// value >= low.
void check_at_least(std::int64_t value, std::int64_t low, const std::string& argument);

/// A short decimal form for error texts: "1e+200", "nan", "-inf".
std::string number(double value);

/// " at (row 1, column 2)".
std::string place(std::size_t row, std::size_t column);

/// Refuses a square matrix whose elements (i, j) and (j, i) lie further apart, relative to
/// norms[i] norms[j] (the roots of its diagonal), than rounding of a matrix that somebody computed
/// in float32 or stored in 16 bits puts them; before that, NaN and Inf. Names the first. The view
/// has been checked.
void check_symmetric(const TensorView& matrix, const std::string& argument,
                     const std::vector<double>& norms);

/// Images, tokens and rows of one object. No batch can bring as many again.
constexpr std::int64_t kMaxCount = std::int64_t{1} << 62;

/// low <= value <= kMaxCount.
void check_count(std::int64_t value, std::int64_t low, const std::string& argument);

/// a + b of such counts; no more than kMaxCount.
std::int64_t count_sum(std::int64_t a, std::int64_t b, const std::string& argument);

/// Refuses sums to merge, of the same size, of which one would overflow.
void check_sum(const std::vector<double>& a, const std::vector<double>& b,
               const std::string& argument);

/// A vector of a saved state: its size, and that every value is finite.
void check_sums(const std::vector<double>& values, std::size_t size, const std::string& argument);

/// From an index of a part of an array to the whole array's.
using Renumber = std::function<void(std::vector<std::int64_t>& index)>;

/// Refuses NaN and Inf, naming the first in row-major order; `axes` names the view's axes for that
/// (e.g. {"image", "token", "head", "channel"}). Returns the largest magnitude.
/// The view has been checked, and may be one of any device.
double check_finite(const TensorView& view, const std::string& argument,
                    const std::vector<std::string>& axes, const Renumber& renumber = {});

/// The largest magnitude in rows along the view's last axis that begin at these offsets (in
/// elements), or Inf when not all of it is finite. The view has been checked.
double scan_rows(const TensorView& view, const std::vector<std::int64_t>& rows);

/// Reads `count` elements, the first at `offset`, `stride` apart (in elements), as doubles.
void read(const TensorView& view, std::int64_t offset, std::int64_t stride, std::size_t count,
          double* out);

/// From an element of the diagonal of the last two axes, which are of one size, to the next. Where
/// there is no next one, strides may be any number.
std::int64_t diagonal_stride(const TensorGeometry& view);

/// Offsets (in elements) of all indices over the view's first `axes` axes, row-major.
std::vector<std::int64_t> offsets(const TensorGeometry& view, std::size_t axes);

}  // namespace secateur
