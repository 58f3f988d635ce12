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

namespace secateur {

/// How many threads may take part in a call that begins now.
std::size_t parallel_slots();

/// Refers to what runs one task, and allocates nothing for it.
class TaskRef {
 public:
  template <typename Body>
  TaskRef(const Body& body)
      : body_(&body), run_([](const void* data, std::size_t task, std::size_t slot) {
          (*static_cast<const Body*>(data))(task, slot);
        }) {}
  void operator()(std::size_t task, std::size_t slot) const { run_(body_, task, slot); }

 private:
  const void* body_;
  void (*run_)(const void*, std::size_t, std::size_t);
};

/// Runs task(i, slot) for all i < tasks. At most one task at a time has a given slot < slots, so a
/// slot may own scratch memory. When tasks throw, those not yet begun are dropped, and the
/// exception of the lowest task that threw is thrown here: the same for any number of threads.
/// Tasks keep subnormal numbers, whatever the threads do otherwise.
void parallel_for(std::size_t tasks, std::size_t slots, TaskRef task);

}  // namespace secateur
