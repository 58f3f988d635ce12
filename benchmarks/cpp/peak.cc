#include "peak.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

namespace secateur_bench {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <typename T>
double multiply_adds() {
  using Vector = typename VectorOf<T>::type;
  constexpr int kChains = 12, kSteps = 200000;
  double best = 0;
  for (int run = 0; run < 20; ++run) {
    Vector sum[kChains];
    for (int chain = 0; chain < kChains; ++chain) sum[chain] = Vector{} + static_cast<T>(chain);
    Vector factor = Vector{} + static_cast<T>(0.5), term = Vector{} + static_cast<T>(run + 1);
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) sum[chain] = sum[chain] * factor + term;
      // The values are kept in registers, and not worked out beforehand.
      asm volatile("" : "+x"(factor), "+x"(term));
    }
    const double time = seconds_since(start);
    for (int chain = 1; chain < kChains; ++chain) sum[0] += sum[chain];
    asm volatile("" : : "x"(sum[0]));
    best = std::max(best, 2.0 * kChains * kSteps * (kBytes / sizeof(T)) / time);
  }
  return best;
}

}  // namespace

double peak_flops(bool single) { return single ? multiply_adds<float>() : multiply_adds<double>(); }

double peak_bandwidth() {
  constexpr std::size_t kSize = std::size_t{128} << 20;
  std::vector<char> from(kSize, 1), to(kSize, 2);
  double best = 0;
  for (int run = 0; run < 8; ++run) {
    const auto start = std::chrono::steady_clock::now();
    std::memcpy(to.data(), from.data(), kSize);
    asm volatile("" : : "r"(to.data()) : "memory");
    best = std::max(best, 2.0 * kSize / seconds_since(start));
  }
  return best;
}

}  // namespace secateur_bench
