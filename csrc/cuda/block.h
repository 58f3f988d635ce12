// What device code is written against: a block of threads that works in phases. The same functions
// are compiled for the host, where a phase runs thread after thread, so that tests can run them.
#pragma once

#include <math.h>
#include <stdint.h>

// Both compilations have names of their own: a program that holds the two must not mix them up.
#if defined(__CUDACC__)
#define SECATEUR_DEVICE __host__ __device__
#define SECATEUR_SIDE device_side
#else
#define SECATEUR_DEVICE
#define SECATEUR_SIDE host_side
#endif

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

/// The threads that work on one piece together. All of them call each() and uniform() in the same
/// order: what stands between two phases is decided by values that uniform() has given.
class Block {
 public:
#if defined(__CUDACC__)
  SECATEUR_DEVICE Block(int thread, int threads) : thread_(thread), threads_(threads) {}
#else
  /// `threads` that take turns, in the order of their numbers or backwards: a phase in which they
  /// depend on one another would show it.
  explicit Block(int threads, bool backwards = false) : threads_(threads), backwards_(backwards) {}
#endif

  /// f(i) for all i < count, dealt out to the threads. Everything written before is visible to f,
  /// and everything that f writes to whoever comes after; calls of f may not depend on one another.
  template <typename F>
  SECATEUR_DEVICE void each(int count, const F& f) const {
#if defined(__CUDA_ARCH__)
    for (int i = thread_; i < count; i += threads_) f(i);
    __syncthreads();
#elif defined(__CUDACC__)
    for (int i = 0; i < count; ++i) f(i);
#else
    for (int t = 0; t < threads_; ++t) {
      for (int i = backwards_ ? threads_ - 1 - t : t; i < count; i += threads_) f(i);
    }
#endif
  }

  /// f(), which only reads, for every thread. Nothing that it reads is written before all have.
  template <typename F>
  SECATEUR_DEVICE auto uniform(const F& f) const {
    const auto value = f();
#if defined(__CUDA_ARCH__)
    __syncthreads();
#endif
    return value;
  }

 private:
#if defined(__CUDACC__)
  int thread_;
#endif
  int threads_;
#if !defined(__CUDACC__)
  bool backwards_;
#endif
};

/// 16-bit elements as types of their own.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

SECATEUR_DEVICE inline double to_double(double x) { return x; }
SECATEUR_DEVICE inline double to_double(float x) { return static_cast<double>(x); }

/// sign · mantissa · 2^exponent without intermediate floats, which may be flushed to zero.
SECATEUR_DEVICE inline double small_to_double(uint32_t bits, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & top;
  const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
  union {
    uint64_t bits;
    double value;
  } out;
  if (exponent == 0) {
    out.value = static_cast<double>(mantissa);
    union {
      uint64_t bits;
      double value;
    } unit;
    unit.bits = static_cast<uint64_t>(1023 + 1 - bias - mantissa_bits) << 52;
    out.value *= unit.value;
  } else {
    const uint64_t wide = exponent == top ? 2047 : static_cast<uint64_t>(exponent - bias + 1023);
    out.bits = wide << 52 | static_cast<uint64_t>(mantissa) << (52 - mantissa_bits);
  }
  return (bits >> 15 & 1u) != 0 ? -out.value : out.value;
}

#if defined(__CUDA_ARCH__)
// Here nothing is flushed, and conversions are instructions.
__device__ inline double to_double(Half x) {
  double value;
  asm("cvt.f64.f16 %0, %1;" : "=d"(value) : "h"(x.bits));
  return value;
}
__device__ inline double to_double(BFloat x) {
  return static_cast<double>(__uint_as_float(static_cast<unsigned>(x.bits) << 16));
}
#else
SECATEUR_DEVICE inline double to_double(Half x) { return small_to_double(x.bits, 10, 5); }
SECATEUR_DEVICE inline double to_double(BFloat x) { return small_to_double(x.bits, 7, 8); }
#endif

/// Sign, exponent and the first 20 bits of the mantissa.
SECATEUR_DEVICE inline int32_t high_word(double x) {
#if defined(__CUDA_ARCH__)
  return __double2hiint(x);
#else
  union {
    double value;
    uint64_t bits;
  } of;
  of.value = x;
  return static_cast<int32_t>(of.bits >> 32);
#endif
}

SECATEUR_DEVICE inline int smaller(int a, int b) { return a < b ? a : b; }
SECATEUR_DEVICE inline int larger(int a, int b) { return a > b ? a : b; }

/// Square `index` of those on and above the diagonal, row by row, `side` of them along it.
SECATEUR_DEVICE inline void square_of(int index, int side, int* left, int* right) {
  int i = 0;
  for (; index >= side - i; ++i) index -= side - i;
  *left = i;
  *right = i + index;
}

}  // namespace SECATEUR_SIDE
}  // namespace secateur::cuda
