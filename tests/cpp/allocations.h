// What this thread allocates by operator new, which the test program replaces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace allocations {

extern thread_local std::int64_t until_failure;  ///< so many succeed; -1: none fails
extern thread_local std::size_t allocated;       ///< bytes that were asked for

}  // namespace allocations
