// A file of its own: inlined into what calls them, gcc takes new and free for a mismatch.
#include "allocations.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace allocations {

thread_local std::int64_t until_failure = -1;
thread_local std::size_t allocated = 0;

namespace {

void* allocate(std::size_t size, std::size_t alignment) {
  if (until_failure == 0) throw std::bad_alloc();
  if (until_failure > 0) --until_failure;
  allocated += size;
  const std::size_t whole = (std::max<std::size_t>(size, 1) + alignment - 1) / alignment;
  if (void* memory = std::aligned_alloc(alignment, whole * alignment)) return memory;
  throw std::bad_alloc();
}

}  // namespace
}  // namespace allocations

void* operator new(std::size_t size) {
  return allocations::allocate(size, __STDCPP_DEFAULT_NEW_ALIGNMENT__);
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocations::allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
