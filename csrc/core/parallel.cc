#include "parallel.h"

#include <secateur/runtime.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "check.h"
#include "subnormals.h"

namespace secateur {
namespace {

constexpr int kMaxThreads = 1024;

thread_local bool inside = false;

/// Marks a thread while it runs tasks.
class Inside {
 public:
  Inside() : before_(inside) { inside = true; }
  ~Inside() { inside = before_; }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  bool before_;
};

/// One call of parallel_for.
struct Job {
  std::size_t tasks;
  TaskRef task;
  std::atomic<std::size_t> next{0};
  std::exception_ptr error{};
  std::size_t error_task = 0;
  std::mutex error_mutex{};

  void work(std::size_t slot) {
    const Inside mark;
    const KeepSubnormals keep;
    for (std::size_t i = next.fetch_add(1); i < tasks; i = next.fetch_add(1)) {
      try {
        task(i, slot);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        // Tasks begin in order: every lower one has begun, and is heard before the call ends.
        if (!error || i < error_task) {
          error = std::current_exception();
          error_task = i;
        }
        next.store(tasks);
      }
    }
  }
};

class Pool {
 public:
  /// False when another call has the pool.
  bool run(Job& job, std::size_t helpers) {
    const std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      job_ = &job;
      wanted_ = std::min(helpers, workers_.size());
      running_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  // A machine that refuses another thread gets by with those it has.
  void grow(std::size_t count) {
    while (workers_.size() < count) {
      try {
        workers_.reserve(workers_.size() + 1);
        workers_.emplace_back(
            [this, slot = workers_.size() + 1, seen = generation_] { serve(slot, seen); });
      } catch (const std::exception&) {
        return;
      }
    }
  }

  void serve(std::size_t slot, std::size_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (slot > wanted_) continue;
      Job* job = job_;
      lock.unlock();
      job->work(slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  std::size_t wanted_ = 0;
  std::size_t running_ = 0;
  std::size_t generation_ = 0;
};

// Never deleted: joining threads while a process exits, or in a forked child that does not have
// them, can only hang.
std::atomic<Pool*> pool{nullptr};
// What forked children leave behind stays reachable, which is what leak checkers ask for.
std::atomic<Pool*> parents_pool{nullptr};
std::atomic<int> thread_count{0};
std::atomic<Team> chosen_team{nullptr};
std::atomic<bool> team_is_busy{false};

void forget_threads() {
  parents_pool.store(pool.exchange(nullptr));
  chosen_team.store(nullptr);
  team_is_busy.store(false);
  inside = false;
}

void forget_threads_after_fork() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
  static_cast<void>(registered);
}

/// False when another call has the team.
bool run_on_team(Team run, Job& job, std::size_t slots) {
  if (team_is_busy.exchange(true)) return false;
  struct Share {
    Job& job;
    std::size_t slots;
    std::atomic<std::size_t> next{0};
  } share{job, slots};
  const struct Release {
    ~Release() { team_is_busy.store(false); }
  } release;
  run(
      [](void* data) {
        Share& mine = *static_cast<Share*>(data);
        const std::size_t slot = mine.next.fetch_add(1);
        if (slot < mine.slots) mine.job.work(slot);
      },
      &share, static_cast<int>(slots));
  job.work(0);  // for a team that never came
  return true;
}

Pool& shared_pool() {
  forget_threads_after_fork();
  Pool* current = pool.load();
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

int threads() {
  const int chosen = thread_count.load();
  if (chosen > 0) return chosen;
  // Asked once: it reads files and takes longer than a small update.
  static const int cores =
      std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
  return cores;
}

void set_threads(int n) {
  check_range(n, 1, kMaxThreads, "n");
  thread_count.store(n);
}

void set_team(Team run) {
  forget_threads_after_fork();
  chosen_team.store(run);
}

Team team() { return chosen_team.load(); }

std::size_t parallel_slots() { return static_cast<std::size_t>(threads()); }

void parallel_for(std::size_t tasks, std::size_t slots, TaskRef task) {
  const std::size_t helpers = std::min(slots, tasks) - (tasks > 0 ? 1 : 0);
  Job job{tasks, task};
  const Team run = chosen_team.load();
  // All slots, whatever the tasks: OpenMP ends the threads that a smaller team leaves over.
  const bool done =
      !inside && helpers > 0 &&
      (run != nullptr ? run_on_team(run, job, slots) : shared_pool().run(job, helpers));
  if (!done) job.work(0);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace secateur
