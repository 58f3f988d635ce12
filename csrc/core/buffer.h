// Scratch memory of kernels: aligned to cache lines, not initialised.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace secateur {

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t count)
      : memory_(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kAlignment}))) {}

  T* data() { return memory_.get(); }
  const T* data() const { return memory_.get(); }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace secateur
