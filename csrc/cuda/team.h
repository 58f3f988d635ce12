// A team of 128 threads with registers of their own, for device code in which a thread keeps a part
// of a matrix. The host compiles the same code: there run() goes from thread to thread, and what is
// a register there is an element of an array, so that tests can run it.
#pragma once

#include "block.h"

#if defined(__CUDA_ARCH__)
#define SECATEUR_UNROLL _Pragma("unroll")
#else
#define SECATEUR_UNROLL
#endif

namespace secateur::cuda {
inline namespace SECATEUR_SIDE {

constexpr int kTeam = 128;
constexpr int kWarp = 32;

/// One T for each thread.
template <typename T>
class PerThread {
 public:
#if defined(__CUDACC__)
  SECATEUR_DEVICE T& operator[](int) { return value_; }

 private:
  T value_;
#else
  T& operator[](int thread) { return values_[thread]; }

 private:
  T values_[kTeam];
#endif
};

template <typename T, int kSize>
struct Array {
  T at[kSize];
  SECATEUR_DEVICE T& operator[](int i) { return at[i]; }
};

/// Fragments of float64 matrix products, in the order of PTX's mma.m16n8k8: with g = lane / 4 and
/// t = lane % 4, A's (16, 8) elements (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4), B's (8, 8)
/// (t, g) (t + 4, g), and the (16, 8) sums' (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1).
using FragmentA = Array<double, 4>;
using FragmentB = Array<double, 2>;
using Sums16x8 = Array<double, 4>;

class Team {
 public:
#if defined(__CUDACC__)
  SECATEUR_DEVICE explicit Team(int thread) : thread_(thread) {}
#else
  /// Threads take turns in the order of their numbers, or backwards.
  explicit Team(bool backwards = false) : backwards_(backwards) {}
#endif

  /// f(thread) for every thread. None sees what another writes before sync().
  template <typename F>
  SECATEUR_DEVICE void run(const F& f) const {
#if defined(__CUDACC__)
    f(thread_);
#else
    for (int i = 0; i < kTeam; ++i) f(backwards_ ? kTeam - 1 - i : i);
#endif
  }

  SECATEUR_DEVICE void sync() const {
#if defined(__CUDA_ARCH__)
    __syncthreads();
#endif
  }

  /// The same within a warp.
  SECATEUR_DEVICE void sync_warps() const {
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
  }

  /// Whether this warp may leave out what is for others alone, those that chosen(thread) holds for.
  template <typename Chosen>
  SECATEUR_DEVICE bool absent(const Chosen& chosen) const {
#if defined(__CUDACC__)
    return !chosen(thread_);
#else
    (void)chosen;
    return false;
#endif
  }

  /// Whether x holds for any thread; a sync() as well.
  SECATEUR_DEVICE bool any(PerThread<bool>& x) const {
#if defined(__CUDA_ARCH__)
    return __syncthreads_or(x[thread_]) != 0;
#else
    bool result = false;
    run([&](int t) { result = result || x[t]; });
    return result;
#endif
  }

  /// Sums over the lanes that differ in the bits of kMask alone, each lane's left in x.
  template <int kMask>
  SECATEUR_DEVICE void sum(PerThread<double>& x) const {
#if defined(__CUDA_ARCH__)
    double& mine = x[thread_];
    SECATEUR_UNROLL
    for (int bit = kWarp / 2; bit > 0; bit /= 2) {
      if ((kMask & bit) != 0) mine += __shfl_xor_sync(~0u, mine, bit);
    }
#else
    lanes(x, kMask, [](double a, double b) { return a + b; });
#endif
  }

  /// The largest over the lanes of a warp.
  template <typename T>
  SECATEUR_DEVICE void largest(PerThread<T>& x) const {
#if defined(__CUDA_ARCH__)
    T& mine = x[thread_];
    SECATEUR_UNROLL
    for (int bit = kWarp / 2; bit > 0; bit /= 2) {
      const T other = __shfl_xor_sync(~0u, mine, bit);
      mine = mine > other ? mine : other;
    }
#else
    lanes(x, kWarp - 1, [](T a, T b) { return a > b ? a : b; });
#endif
  }

  /// Of 16 lanes in a row, for how many x holds.
  SECATEUR_DEVICE void votes(PerThread<bool>& x, PerThread<int>& count) const {
#if defined(__CUDA_ARCH__)
    const unsigned all = __ballot_sync(~0u, x[thread_]);
    count[thread_] = __popc(all >> (thread_ & 16) & 0xffffu);
#else
    for (int t = 0; t < kTeam; ++t) {
      count[t] = 0;
      for (int i = 0; i < 16; ++i) count[t] += x[t / 16 * 16 + i] ? 1 : 0;
    }
#endif
  }

  /// Sums over 8 lanes in a row of four values each: lane l's first is then that of value l / 2.
  SECATEUR_DEVICE void scatter_sums(PerThread<Array<double, 4>>& x) const {
#if defined(__CUDA_ARCH__)
    Array<double, 4>& y = x[thread_];
    const bool upper = (thread_ & 4) != 0, odd = (thread_ & 2) != 0;
    const double first = __shfl_xor_sync(~0u, upper ? y[0] : y[2], 4);
    const double second = __shfl_xor_sync(~0u, upper ? y[1] : y[3], 4);
    const double a = (upper ? y[2] : y[0]) + first, b = (upper ? y[3] : y[1]) + second;
    const double c = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 2);
    y[0] = c + __shfl_xor_sync(~0u, c, 1);
#else
    for (int begin = 0; begin < kTeam; begin += 8) {
      double sums[4] = {};
      for (int i = 0; i < 8; ++i) {
        for (int v = 0; v < 4; ++v) sums[v] += x[begin + i][v];
      }
      for (int i = 0; i < 8; ++i) x[begin + i][0] = sums[i / 2];
    }
#endif
  }

  /// sums += A B, for every warp; a(thread), b(thread) and sums(thread) are its fragments. For
  /// devices with float64 tensor cores.
  template <typename A, typename B, typename C>
  SECATEUR_DEVICE void multiply(const A& a, const B& b, const C& sums) const {
    multiply_if([](int) { return true; }, a, b, sums);
  }

  /// For the warps of threads that chosen(thread) holds for.
  template <typename Chosen, typename A, typename B, typename C>
  SECATEUR_DEVICE void multiply_if(const Chosen& chosen, const A& a, const B& b,
                                   const C& sums) const {
#if defined(__CUDA_ARCH__)
    if (chosen(thread_)) multiply_lane(a(thread_), b(thread_), sums(thread_));
#else
    for (int warp = 0; warp < kTeam; warp += kWarp) {
      if (!chosen(warp)) continue;
      for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 8; ++n) {
          double sum = 0;
          for (int k = 0; k < 8; ++k) {
            sum += a(warp + m % 8 * 4 + k % 4)[m / 8 + k / 4 * 2] * b(warp + n * 4 + k % 4)[k / 4];
          }
          sums(warp + m % 8 * 4 + n / 2)[m / 8 * 2 + n % 2] += sum;
        }
      }
    }
#endif
  }

#if defined(__CUDA_ARCH__)
  __device__ static void multiply_lane(const FragmentA& a, const FragmentB& b, Sums16x8& c) {
#if __CUDA_ARCH__ >= 900
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+d"(c.at[0]), "+d"(c.at[1]), "+d"(c.at[2]), "+d"(c.at[3])
        : "d"(a.at[0]), "d"(a.at[1]), "d"(a.at[2]), "d"(a.at[3]), "d"(b.at[0]), "d"(b.at[1]));
#elif __CUDA_ARCH__ >= 800
    SECATEUR_UNROLL
    for (int k = 0; k < 2; ++k) {
      SECATEUR_UNROLL
      for (int m = 0; m < 2; ++m) {
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+d"(c.at[2 * m]), "+d"(c.at[2 * m + 1])
            : "d"(a.at[2 * k + m]), "d"(b.at[k]));
      }
    }
#endif
  }
#endif

 private:
#if defined(__CUDACC__)
  int thread_;
#else
  template <typename T, typename Join>
  void lanes(PerThread<T>& x, int mask, const Join& join) const {
    PerThread<T> before = x;
    for (int t = 0; t < kTeam; ++t) {
      bool first = true;
      for (int other = t / kWarp * kWarp; other < t / kWarp * kWarp + kWarp; ++other) {
        if (((other ^ t) & ~mask) != 0) continue;
        x[t] = first ? before[other] : join(x[t], before[other]);
        first = false;
      }
    }
  }

  bool backwards_;
#endif
};

}  // namespace SECATEUR_SIDE
}  // namespace secateur::cuda
