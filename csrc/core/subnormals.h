// Whether arithmetic takes numbers below the normal range as zero: a state of each thread.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace secateur {
namespace subnormals {

#if defined(__SSE2__)
using Word = unsigned;
constexpr Word kFlush = 0x8040;  ///< results (flush to zero) and operands (denormals are zero)
inline Word read() { return _mm_getcsr(); }
inline void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
using Word = std::uint64_t;
constexpr Word kFlush = Word{1} << 24;
inline Word read() {
  Word word;
  asm volatile("mrs %0, fpcr" : "=r"(word));
  return word;
}
inline void write(Word word) { asm volatile("msr fpcr, %0" : : "r"(word) : "memory"); }
#else
using Word = unsigned;
constexpr Word kFlush = 0;
inline Word read() { return 0; }
inline void write(Word) {}
#endif

}  // namespace subnormals

/// While it lives the calling thread keeps subnormal numbers, whatever its program has chosen: or
/// a result would depend on who computes it, for threads are started before and after that choice.
class KeepSubnormals {
 public:
  KeepSubnormals() : before_(subnormals::read() & subnormals::kFlush) {
    if (before_ != 0) subnormals::write(subnormals::read() & ~subnormals::kFlush);
  }
  ~KeepSubnormals() {
    if (before_ != 0) subnormals::write(subnormals::read() | before_);
  }
  KeepSubnormals(const KeepSubnormals&) = delete;
  KeepSubnormals& operator=(const KeepSubnormals&) = delete;

 private:
  subnormals::Word before_;
};

}  // namespace secateur
