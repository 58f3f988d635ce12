// Reading strided memory of any dtype into panels of double or float.
#include "vec.h"

namespace secateur::cpu {
namespace {

// 16-bit sources as types of their own, so that one template serves all.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline double to_double(double x) { return x; }
inline float to_float(float x) { return x; }
inline double to_double(float x) { return static_cast<double>(x); }
inline float to_float(BFloat x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// Without branches and without subnormal floats, which a caller may have set to flush to zero.
inline float to_float(Half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  __builtin_memcpy(&bits, &subnormal, sizeof(bits));
  // Rebias the exponent from 15 to 127; Inf and NaN go to 255.
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  bits = magnitude >= 0x0400u ? normal : bits;
  return from_bits(bits | sign);
}
inline double to_double(Half x) { return static_cast<double>(to_float(x)); }
inline double to_double(BFloat x) { return static_cast<double>(to_float(x)); }

inline void convert(double* out, double x) { *out = x; }
template <typename Source>
inline void convert(double* out, Source x) {
  *out = to_double(x);
}
template <typename Source>
inline void convert(float* out, Source x) {
  *out = to_float(x);
}

constexpr size_t kScanLanes = 32;

// poison stays 0 until something that is not finite is added: x - x is NaN then.
template <typename Source>
bool scan(const void* src, int64_t stride, size_t count, double* peak) {
  const Source* x = static_cast<const Source*>(src);
  double top[kScanLanes] = {};
  double poison[kScanLanes] = {};
  size_t i = 0;
  if (stride == 1) {
    for (; i + kScanLanes <= count; i += kScanLanes) {
      for (size_t lane = 0; lane < kScanLanes; ++lane) {
        const double value = to_double(x[i + lane]);
        const double magnitude = __builtin_fabs(value);
        poison[lane] += value - value;
        top[lane] = magnitude > top[lane] ? magnitude : top[lane];
      }
    }
  }
  for (; i < count; ++i) {
    const double value = to_double(x[static_cast<int64_t>(i) * stride]);
    const double magnitude = __builtin_fabs(value);
    poison[0] += value - value;
    top[0] = magnitude > top[0] ? magnitude : top[0];
  }
  double poisoned = 0;
  for (size_t lane = 0; lane < kScanLanes; ++lane) {
    poisoned += poison[lane];
    *peak = top[lane] > *peak ? top[lane] : *peak;
  }
  return poisoned == 0;
}

// Σ (scale (x - shift))^power over a row, in as many partial sums as a wide vector has lanes.
template <typename Source, bool kSquare>
inline double row_sum(const Source* x, int64_t stride, size_t count, double shift, double scale) {
  double partial[kScanLanes] = {};
  const auto term = [=](Source element) {
    const double value = (to_double(element) - shift) * scale;
    return kSquare ? value * value : value;
  };
  size_t i = 0;
  if (stride == 1) {
    for (; i + kScanLanes <= count; i += kScanLanes) {
      for (size_t lane = 0; lane < kScanLanes; ++lane) partial[lane] += term(x[i + lane]);
    }
  }
  for (; i < count; ++i) partial[0] += term(x[static_cast<int64_t>(i) * stride]);
  double sum = 0;
  for (size_t lane = 0; lane < kScanLanes; ++lane) sum += partial[lane];
  return sum;
}

template <typename Source>
bool row_norm(const void* src, int64_t stride, size_t count, bool center, double* mean,
              double* factor) {
  const Source* x = static_cast<const Source*>(src);
  const double size = static_cast<double>(count);
  *mean = center ? row_sum<Source, false>(x, stride, count, 0, 1) / size : 0;
  double scale = 1;
  double square = row_sum<Source, true>(x, stride, count, *mean, scale);
  if (square < 0x1p-900) {
    scale = 0x1p500;
    square = row_sum<Source, true>(x, stride, count, *mean, scale);
  }
  // What the rounding of the mean leaves of a constant row.
  const double rounding = size * 0x1p-53 * __builtin_fabs(*mean) * scale;
  *factor = square > size * rounding * rounding
                ? __builtin_sqrt(size) / __builtin_sqrt(square) * scale
                : 0;
  if (*factor * 0 != 0) *factor = 0;  // a row of nothing but subnormal numbers
  return square <= 1e240 * scale && __builtin_fabs(*mean) <= 1e120;
}

template <typename T, size_t kPanel>
void normalise(T* panel, size_t rows, const double* mean, const double* factor) {
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < kPanel; ++c) {
      T* at = panel + r * kPanel + c;
      *at = static_cast<T>((static_cast<double>(*at) - mean[r]) * factor[r]);
    }
  }
}

template <typename Source, typename Target, size_t kPanel>
void pack(const void* src, const int64_t* rows, size_t row_count, const int64_t* columns,
          size_t column_count, Target* panel) {
  const Source* base = static_cast<const Source*>(src);
  for (size_t r = 0; r < row_count; ++r) {
    const Source* x = base + rows[r];
    Target* out = panel + r * kPanel;
    if (columns == nullptr && column_count == kPanel) {
      for (size_t c = 0; c < kPanel; ++c) convert(out + c, x[c]);
    } else {
      for (size_t c = 0; c < column_count; ++c) {
        convert(out + c, x[columns == nullptr ? static_cast<int64_t>(c) : columns[c]]);
      }
      for (size_t c = column_count; c < kPanel; ++c) out[c] = 0;
    }
  }
}

bool symmetric(const double* upper, const double* lower, const double* row_limits,
               const double* column_limits) {
  int64_t beyond = 0;
  for (size_t i = 0; i < kPanelF64; ++i) {
    for (size_t j = 0; j < kPanelF64; ++j) {
      const double apart = __builtin_fabs(upper[i * kPanelF64 + j] - lower[j * kPanelF64 + i]);
      beyond |= apart <= row_limits[i] * column_limits[j] ? 0 : 1;
    }
  }
  return beyond == 0;
}

void scale(double* panel, size_t rows, double factor) {
  for (size_t i = 0; i < rows * kPanelF64; ++i) panel[i] *= factor;
}

template <typename T, size_t kPanel>
void column_sums(const T* panel, size_t rows, double* sums) {
  double partial[kPanel] = {};
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < kPanel; ++c) partial[c] += static_cast<double>(panel[r * kPanel + c]);
  }
  for (size_t c = 0; c < kPanel; ++c) sums[c] += partial[c];
}

void center(double* panel, size_t rows, double* mean) {
  double partial[kPanelF64] = {};
  column_sums<double, kPanelF64>(panel, rows, partial);
  for (size_t c = 0; c < kPanelF64; ++c) partial[c] /= static_cast<double>(rows);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t c = 0; c < kPanelF64; ++c) panel[r * kPanelF64 + c] -= partial[c];
  }
  for (size_t c = 0; c < kPanelF64; ++c) mean[c] = partial[c];
}

}  // namespace

const PanelKernels SECATEUR_TABLE(panel) = {
    {scan<float>, scan<Half>, scan<BFloat>, scan<double>},
    {pack<float, double, kPanelF64>, pack<Half, double, kPanelF64>, pack<BFloat, double, kPanelF64>,
     pack<double, double, kPanelF64>},
    {pack<float, float, kPanelF32>, pack<Half, float, kPanelF32>, pack<BFloat, float, kPanelF32>,
     nullptr},
    {row_norm<float>, row_norm<Half>, row_norm<BFloat>, row_norm<double>},
    normalise<double, kPanelF64>,
    normalise<float, kPanelF32>,
    symmetric,
    scale,
    center,
    column_sums<double, kPanelF64>,
    column_sums<float, kPanelF32>,
};

}  // namespace secateur::cpu
