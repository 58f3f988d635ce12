// What calls allocate, and that one which finds no memory leaves everything as it was.
#include <new>

#include "allocations.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::AttentionScorer;
using secateur::MomentAccumulator;

/// Lets the first, the second, … allocation of `call` fail until it comes through, and calls
/// `unchanged` after each that failed. How many did.
template <typename Call, typename Unchanged>
int fail_everywhere(const Call& call, const Unchanged& unchanged) {
  for (int n = 0;; ++n) {
    allocations::until_failure = n;
    try {
      call();
      allocations::until_failure = -1;
      return n;
    } catch (const std::bad_alloc&) {
      allocations::until_failure = -1;
      unchanged();
    }
  }
}

TestTensor normal(const Dims& shape, DType dtype, std::uint64_t seed) {
  TestTensor x(dtype, shape);
  Random random(seed);
  x.fill([&](std::int64_t) { return random.normal(); });
  return x;
}

// More rows than are multiplied at a time: the first of them are not added alone.
TEST(Memory, MomentsAreAddedWhollyOrNotAtAll) {
  const Threads one(1);
  for (const DType dtype : {DType::f32, DType::f64}) {
    const TestTensor first = normal({17, 9}, dtype, 1), x = normal({9000, 9}, dtype, 2);
    for (const auto norm : {secateur::RowNorm::none, secateur::RowNorm::layer}) {
      MomentAccumulator moments(9);
      moments.update(first);
      const std::vector<double> sum = moments.sum(), second = moments.second_moment();
      const int failed = fail_everywhere([&] { moments.update(x, {norm, 1, 0}); },
                                         [&] {
                                           ASSERT_EQ(moments.rows(), 17);
                                           ASSERT_EQ(moments.sum(), sum);
                                           ASSERT_EQ(moments.second_moment(), second);
                                         });
      EXPECT_GT(failed, 3);
      EXPECT_EQ(moments.rows(), 9017);
      MomentAccumulator whole(9);
      whole.update(first);
      whole.update(x, {norm, 1, 0});
      EXPECT_EQ(moments.second_moment(), whole.second_moment());
    }
  }
}

TEST(Memory, ScoresAreAddedWhollyOrNotAtAll) {
  const Threads one(1);
  const TestTensor q = normal({3, 11, 2, 7}, DType::f32, 3),
                   k = normal({3, 11, 2, 7}, DType::f32, 4);
  AttentionScorer scorer(2, 7, 4, true);
  scorer.update(q, k);
  const auto before = scorer.state();
  const auto unchanged = [&] {
    ASSERT_EQ(scorer.state().images, before.images);
    ASSERT_EQ(scorer.state().tokens, before.tokens);
    ASSERT_EQ(scorer.state().score_sum, before.score_sum);
    ASSERT_EQ(scorer.state().score_gram, before.score_gram);
  };
  EXPECT_GT(fail_everywhere([&] { scorer.update(k, q); }, unchanged), 3);
  AttentionScorer whole(2, 7, 4, true);
  whole.update(q, k);
  whole.update(k, q);
  EXPECT_EQ(scorer.state().score_gram, whole.state().score_gram);
}

TEST(Memory, WeightsStayWhereTheyAre) {
  const Threads one(1);
  for (const Layout& layout : {Layout{}, Layout{{1, 0}, 3, {}}}) {
    TestTensor weights(DType::f16, {30, 21}, layout);
    Random random(5);
    weights.fill([&](std::int64_t) { return random.normal(); });
    const std::vector<char> before = weights.memory();
    EXPECT_GT(fail_everywhere([&] { secateur::compact(weights.view(), 1, {0, 2, 3, 20}); },
                              [&] { ASSERT_EQ(weights.memory(), before); }),
              0);
    EXPECT_NE(weights.memory(), before);
  }
}

TEST(Memory, CompactTakesNoSecondBuffer) {
  TestTensor weights(DType::f16, {30000, 2}, {{1, 0}, 1, {}});
  const std::size_t before = allocations::allocated;
  secateur::compact(weights.view(), 1, {1});
  EXPECT_LT(allocations::allocated - before, 4096);
}

}  // namespace
