// Vectors of the width this source is compiled for. Included by kernels only, everything in an
// anonymous namespace: code compiled for one instruction set must not be linked into another.
#pragma once

#include "kernels.h"

namespace secateur::cpu {
namespace {

// Aligned like one element: panels and matrix rows begin anywhere.
typedef double VecF64 __attribute__((vector_size(SECATEUR_VECTOR_BYTES), aligned(8), may_alias));
typedef float VecF32 __attribute__((vector_size(SECATEUR_VECTOR_BYTES), aligned(4), may_alias));

template <typename T>
struct VecOf;
template <>
struct VecOf<double> {
  using type = VecF64;
};
template <>
struct VecOf<float> {
  using type = VecF32;
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
constexpr size_t kLanes = SECATEUR_VECTOR_BYTES / sizeof(T);

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}

// Σ x_i y_i. Written out, because a compiler may not reorder the sum of a plain loop.
inline double dot(const double* x, const double* y, size_t n) {
  constexpr size_t lanes = kLanes<double>;
  Vec<double> sum0 = {}, sum1 = {};
  size_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    sum0 += load(x + i) * load(y + i);
    sum1 += load(x + i + lanes) * load(y + i + lanes);
  }
  sum0 += sum1;
  double sum = 0;
  for (size_t lane = 0; lane < lanes; ++lane) sum += sum0[lane];
  for (; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// y += a x
inline void axpy(double a, const double* __restrict x, double* __restrict y, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] += a * x[i];
}

}  // namespace
}  // namespace secateur::cpu
