#include <algorithm>

#include "reference.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::InvalidArgument;
using secateur::NumericalError;
using secateur::value_similarity;
using secateur::value_similarity_from_moment;

TestTensor weights(const Dims& shape, std::uint64_t seed, DType dtype = DType::f64,
                   const Layout& layout = {}, double scale = 1) {
  TestTensor w(dtype, shape, layout);
  Random random(seed);
  w.fill([&](std::int64_t) { return scale * (random.normal() + 0.3); });
  return w;
}

reference::Matrix matrix_of(const TestTensor& w) {
  const Dims& shape = w.view().shape;
  const auto columns = static_cast<std::size_t>(shape[shape.size() - 1]);
  reference::Matrix result(static_cast<std::size_t>(w.view().numel()) / columns, columns);
  for (std::size_t i = 0; i < result.values.size(); ++i) {
    result.values[i] = w.get(static_cast<std::int64_t>(i));
  }
  return result;
}

void expect_near(const std::vector<double>& mine, const std::vector<double>& wanted) {
  ASSERT_EQ(mine.size(), wanted.size());
  for (std::size_t i = 0; i < mine.size(); ++i) {
    EXPECT_NEAR(mine[i], wanted[i], 1e-13 * static_cast<double>(mine.size() + 1)) << i;
  }
}

void check(const TestTensor& w) {
  expect_near(value_similarity(w), reference::value_similarity(matrix_of(w)));
}

TEST(ValueSimilarity, EverySize) {
  for (const std::int64_t rows : kSizes) {
    for (const std::int64_t columns : {std::int64_t{1}, rows, std::int64_t{37}}) {
      check(weights({rows, columns}, 1));
    }
  }
  check(weights({150, 300}, 2));  // several groups of panels and blocks of columns
}

TEST(ValueSimilarity, EveryDTypeAndLayout) {
  for (const DType dtype : kDTypes) {
    check(weights({20, 18}, 3, dtype));
    check(weights({20, 18}, 3, dtype, {{1, 0}, 2, {0, 1}}));
    check(weights({3, 7, 18}, 4, dtype));
    check(weights({3, 7, 18}, 4, dtype, {{1, 2, 0}, 3, {1}}));
  }
}

TEST(ValueSimilarity, HeadsAreOneGroup) {
  const TestTensor heads = weights({3, 8, 10}, 5), flat = weights({24, 10}, 5);
  EXPECT_EQ(value_similarity(heads), value_similarity(flat));
}

TEST(ValueSimilarity, ZeroAndDuplicateRows) {
  TestTensor w = weights({20, 6}, 6);
  for (std::int64_t c = 0; c < 6; ++c) {
    w.set(4 * 6 + c, 0);
    w.set(19 * 6 + c, -3 * w.get(c));
  }
  check(w);
  EXPECT_EQ(value_similarity(w)[4], 0);

  TestTensor same(DType::f32, {18, 5});
  same.fill([](std::int64_t i) { return static_cast<double>(i % 5 + 1) / 7; });
  for (const double score : value_similarity(same)) {
    EXPECT_GE(score, 0);
    EXPECT_LT(score, 1e-13);
  }
}

// Rounding makes a row's cosine with itself or its copy a little more or less than 1.
TEST(ValueSimilarity, ARowAloneScoresZeroAndCopiesNotLess) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const TestTensor row = weights({1, 11}, seed);
    EXPECT_EQ(value_similarity(row)[0], 0);
    TestTensor copies(DType::f64, {2, 11});
    copies.fill([&](std::int64_t i) { return row.get(i % 11) * (i < 11 ? 1 : -4); });
    for (const double score : value_similarity(copies)) {
      EXPECT_GE(score, 0);
      EXPECT_LT(score, 1e-15);
    }
  }
}

// Each row has a scale of its own, even where squares would overflow or vanish.
TEST(ValueSimilarity, ScaleOfARowDoesNotMatter) {
  const TestTensor plain = weights({9, 6}, 7);
  TestTensor scaled = weights({9, 6}, 7);
  const double scales[] = {0x1p-900, 0x1p-40, 1, 0x1p40, 0x1p900};
  for (std::int64_t i = 0; i < 54; ++i) scaled.set(i, plain.get(i) * scales[i / 6 % 5]);
  EXPECT_EQ(value_similarity(scaled), value_similarity(plain));
}

TEST(ValueSimilarity, SameBitsForAnyThreads) {
  const TestTensor w = weights({200, 33}, 8);
  TestTensor moment(DType::f64, {200, 200});
  moment.fill([&](std::int64_t i) {
    double sum = 0;
    for (std::int64_t c = 0; c < 33; ++c) sum += w.get(i / 200 * 33 + c) * w.get(i % 200 * 33 + c);
    return sum;
  });
  const Threads one(1);
  const auto scores = value_similarity(w);
  const auto from_moment = value_similarity_from_moment(moment);
  for (const int threads : {2, 3, 5}) {
    const Threads set(threads);
    EXPECT_EQ(value_similarity(w), scores);
    EXPECT_EQ(value_similarity_from_moment(moment), from_moment);
  }
}

TEST(ValueSimilarity, FromMomentIsTheSimilarityOfColumns) {
  for (const std::int64_t size : kSizes) {
    for (const Layout& layout : {Layout{}, Layout{{1, 0}, 2, {0, 1}}}) {
      TestTensor w = weights({size, 40}, 9);
      for (std::int64_t c = 0; c < 40 && size > 2; ++c) w.set(2 * 40 + c, 0);
      const reference::Matrix rows = matrix_of(w);
      TestTensor moment(DType::f64, {size, size}, layout);
      moment.fill([&](std::int64_t i) {
        double sum = 0;
        for (std::size_t c = 0; c < 40; ++c) {
          sum += rows(static_cast<std::size_t>(i / size), c) *
                 rows(static_cast<std::size_t>(i % size), c);
        }
        return sum;
      });
      expect_near(value_similarity_from_moment(moment), reference::value_similarity(rows));
    }
  }
}

TEST(ValueSimilarity, FromMomentTakesRoundedMatrices) {
  for (const DType dtype : kDTypes) {
    TestTensor moment(dtype, {2, 2});
    const double values[] = {4, 3, 3 * (1 + 2e-7), 9};
    moment.fill([&](std::int64_t i) { return values[i]; });
    EXPECT_NEAR(value_similarity_from_moment(moment)[0], 0.5, 1e-2);
  }
}

TEST(ValueSimilarity, Refuses) {
  const std::string shape =
      "weights: expected shape (rows, D) or (heads, head_dim, D), none of "
      "them 0, got ";
  expect_error<InvalidArgument>([] { value_similarity(TestTensor(DType::f32, {4})); },
                                shape + "(4,)");
  expect_error<InvalidArgument>([] { value_similarity(TestTensor(DType::f32, {2, 2, 2, 2})); },
                                shape + "(2, 2, 2, 2)");
  expect_error<InvalidArgument>([] { value_similarity(TestTensor(DType::f32, {4, 0})); },
                                shape + "(4, 0)");
  for (const DType dtype : kDTypes) {
    TestTensor w = weights({2, 3, 4}, 10, dtype);
    w.set(18, -kInf);
    expect_error<NumericalError>(
        [&] { value_similarity(w); },
        "weights: expected finite values, got -inf at (head 1, row 1, column 2)");
    TestTensor flat = weights({3, 4}, 10, dtype);
    flat.set(6, kNaN);
    expect_error<NumericalError>([&] { value_similarity(flat); },
                                 "weights: expected finite values, got nan at (row 1, column 2)");
  }
}

// Of several the first, whoever finds it: where the first row is done early, and where it is late.
TEST(ValueSimilarity, FromMomentNamesTheFirstAsymmetry) {
  for (const std::int64_t column : {3, 299}) {
    TestTensor moment(DType::f64, {300, 300});
    moment.fill([&](std::int64_t i) {
      const std::int64_t row = i / 300, at = i % 300;
      if (row == at) return 1.0;
      return row == 0 ? (at == column ? 0.25 : 0.5) : (at > row ? 0.125 : 0.5);
    });
    for (const int threads : {1, 2, 5}) {
      const Threads set(threads);
      for (int i = 0; i < 50; ++i) {
        const std::string place = std::to_string(column);
        expect_error<InvalidArgument>([&] { value_similarity_from_moment(moment); },
                                      "moment: expected a symmetric matrix, got 0.25 at (row 0, "
                                      "column " +
                                          place + ") and 0.5 at (row " + place + ", column 0)");
      }
    }
  }
}

TEST(ValueSimilarity, FromMomentRefuses) {
  const auto moment = [](const std::vector<double>& values) {
    return [values] {
      TestTensor matrix(DType::f64, {2, 2});
      matrix.fill([&](std::int64_t i) { return values[static_cast<std::size_t>(i)]; });
      value_similarity_from_moment(matrix);
    };
  };
  expect_error<InvalidArgument>([] { value_similarity_from_moment(TestTensor(DType::f64, {2})); },
                                "moment: expected shape (R, R), R >= 1, got (2,)");
  expect_error<InvalidArgument>(
      [] { value_similarity_from_moment(TestTensor(DType::f64, {2, 3})); },
      "moment: expected shape (R, R), R >= 1, got (2, 3)");
  expect_error<InvalidArgument>(
      [] { value_similarity_from_moment(TestTensor(DType::f64, {0, 0})); },
      "moment: expected shape (R, R), R >= 1, got (0, 0)");
  expect_error<InvalidArgument>(
      moment({1, 0, 0, -2}),
      "moment: expected a diagonal of at least 0, got -2 at (row 1, column 1)");
  expect_error<InvalidArgument>(moment({1, 0.5, 0.25, 1}),
                                "moment: expected a symmetric matrix, got 0.5 at (row 0, column 1) "
                                "and 0.25 at (row 1, column 0)");
  expect_error<NumericalError>(moment({1, 0.5, kNaN, 1}),
                               "moment: expected finite values, got nan at (row 1, column 0)");
}

TEST(ValueSimilarity, StridesOfSingleElementsDoNotMatter) {
  constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
  const double one = 2;
  const TensorView moment(&one, DType::f64, {1, 1}, {kAny, kAny});
  EXPECT_EQ(secateur::value_similarity_from_moment(moment), std::vector<double>{0});
  EXPECT_EQ(secateur::value_similarity(moment), std::vector<double>{0});
}

}  // namespace
