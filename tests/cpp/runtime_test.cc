#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::InvalidArgument;

TEST(Runtime, IsaIsOneOfTheAvailable) {
  const auto isas = secateur::available_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.front(), "baseline");
  const char* forced = std::getenv("SECATEUR_ISA");
  EXPECT_EQ(secateur::isa(), forced != nullptr ? forced : isas.back());
}

TEST(Runtime, Version) {
  const std::string version = secateur::version();
  EXPECT_EQ(std::count(version.begin(), version.end(), '.'), 2) << version;
}

TEST(Runtime, ThreadNumber) {
  const Threads restore(secateur::threads());
  EXPECT_GE(secateur::threads(), 1);
  secateur::set_threads(3);
  EXPECT_EQ(secateur::threads(), 3);
  expect_error<InvalidArgument>([] { secateur::set_threads(0); }, "n: expected 1 to 1024, got 0");
  expect_error<InvalidArgument>([] { secateur::set_threads(1025); },
                                "n: expected 1 to 1024, got 1025");
  EXPECT_EQ(secateur::threads(), 3);
}

std::vector<double> work(std::uint64_t seed) {
  TestTensor w(DType::f64, {300, 40});
  Random random(seed);
  w.fill([&](std::int64_t) { return random.normal(); });
  return secateur::value_similarity(w);
}

// Callers that find the pool busy do their work themselves.
TEST(Runtime, ConcurrentCallers) {
  const Threads set(3);
  std::vector<std::vector<double>> expected;
  for (std::uint64_t seed = 0; seed < 4; ++seed) expected.push_back(work(seed));
  std::vector<std::thread> callers;
  std::vector<int> right(4, 0);
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    callers.emplace_back([&, seed] {
      for (int i = 0; i < 20; ++i) right[seed] += work(seed) == expected[seed];
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(right, (std::vector<int>{20, 20, 20, 20}));
}

// A forked child has none of the parent's threads and must neither hang nor differ.
TEST(Runtime, ForkedChildren) {
  const Threads set(3);
  const std::vector<double> expected = work(9);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    _exit(work(9) == expected && work(9) == expected ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(work(9), expected);
}

}  // namespace
