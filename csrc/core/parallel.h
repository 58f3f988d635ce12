// The one place with threads. Tasks are handed out one at a time; what a task computes may not
// depend on who runs it or on the number of threads, so that results are the same bits for any.
//
// The pool's threads sleep between calls (they never spin against another library's); set_team()
// puts a program's threads in their place. A second caller while they are busy, and a call from
// inside a task, run on the calling thread alone.
// After fork() the child starts a pool of its own when it first needs one. The threads live until
// the process ends: the library is linked not to be unloaded.
#pragma once

#include <cstddef>
#include <functional>

namespace secateur {

/// How many threads may take part in a call that begins now.
std::size_t parallel_slots();

/// Runs task(i, slot) for all i < tasks. At most one task at a time has a given slot < slots, so a
/// slot may own scratch memory. When tasks throw, those not yet begun are dropped, and the
/// exception of the lowest task that threw is thrown here: the same for any number of threads.
void parallel_for(std::size_t tasks, std::size_t slots,
                  const std::function<void(std::size_t task, std::size_t slot)>& task);

}  // namespace secateur
