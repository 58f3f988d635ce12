#include <algorithm>

#include "reference.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using reference::Matrix;
using secateur::eliminate;
using secateur::Elimination;
using secateur::InvalidArgument;
using secateur::NumericalError;
using secateur::Unsupported;
using Indices = std::vector<std::int64_t>;

// Past one flush of pending downdates, and three.
std::vector<std::int64_t> sizes() {
  std::vector<std::int64_t> result = kSizes;
  result.insert(result.end(), {130, 200});
  return result;
}

/// Correlated inputs of different scales: few strong directions over a diagonal.
Matrix covariance(std::size_t n, std::uint64_t seed, double floor = 0.1) {
  Random random(seed);
  const std::size_t rank = n / 3 + 1;
  Matrix mixing(n, rank), result(n, n);
  for (double& value : mixing.values) value = random.normal();
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      for (std::size_t r = 0; r < rank; ++r) {
        result(i, j) += mixing(i, r) * mixing(j, r) / static_cast<double>(r + 1);
      }
    }
  }
  for (std::size_t i = 0; i < n; ++i) result(i, i) += floor * (1 + random.uniform());
  return result;
}

Matrix inverse_of(const Matrix& matrix) {
  Matrix identity(matrix.rows, matrix.rows);
  for (std::size_t i = 0; i < matrix.rows; ++i) identity(i, i) = 1;
  Matrix result = reference::solve(matrix, identity);
  for (std::size_t i = 0; i < matrix.rows; ++i) {
    for (std::size_t j = 0; j < i; ++j) result(i, j) = result(j, i);
  }
  return result;
}

Matrix random_weights(std::size_t n, std::size_t outputs, std::uint64_t seed) {
  Random random(seed);
  Matrix result(n, outputs);
  for (double& value : result.values) value = random.normal();
  return result;
}

TestTensor tensor(const Matrix& matrix, DType dtype = DType::f64, const Layout& layout = {}) {
  TestTensor result(
      dtype, {static_cast<std::int64_t>(matrix.rows), static_cast<std::int64_t>(matrix.columns)},
      layout);
  result.fill([&](std::int64_t i) { return matrix.values[static_cast<std::size_t>(i)]; });
  return result;
}

TestTensor small(std::initializer_list<double> values, std::int64_t rows) {
  TestTensor result(DType::f64, {rows, static_cast<std::int64_t>(values.size()) / rows});
  result.fill([&](std::int64_t i) { return *(values.begin() + i); });
  return result;
}

Matrix matrix_of(const TestTensor& tensor) {
  const Dims& shape = tensor.view().shape;
  Matrix result(static_cast<std::size_t>(shape[0]), static_cast<std::size_t>(shape[1]));
  for (std::size_t i = 0; i < result.values.size(); ++i) {
    result.values[i] = tensor.get(static_cast<std::int64_t>(i));
  }
  return result;
}

void check(const TestTensor& inverse, const TestTensor& weights, std::int64_t count) {
  const auto mine = eliminate(inverse, weights, count);
  const auto wanted =
      reference::eliminate(matrix_of(inverse), matrix_of(weights), static_cast<std::size_t>(count));
  EXPECT_EQ(mine.order, wanted.order);
  ASSERT_EQ(mine.costs.size(), wanted.costs.size());
  for (std::size_t i = 0; i < mine.costs.size(); ++i) {
    EXPECT_NEAR(mine.costs[i], wanted.costs[i], 1e-10 * wanted.costs[i]) << i;
  }
}

TEST(Eliminate, EverySize) {
  for (const std::int64_t n : sizes()) {
    const auto size = static_cast<std::size_t>(n);
    const TestTensor inverse = tensor(inverse_of(covariance(size, 1)));
    for (const std::size_t outputs : {1, 3, 17}) {
      SCOPED_TRACE(testing::Message() << n << " inputs, " << outputs << " outputs");
      check(inverse, tensor(random_weights(size, outputs, 2)), n);
    }
  }
  // More outputs than inputs, several blocks of rows.
  check(tensor(inverse_of(covariance(70, 3))), tensor(random_weights(70, 300, 4)), 70);
}

TEST(Eliminate, FewerIsAPrefix) {
  const TestTensor inverse = tensor(inverse_of(covariance(150, 5)));
  const TestTensor weights = tensor(random_weights(150, 5, 6));
  const Elimination all = eliminate(inverse, weights, 150);
  Indices sorted = all.order;
  std::sort(sorted.begin(), sorted.end());
  for (std::int64_t i = 0; i < 150; ++i) EXPECT_EQ(sorted[static_cast<std::size_t>(i)], i);
  for (const std::int64_t count : {0, 1, 63, 64, 65, 128, 129, 149}) {
    const Elimination some = eliminate(inverse, weights, count);
    EXPECT_EQ(some.order, Indices(all.order.begin(), all.order.begin() + count));
    EXPECT_EQ(some.costs, std::vector<double>(all.costs.begin(), all.costs.begin() + count));
  }
}

TEST(Eliminate, EveryDTypeAndLayoutAndNothingIsWritten) {
  const Layout layouts[] = {{}, {{1, 0}}, {{1, 0}, 2, {0, 1}}, {{0, 1}, 3, {1}}};
  Matrix strong = covariance(40, 7);
  for (std::size_t i = 0; i < 40; ++i) strong(i, i) += 8;  // stays definite in 8 bits
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : layouts) {
      const TestTensor inverse = tensor(inverse_of(strong), dtype, layout);
      const TestTensor weights = tensor(random_weights(40, 5, 8), dtype, layout);
      const std::vector<char> inverse_before = inverse.memory(), weights_before = weights.memory();
      check(inverse, weights, 40);
      EXPECT_EQ(inverse.memory(), inverse_before);
      EXPECT_EQ(weights.memory(), weights_before);
      const Elimination mine = eliminate(inverse, weights, 40);
      const Elimination plain =
          eliminate(tensor(matrix_of(inverse)), tensor(matrix_of(weights)), 40);
      EXPECT_EQ(mine.order, plain.order);
      EXPECT_EQ(mine.costs, plain.costs);
    }
  }
}

TEST(Eliminate, CostsSumToTheLeastSquaresError) {
  constexpr std::size_t kInputs = 90, kOutputs = 4;
  const Matrix c = covariance(kInputs, 9), w = random_weights(kInputs, kOutputs, 10);
  const Elimination mine = eliminate(tensor(inverse_of(c)), tensor(w), kInputs);
  double sum = 0;
  for (std::size_t removed = 1; removed <= kInputs; ++removed) {
    sum += mine.costs[removed - 1];
    if (removed % 10 != 0 && removed != kInputs && removed != 1) continue;
    std::vector<std::size_t> kept(mine.order.begin() + static_cast<std::ptrdiff_t>(removed),
                                  mine.order.end());
    Matrix normal(kept.size(), kept.size()), right(kept.size(), kOutputs);
    for (std::size_t i = 0; i < kept.size(); ++i) {
      for (std::size_t j = 0; j < kept.size(); ++j) normal(i, j) = c(kept[i], kept[j]);
      for (std::size_t j = 0; j < kInputs; ++j) {
        for (std::size_t o = 0; o < kOutputs; ++o) right(i, o) += c(kept[i], j) * w(j, o);
      }
    }
    const Matrix solved = reference::solve(normal, right);
    Matrix apart = w;
    for (std::size_t i = 0; i < kept.size(); ++i) {
      for (std::size_t o = 0; o < kOutputs; ++o) apart(kept[i], o) -= solved(i, o);
    }
    long double error = 0;
    for (std::size_t i = 0; i < kInputs; ++i) {
      for (std::size_t j = 0; j < kInputs; ++j) {
        for (std::size_t o = 0; o < kOutputs; ++o) error += apart(i, o) * c(i, j) * apart(j, o);
      }
    }
    EXPECT_NEAR(sum, static_cast<double>(error), 1e-10 * static_cast<double>(error)) << removed;
  }
}

TEST(Eliminate, TiesGoToTheLowerIndex) {
  // Independent inputs that all cost the same: nothing changes the others.
  Matrix identity(100, 100), ones(100, 2);
  for (std::size_t i = 0; i < 100; ++i) identity(i, i) = 3;
  std::fill(ones.values.begin(), ones.values.end(), 0.7);
  Indices ascending(100);
  for (std::size_t i = 0; i < 100; ++i) ascending[i] = static_cast<std::int64_t>(i);
  EXPECT_EQ(eliminate(tensor(identity), tensor(ones), 100).order, ascending);

  // Input i + 70 repeats input i (the ridge tells them apart), with the same weights: of each pair
  // the first leaves first, whatever has left and moved before.
  Matrix c = covariance(70, 11), twice(140, 140), w = random_weights(70, 3, 12), both(140, 3);
  for (std::size_t i = 0; i < 140; ++i) {
    for (std::size_t j = 0; j < 140; ++j) twice(i, j) = c(i % 70, j % 70);
    twice(i, i) += 0.01;
    for (std::size_t o = 0; o < 3; ++o) both(i, o) = w(i % 70, o);
  }
  // The inverse as exact in its symmetry as the matrix: (P + Q, P - Q) / 2 of blocks.
  Matrix sum = c, difference(70, 70);
  for (std::size_t i = 0; i < 70; ++i) {
    for (std::size_t j = 0; j < 70; ++j) sum(i, j) *= 2;
    sum(i, i) += 0.01;
  }
  const Matrix p = inverse_of(sum);
  Matrix inverse(140, 140);
  for (std::size_t i = 0; i < 140; ++i) {
    for (std::size_t j = 0; j < 140; ++j) {
      const double q = i % 70 == j % 70 ? 100 : 0;
      inverse(i, j) = (p(i % 70, j % 70) + (i / 70 == j / 70 ? q : -q)) / 2;
    }
  }
  const Indices order = eliminate(tensor(inverse), tensor(both), 140).order;
  for (std::int64_t i = 0; i < 70; ++i) {
    const auto first = std::find(order.begin(), order.end(), i);
    const auto second = std::find(order.begin(), order.end(), i + 70);
    EXPECT_LT(first - order.begin(), second - order.begin()) << i;
  }
}

TEST(Eliminate, ZeroWeightsCostNothingAndGoFirst) {
  Matrix w = random_weights(90, 4, 13);
  const Indices silent{3, 17, 40, 41, 89};
  for (const std::int64_t i : silent) {
    for (std::size_t o = 0; o < 4; ++o) w(static_cast<std::size_t>(i), o) = 0;
  }
  const TestTensor inverse = tensor(inverse_of(covariance(90, 14)));
  const Elimination mine = eliminate(inverse, tensor(w), 90);
  EXPECT_EQ(Indices(mine.order.begin(), mine.order.begin() + 5), silent);
  for (std::size_t i = 0; i < 5; ++i) EXPECT_EQ(mine.costs[i], 0);
  EXPECT_GT(mine.costs[5], 0);

  const Elimination none = eliminate(inverse, tensor(Matrix(90, 4)), 90);
  for (std::size_t i = 0; i < 90; ++i) {
    EXPECT_EQ(none.order[i], static_cast<std::int64_t>(i));
    EXPECT_EQ(none.costs[i], 0);
  }
}

TEST(Eliminate, SameBitsForAnyNumberOfThreads) {
  const TestTensor inverse = tensor(inverse_of(covariance(200, 15)));
  const TestTensor weights = tensor(random_weights(200, 17, 16));
  const Threads one(1);
  const Elimination wanted = eliminate(inverse, weights, 200);
  for (const int threads : {2, 3}) {
    const Threads several(threads);
    const Elimination mine = eliminate(inverse, weights, 200);
    EXPECT_EQ(mine.order, wanted.order);
    EXPECT_EQ(mine.costs, wanted.costs);
  }
}

TEST(Eliminate, UnitsOfTheInputsDoNotMatter) {
  Matrix inverse = inverse_of(covariance(80, 17)), w = random_weights(80, 3, 18);
  const Elimination wanted = eliminate(tensor(inverse), tensor(w), 80);
  const int powers[] = {0, 300, -300, 7, -450, 450};
  for (std::size_t i = 0; i < 80; ++i) {
    for (std::size_t j = 0; j < 80; ++j) {
      inverse(i, j) = std::ldexp(inverse(i, j), powers[i % 6] + powers[j % 6]);
    }
    for (std::size_t o = 0; o < 3; ++o) w(i, o) = std::ldexp(w(i, o), powers[i % 6] - 40);
  }
  const Elimination mine = eliminate(tensor(inverse), tensor(w), 80);
  EXPECT_EQ(mine.order, wanted.order);
  for (std::size_t i = 0; i < 80; ++i) EXPECT_EQ(mine.costs[i], std::ldexp(wanted.costs[i], -80));
}

TEST(Eliminate, SubnormalInputs) {
  // Costs of 1e-620 are 0; weights that small leave the order to the index.
  const Elimination weak =
      eliminate(small({1, 0, 0, 0, 1, 0, 0, 0, 1}, 3), small({1e-310, 2e-310, 5e-324}, 3), 3);
  for (const double cost : weak.costs) EXPECT_EQ(cost, 0);
  // Costs of 1e310 do not fit; with weights to match they do, whatever the unit of C⁻¹.
  const TestTensor tiny = small({1e-310, 0, 0, 0, 2e-310, 0, 0, 0, 1e-310}, 3);
  const Elimination mine = eliminate(tiny, small({2e-155, 3e-155, 1e-155}, 3), 3);
  EXPECT_EQ(mine.order, (Indices{2, 0, 1}));
  EXPECT_NEAR(mine.costs[0], 1, 1e-9);
  EXPECT_NEAR(mine.costs[1], 4, 1e-9);
  EXPECT_NEAR(mine.costs[2], 4.5, 1e-9);
}

TEST(Eliminate, NearlyDependentInputs) {
  // Rank 31 over a ridge of 1e-8: diagonals fall by eight digits, and costs keep what is left.
  const Matrix c = covariance(90, 19, 1e-8);
  const TestTensor inverse = tensor(inverse_of(c)), weights = tensor(random_weights(90, 2, 20));
  const Elimination mine = eliminate(inverse, weights, 90);
  const auto wanted = reference::eliminate(matrix_of(inverse), matrix_of(weights), 90);
  EXPECT_EQ(mine.order, wanted.order);
  for (std::size_t i = 0; i < 90; ++i) {
    EXPECT_NEAR(mine.costs[i], wanted.costs[i], 1e-5 * wanted.costs[i]) << i;
  }
}

TEST(Eliminate, InputsThatTurnCheap) {
  // Of each pair the second costs more than all first ones, and next to nothing once its partner
  // has left: who leaves next cannot be foreseen.
  constexpr std::size_t kPairs = 150;
  Matrix inverse(2 * kPairs, 2 * kPairs), w(2 * kPairs, 1);
  for (std::size_t i = 0; i < kPairs; ++i) {
    const std::size_t j = i + kPairs;
    const double ratio = std::sqrt(1.1 + 0.0003 * static_cast<double>(i));
    w(i, 0) = std::sqrt(1 + 0.0003 * static_cast<double>(i));
    w(j, 0) = ratio * w(i, 0);
    inverse(i, i) = inverse(j, j) = 1;
    inverse(i, j) = inverse(j, i) = 1 / ratio;
  }
  check(tensor(inverse), tensor(w), 2 * kPairs);
  const Indices order = eliminate(tensor(inverse), tensor(w), 2 * kPairs).order;
  for (std::size_t i = 0; i < order.size(); ++i) {
    EXPECT_EQ(order[i], static_cast<std::int64_t>(i / 2 + i % 2 * kPairs));
  }
}

TEST(Eliminate, RefusesWhatRoundingOrTheMatrixLost) {
  const TestTensor w = small({1, 2}, 2);
  const std::string text =
      "inverse: expected a matrix that stays positive definite, got a diagonal lost to rounding at "
      "input 1 when input 0 is removed";
  for (const double off : {1.0, 2.0, -1e300}) {
    const TestTensor inverse = small({1, off, off, 1}, 2);
    expect_error<NumericalError>([&] { eliminate(inverse, w, 2); }, text);
    EXPECT_EQ(eliminate(inverse, w, 1).order, Indices{0});
  }
  expect_error<NumericalError>([] { eliminate(small({1}, 1), small({1e200}, 1), 1); },
                               "weights: expected costs that fit into float64, got inf");
}

TEST(Eliminate, Refuses) {
  const TestTensor inverse = small({2, 1, 1, 2}, 2), w = small({1, 2, 3, 4, 5, 6}, 2);
  const auto refused = [&](const TensorView& a, const TensorView& b, std::int64_t count,
                           const std::string& text) {
    expect_error<InvalidArgument>([&] { eliminate(a, b, count); }, text);
  };
  refused(TestTensor(DType::f64, {2}), w, 1, "inverse: expected shape (n, n), n >= 1, got (2,)");
  refused(TestTensor(DType::f64, {2, 3}), w, 1,
          "inverse: expected shape (n, n), n >= 1, got (2, 3)");
  refused(TestTensor(DType::f64, {0, 0}), w, 0,
          "inverse: expected shape (n, n), n >= 1, got (0, 0)");
  refused(inverse, TestTensor(DType::f64, {3, 2}), 1,
          "weights: expected shape (2, outputs), outputs >= 1, got (3, 2)");
  refused(inverse, TestTensor(DType::f64, {2}), 1,
          "weights: expected shape (2, outputs), outputs >= 1, got (2,)");
  refused(inverse, TestTensor(DType::f64, {2, 0}), 1,
          "weights: expected shape (2, outputs), outputs >= 1, got (2, 0)");
  refused(inverse, w, -1, "count: expected 0 to 2, got -1");
  refused(inverse, w, 3, "count: expected 0 to 2, got 3");
  refused(small({2, 0, 0, -1}, 2), w, 0,
          "inverse: expected a diagonal above 0, got -1 at (row 1, column 1)");
  refused(small({0, 0, 0, 1}, 2), w, 0,
          "inverse: expected a diagonal above 0, got 0 at (row 0, column 0)");
  refused(small({2, 1, 1.5, 2}, 2), w, 0,
          "inverse: expected a symmetric matrix, got 1 at (row 0, column 1) and 1.5 at (row 1, "
          "column 0)");
  for (const double bad : {kNaN, kInf, -kInf}) {
    const std::string got = bad > 0 ? "inf" : bad < 0 ? "-inf" : "nan";
    for (std::size_t place = 0; place < 4; ++place) {
      TestTensor broken = small({2, 1, 1, 2}, 2);
      broken.set(static_cast<std::int64_t>(place), bad);
      expect_error<NumericalError>([&] { eliminate(broken, w, 0); },
                                   "inverse: expected finite values, got " + got + " at (row " +
                                       std::to_string(place / 2) + ", column " +
                                       std::to_string(place % 2) + ")");
    }
    TestTensor broken = small({1, 2, 3, 4, 5, 6}, 2);
    broken.set(4, bad);
    expect_error<NumericalError>(
        [&] { eliminate(inverse, broken, 0); },
        "weights: expected finite values, got " + got + " at (input 1, output 1)");
  }
  TensorView elsewhere = inverse;
  elsewhere.device = {secateur::DeviceType::cuda, 0};
  expect_error<Unsupported>([&] { eliminate(elsewhere, w, 1); },
                            "inverse: expected a tensor on the CPU, got one on cuda:0");

  // Faults far apart are found: the first in row-major order is named.
  Matrix large = inverse_of(covariance(70, 21));
  large(60, 2) += 1;
  large(3, 69) += 1;
  try {
    eliminate(tensor(large), tensor(random_weights(70, 1, 22)), 0);
    FAIL() << "no exception";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find(" at (row 2, column 60) and "), std::string::npos);
  }
}

TEST(Eliminate, TakesAsymmetryOfRounding) {
  const TestTensor inverse = tensor(inverse_of(covariance(40, 23)));
  TestTensor rounded = tensor(matrix_of(inverse));
  for (std::int64_t i = 0; i < 40; ++i) {
    for (std::int64_t j = 0; j < i; ++j) {
      rounded.set(i * 40 + j, rounded.get(i * 40 + j) * (1 + 1e-9));
    }
  }
  const TestTensor weights = tensor(random_weights(40, 3, 24));
  EXPECT_EQ(eliminate(rounded, weights, 40).order, eliminate(inverse, weights, 40).order);
}

// No column's factor has to fit into a number.
TEST(Eliminate, DiagonalsFarApart) {
  const auto diagonal = [](std::vector<double> values) {
    TestTensor matrix(DType::f64, {static_cast<std::int64_t>(values.size()),
                                   static_cast<std::int64_t>(values.size())});
    matrix.fill([](std::int64_t) { return 0.0; });
    for (std::size_t i = 0; i < values.size(); ++i) matrix.set(i * (values.size() + 1), values[i]);
    return matrix;
  };
  const auto weights_of = [](std::vector<double> values) {
    TestTensor weights(DType::f64, {static_cast<std::int64_t>(values.size()), 1});
    for (std::size_t i = 0; i < values.size(); ++i) weights.set(i, values[i]);
    return weights;
  };
  const auto lost = eliminate(diagonal({1e180, 1e-180}), weights_of({1e-180, 0}), 2);
  EXPECT_EQ(lost.order, (std::vector<std::int64_t>{1, 0}));
  EXPECT_EQ(lost.costs, (std::vector<double>{0, 0}));
  const auto some = eliminate(diagonal({1e300, 1e-300, 1}), weights_of({1e100, 1e-200, 1e-60}), 3);
  EXPECT_EQ(some.order, (std::vector<std::int64_t>{2, 0, 1}));
  EXPECT_NEAR(some.costs[0] / 1e-120, 1, 1e-12);
  EXPECT_NEAR(some.costs[1] / 1e-100, 1, 1e-12);
  EXPECT_NEAR(some.costs[2] / 1e-100, 1, 1e-12);
}

TEST(Eliminate, StridesOfSingleElementsDoNotMatter) {
  constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
  const double one = 2, weight = 3;
  const TensorView inverse(&one, DType::f64, {1, 1}, {kAny, kAny});
  const TensorView weights(&weight, DType::f64, {1, 1}, {kAny, kAny});
  EXPECT_EQ(eliminate(inverse, weights, 1).costs, std::vector<double>{4.5});
}

}  // namespace
