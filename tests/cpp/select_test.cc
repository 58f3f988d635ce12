#include <numeric>

#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::InvalidArgument;
using secateur::NumericalError;
using secateur::select;
using Indices = std::vector<std::int64_t>;

/// A neuron stays when fewer than `keep` others beat it.
Indices literal(const TestTensor& scores, std::int64_t keep) {
  const std::int64_t groups = scores.view().shape[0], n = scores.view().shape[1];
  Indices result;
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t better = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        const double mine = scores.get(g * n + i), theirs = scores.get(g * n + j);
        better += theirs > mine || (theirs == mine && j < i);
      }
      if (better < keep) result.push_back(i);
    }
  }
  return result;
}

TEST(Select, MatchesTheDefinitionOnManyTies) {
  Random random(1);
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : {Layout{}, Layout{{1, 0}, 2, {0, 1}}}) {
      for (const std::int64_t n : kSizes) {
        TestTensor scores(dtype, {3, n}, layout);
        scores.fill([&](std::int64_t) { return std::floor(5 * random.uniform()); });
        for (std::int64_t keep = 1; keep <= n; keep += std::max<std::int64_t>(1, n / 5)) {
          EXPECT_EQ(select(scores, keep), literal(scores, keep)) << n << " " << keep;
        }
        EXPECT_EQ(select(scores, n), literal(scores, n));
      }
    }
  }
}

TEST(Select, EqualScoresKeepTheLowestIndices) {
  TestTensor scores(DType::f64, {2, 6});
  scores.fill([](std::int64_t) { return 0.25; });
  EXPECT_EQ(select(scores, 3), (Indices{0, 1, 2, 0, 1, 2}));
}

TEST(Select, InfinityHasAnOrder) {
  TestTensor scores(DType::f32, {1, 4});
  const double values[] = {-kInf, 1, kInf, 2};
  scores.fill([&](std::int64_t i) { return values[i]; });
  EXPECT_EQ(select(scores, 2), (Indices{2, 3}));
  EXPECT_EQ(select(scores, 3), (Indices{1, 2, 3}));
}

TEST(Select, Refuses) {
  TestTensor scores(DType::f64, {2, 3});
  scores.fill([](std::int64_t i) { return static_cast<double>(i); });
  expect_error<InvalidArgument>([&] { select(scores, 0); }, "keep: expected 1 to 3, got 0");
  expect_error<InvalidArgument>([&] { select(scores, 4); }, "keep: expected 1 to 3, got 4");
  expect_error<InvalidArgument>([] { select(TestTensor(DType::f64, {3}), 1); },
                                "scores: expected shape (groups, n), n >= 1, got (3,)");
  expect_error<InvalidArgument>([] { select(TestTensor(DType::f64, {3, 0}), 1); },
                                "scores: expected shape (groups, n), n >= 1, got (3, 0)");
  scores.set(5, kNaN);
  expect_error<NumericalError>([&] { select(scores, 1); },
                               "scores: expected values with an order, got nan at (1, 2)");
}

TEST(Select, StridesOfSingleElementsDoNotMatter) {
  constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
  const double scores[] = {1, 2, 3, 4};
  const TensorView column(scores, DType::f64, {4, 1}, {1, kAny});
  EXPECT_EQ(select(column, 1), (std::vector<std::int64_t>{0, 0, 0, 0}));
}

}  // namespace
