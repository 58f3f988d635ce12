// The thread pool itself: internal, so only where the library is linked statically.
#include "parallel.h"

#include <secateur/runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "subnormals.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::parallel_for;

TEST(Parallel, EveryTaskOnce) {
  for (const std::size_t slots : {1, 2, 3, 5, 16}) {
    for (const std::size_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(tasks);
      parallel_for(tasks, slots, [&](std::size_t task, std::size_t slot) {
        EXPECT_LT(slot, slots);
        ++runs[task];
      });
      for (const auto& count : runs) ASSERT_EQ(count, 1);
    }
  }
}

// A slot's scratch memory is one task's at a time.
TEST(Parallel, SlotsAreExclusive) {
  std::vector<std::atomic<int>> users(4);
  std::atomic<int> clashes{0};
  parallel_for(400, 4, [&](std::size_t, std::size_t slot) {
    clashes += ++users[slot] != 1;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    --users[slot];
  });
  EXPECT_EQ(clashes, 0);
}

// A program's own threads in place of the pool's, and how often they were called.
std::atomic<int> team_calls{0};

void new_threads(void (*body)(void*), void* data, int threads) {
  ++team_calls;
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

void only_the_caller(void (*body)(void*), void* data, int) {
  ++team_calls;
  body(data);
}

void more_than_asked(void (*body)(void*), void* data, int threads) {
  new_threads(body, data, threads + 3);
}

void nobody(void (*)(void*), void*, int) { ++team_calls; }

void one_that_fails(void (*body)(void*), void* data, int) {
  ++team_calls;
  body(data);
  throw std::runtime_error("no thread");
}

/// The team for a while.
struct Working {
  explicit Working(secateur::Team team) {
    team_calls = 0;
    secateur::set_team(team);
  }
  ~Working() { secateur::set_team(nullptr); }
};

TEST(Parallel, AnotherTeam) {
  EXPECT_EQ(secateur::team(), nullptr);
  for (const secateur::Team team : {&new_threads, &only_the_caller, &more_than_asked, &nobody}) {
    const Working working(team);
    EXPECT_EQ(secateur::team(), team);
    std::vector<std::atomic<int>> runs(100), users(3);
    std::atomic<int> clashes{0}, inner{0}, elsewhere{0};
    const auto caller = std::this_thread::get_id();
    parallel_for(runs.size(), 3, [&](std::size_t task, std::size_t slot) {
      ASSERT_LT(slot, 3u);
      clashes += ++users[slot] != 1;
      elsewhere += std::this_thread::get_id() != caller;
      ++runs[task];
      // From inside a task: on this thread, without the team.
      if (task % 10 == 0) parallel_for(5, 3, [&](std::size_t, std::size_t) { ++inner; });
      --users[slot];
    });
    for (const auto& count : runs) EXPECT_EQ(count, 1);
    EXPECT_EQ(clashes, 0);
    EXPECT_EQ(inner, 50);
    EXPECT_EQ(team_calls, 1);
    if (team == &only_the_caller || team == &nobody) {
      EXPECT_EQ(elsewhere, 0);
    }
    try {
      parallel_for(8, 3, [](std::size_t task, std::size_t) {
        throw std::runtime_error(std::to_string(task));
      });
      ADD_FAILURE() << "no exception";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "0");
    }
    EXPECT_EQ(team_calls, 2);
  }
}

TEST(Parallel, ASecondCallerDoesNotWaitForTheTeam) {
  const Working working(&only_the_caller);
  std::atomic<int> second{0};
  parallel_for(3, 3, [&](std::size_t, std::size_t) {
    std::thread([&] { parallel_for(4, 3, [&](std::size_t, std::size_t) { ++second; }); }).join();
  });
  EXPECT_EQ(second, 12);
  EXPECT_EQ(team_calls, 1);
}

TEST(Parallel, ATeamThatFailsIsCalledAgain) {
  const Working working(&one_that_fails);
  for (int i = 1; i <= 2; ++i) {
    std::atomic<int> runs{0};
    EXPECT_THROW(parallel_for(4, 3, [&](std::size_t, std::size_t) { ++runs; }), std::runtime_error);
    EXPECT_EQ(runs, 4);
    EXPECT_EQ(team_calls, i);
  }
}

// Whichever task throws first, the lowest is heard.
TEST(Parallel, TheLowestTaskThatThrowsIsHeard) {
  for (const bool lowest_is_late : {false, true}) {
    for (int i = 0; i < 20; ++i) {
      try {
        parallel_for(8, 4, [&](std::size_t task, std::size_t) {
          if ((task == 0) == lowest_is_late) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
          }
          throw std::runtime_error(std::to_string(task));
        });
        FAIL() << "no exception";
      } catch (const std::runtime_error& error) {
        EXPECT_STREQ(error.what(), "0");
      }
    }
  }
}

TEST(Parallel, NothingNewBeginsAfterAnException) {
  std::atomic<int> begun{0};
  EXPECT_THROW(parallel_for(100000, 2,
                            [&](std::size_t, std::size_t) {
                              ++begun;
                              throw std::runtime_error("");
                            }),
               std::runtime_error);
  EXPECT_LE(begun, 2);
}

TEST(Parallel, NestedCallsRunOnTheirThread) {
  std::atomic<int> runs{0};
  parallel_for(6, 3, [&](std::size_t, std::size_t) {
    const auto thread = std::this_thread::get_id();
    parallel_for(5, 3, [&](std::size_t, std::size_t slot) {
      EXPECT_EQ(slot, 0u);
      EXPECT_EQ(std::this_thread::get_id(), thread);
      ++runs;
    });
  });
  EXPECT_EQ(runs, 30);
}

/// The calling thread's subnormal numbers are zeros while it lives.
class Flushed {
 public:
  Flushed() : before_(secateur::subnormals::read()) {
    secateur::subnormals::write(before_ | secateur::subnormals::kFlush);
  }
  ~Flushed() { secateur::subnormals::write(before_); }
  Flushed(const Flushed&) = delete;
  Flushed& operator=(const Flushed&) = delete;

 private:
  secateur::subnormals::Word before_;
};

/// Of which most rows are subnormal.
TestTensor tiny(DType dtype, const Dims& shape, std::uint64_t seed, double scale = 1e-40) {
  TestTensor x(dtype, shape);
  const std::int64_t row = shape[shape.size() - 1];
  Random random(seed);
  x.fill([&](std::int64_t i) { return random.normal() * (i / row % 7 == 0 ? 1 : scale); });
  return x;
}

TestTensor filled(DType dtype, const Dims& shape,
                  const std::function<double(std::int64_t)>& function) {
  TestTensor x(dtype, shape);
  x.fill(function);
  return x;
}

/// Arguments of all that the library computes, with numbers that are, or become, subnormal.
struct Tiny {
  TestTensor rows = tiny(DType::f32, {150, 33}, 1);
  TestTensor large = filled(DType::f64, {3, 5}, [](std::int64_t i) {
    return i < 10 ? 1e308 : static_cast<double>(i % 2) * 1e308;
  });
  TestTensor moment =
      filled(DType::f64, {2, 2}, [](std::int64_t i) { return i == 0 || i == 3 ? 4e-310 : 1e-310; });
  TestTensor few = tiny(DType::f32, {90, 19}, 2), many = tiny(DType::f32, {5000, 19}, 3);
  TestTensor all = filled(DType::f32, {40, 19},
                          [](std::int64_t i) { return 1e-41 * static_cast<double>(i % 13 + 1); });
  TestTensor q = tiny(DType::f32, {5, 12, 2, 9}, 4), k = tiny(DType::f32, {5, 12, 2, 9}, 5);
  TestTensor inverse =
      filled(DType::f64, {6, 6}, [](std::int64_t i) { return i % 7 == 0 ? 2.0 : 0.5; });
  TestTensor weights = filled(DType::f32, {6, 30},
                              [](std::int64_t i) { return 1e-40 * static_cast<double>(i % 11); });
  TestTensor tiniest = filled(
      DType::f64, {6, 2}, [](std::int64_t i) { return 1e-160 * static_cast<double>(i % 5 + 1); });
  TestTensor scores = filled(DType::f32, {1, 9},
                             [](std::int64_t i) { return 1e-42 * static_cast<double>(i * 5 % 9); });
};

std::vector<double> results_of(const Tiny& tiny) {
  std::vector<double> results;
  const auto take = [&](const auto& more) {
    for (const auto value : more) results.push_back(static_cast<double>(value));
  };
  take(secateur::value_similarity(tiny.rows));
  take(secateur::value_similarity(tiny.large));
  take(secateur::value_similarity_from_moment(tiny.moment));
  for (const TestTensor* x : {&tiny.few, &tiny.many, &tiny.all}) {
    secateur::MomentAccumulator moments(19);
    moments.update(*x);
    take(moments.sum());
    moments.update(*x, {secateur::RowNorm::layer, 1, 0});
    take(moments.second_moment());
  }
  secateur::AttentionScorer scorer(2, 9, 4, true);
  scorer.update(tiny.q, tiny.k);
  take(scorer.scores());
  take(scorer.score_gram());
  secateur::AttentionScorerState few = scorer.state();
  few.images = 100;
  few.tokens = 1200;
  std::fill(few.score_sum.begin(), few.score_sum.end(), 3e-307);
  scorer.load_state(few);
  take(scorer.scores());
  const secateur::Elimination gone = secateur::eliminate(tiny.inverse, tiny.weights, 6);
  take(gone.costs);
  take(gone.order);
  take(secateur::eliminate(tiny.inverse, tiny.tiniest, 6).costs);
  take(secateur::select(tiny.scores, 4));
  return results;
}

// Threads that were started before the program chose to flush, and those that were not, agree.
TEST(Parallel, ResultsDoNotDependOnWhetherSubnormalsAreFlushed) {
  if (secateur::subnormals::kFlush == 0) GTEST_SKIP() << "this machine has no such state";
  const Threads alone(1);
  const Tiny tiny;
  const std::vector<double> wanted = results_of(tiny);
  EXPECT_GT(std::count_if(wanted.begin(), wanted.end(),
                          [](double x) { return x != 0 && std::fabs(x) < 1e-35; }),
            20);
  for (const int threads : {1, 2, 5}) {
    const Threads some(threads);
    EXPECT_EQ(results_of(tiny), wanted);  // starts them
    const Flushed flushed;
    EXPECT_EQ(results_of(tiny), wanted) << threads;
    EXPECT_EQ(secateur::subnormals::read() & secateur::subnormals::kFlush,
              secateur::subnormals::kFlush);
  }
  const Threads more(12);
  {
    const Flushed flushed;
    EXPECT_EQ(results_of(tiny), wanted);  // starts some that flush for good
  }
  EXPECT_EQ(results_of(tiny), wanted);
}

}  // namespace
