#include <algorithm>
#include <cstring>

#include "reference.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::InvalidArgument;
using secateur::MomentAccumulator;
using secateur::MomentAccumulatorState;
using secateur::NumericalError;
using secateur::RowNorm;

TestTensor rows(const Dims& shape, std::uint64_t seed, DType dtype, const Layout& layout = {},
                double scale = 1) {
  TestTensor x(dtype, shape, layout);
  Random random(seed);
  x.fill([&](std::int64_t) { return scale * (random.normal() + 0.5); });
  return x;
}

/// Compares with the sums in long double. tolerance: relative to Σ|x_i x_j|; sum_tolerance: to
/// Σ|x_i|.
void check(const MomentAccumulator& moments, const TestTensor& x, double tolerance,
           double sum_tolerance = 1e-14) {
  const std::int64_t dim = x.view().shape[x.view().rank() - 1], count = x.view().numel() / dim;
  ASSERT_EQ(moments.rows(), count);
  const std::vector<double> second = moments.second_moment();
  ASSERT_EQ(second.size(), static_cast<std::size_t>(dim * dim));
  // Column by column: to read an element of a layout takes longer than to use it.
  std::vector<double> values;
  for (std::int64_t i = 0; i < dim; ++i) {
    for (std::int64_t r = 0; r < count; ++r) values.push_back(x.get(r * dim + i));
  }
  for (std::int64_t i = 0; i < dim; ++i) {
    const double* const column = values.data() + i * count;
    long double sum = 0, size = 0;
    for (std::int64_t r = 0; r < count; ++r) {
      sum += column[r];
      size += std::fabs(column[r]);
    }
    EXPECT_NEAR(moments.sum()[static_cast<std::size_t>(i)], static_cast<double>(sum),
                sum_tolerance * static_cast<double>(size));
    for (std::int64_t j = 0; j <= i; ++j) {
      const double* const other = values.data() + j * count;
      long double product = 0, magnitude = 0;
      for (std::int64_t r = 0; r < count; ++r) {
        const long double term = static_cast<long double>(column[r]) * other[r];
        product += term;
        magnitude += std::fabs(term);
      }
      for (const std::int64_t place : {i * dim + j, j * dim + i}) {
        EXPECT_NEAR(second[static_cast<std::size_t>(place)], static_cast<double>(product),
                    tolerance * static_cast<double>(magnitude))
            << i << " " << j << " of " << dim;
      }
    }
  }
}

void expect_same(const MomentAccumulatorState& a, const MomentAccumulatorState& b) {
  EXPECT_EQ(a.rows, b.rows);
  EXPECT_EQ(a.sum, b.sum);
  EXPECT_EQ(a.second_moment, b.second_moment);
}

double tolerance(DType dtype) { return dtype == DType::f64 ? 1e-14 : 2e-6; }

TEST(MomentAccumulator, EverySizeAndDType) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t dim : kSizes) {
      for (const std::int64_t count : {1, 17, 40}) {
        const TestTensor x = rows({count, dim}, 1, dtype);
        MomentAccumulator moments(dim);
        moments.update(x);
        check(moments, x, tolerance(dtype));
      }
    }
  }
}

// Several blocks of rows, several groups of panels.
TEST(MomentAccumulator, ManyRowsAndColumns) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const std::int64_t count : {255, 256, 257, 4096, 4097, 9000}) {
      const TestTensor x = rows({count, 5}, 2, dtype);
      MomentAccumulator moments(5);
      moments.update(x);
      check(moments, x, tolerance(dtype));
    }
    const TestTensor wide = rows({3, 290}, 3, dtype);
    MomentAccumulator moments(290);
    moments.update(wide);
    check(moments, wide, tolerance(dtype));
  }
}

TEST(MomentAccumulator, EveryRankAndLayout) {
  for (const DType dtype : kDTypes) {
    const std::vector<std::pair<Dims, Layout>> cases{
        {{9}, {{}, 2, {0}}},
        {{6, 9}, {{1, 0}, 1, {}}},
        {{2, 3, 9}, {{2, 0, 1}, 2, {1}}},
        {{2, 3, 2, 9}, {{}, 3, {0, 3}}},
    };
    for (const auto& [shape, layout] : cases) {
      const TestTensor x = rows(shape, 4, dtype, layout);
      MomentAccumulator moments(9);
      moments.update(x);
      check(moments, x, tolerance(dtype));
    }
  }
}

// Every 16-bit pattern is read as what it means.
TEST(MomentAccumulator, ReadsEveryHalfAndBFloat) {
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (std::uint32_t first = 0; first < 65536; first += 16) {
      std::uint16_t bits[16];
      double values[16];
      bool finite = true;
      for (std::uint32_t i = 0; i < 16; ++i) {
        bits[i] = static_cast<std::uint16_t>(first + i);
        values[i] = decode(dtype, reinterpret_cast<const char*>(bits + i));
        finite = finite && std::isfinite(values[i]);
      }
      MomentAccumulator moments(16);
      const TensorView view(bits, dtype, {1, 16});
      if (!finite) {
        EXPECT_THROW(moments.update(view), NumericalError) << first;
        continue;
      }
      moments.update(view);
      for (std::size_t i = 0; i < 16; ++i) ASSERT_EQ(moments.sum()[i], values[i]) << first + i;
    }
  }
}

/// x with every row as RMSNorm or LayerNorm without weights and eps leaves it, in long double.
TestTensor normalised(const TestTensor& x, bool center) {
  const std::int64_t dim = x.view().shape[x.view().rank() - 1];
  TestTensor result(DType::f64, x.view().shape);
  for (std::int64_t r = 0; r < x.view().numel() / dim; ++r) {
    long double mean = 0, square = 0;
    for (std::int64_t i = 0; i < dim && center; ++i) mean += x.get(r * dim + i);
    mean /= static_cast<long double>(dim);
    for (std::int64_t i = 0; i < dim; ++i) {
      square += (x.get(r * dim + i) - mean) * (x.get(r * dim + i) - mean);
    }
    for (std::int64_t i = 0; i < dim; ++i) {
      const long double value = x.get(r * dim + i) - mean;
      result.set(r * dim + i, square > 0
                                  ? static_cast<double>(
                                        value * std::sqrt(static_cast<long double>(dim) / square))
                                  : 0);
    }
  }
  return result;
}

TEST(MomentAccumulator, NormalisesRows) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t dim : kSizes) {
      // An offset that the mean must take away; more rows than a block; channels not adjacent.
      for (const Layout& layout : {Layout{}, Layout{{1, 0}, 2, {}}}) {
        TestTensor x = rows({300, dim}, 13, dtype, layout);
        for (std::int64_t i = 0; i < x.view().numel(); ++i) x.set(i, x.get(i) + 3);
        for (std::int64_t i = 0; i < dim; ++i) x.set(7 * dim + i, 0);
        for (const RowNorm norm : {RowNorm::rms, RowNorm::layer}) {
          if (norm == RowNorm::layer && dim == 1) continue;
          MomentAccumulator moments(dim);
          moments.update(x, {norm});
          check(moments, normalised(x, norm == RowNorm::layer), dtype == DType::f64 ? 1e-13 : 4e-6,
                dtype == DType::f64 ? 1e-13 : 1e-6);
        }
      }
    }
  }
}

// Rows of 1e-30 beside rows of 1e30 all count alike; several chunks of rows.
TEST(MomentAccumulator, NormalisedRowsHaveNoScale) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    TestTensor x = rows({4100, 5}, 14, dtype);
    for (std::int64_t i = 0; i < x.view().numel(); ++i) {
      x.set(i, x.get(i) * (i / 5 % 2 == 0 ? 1e-30 : 1e30));
    }
    MomentAccumulator moments(5);
    moments.update(x, {RowNorm::layer});
    check(moments, normalised(x, true), 4e-6, 1e-6);
    double trace = 0;
    for (std::size_t i = 0; i < 25; i += 6) trace += moments.second_moment()[i];
    EXPECT_NEAR(trace, 4100.0 * 5, 0.05);
  }
}

// Magnitudes whose squares overflow or vanish, and rows that are nothing but their mean.
TEST(MomentAccumulator, NormsOfExtremeRows) {
  for (const double scale : {1e-300, 1e-165, 1e-155, 1e100}) {
    const TestTensor x = rows({30, 9}, 17, DType::f64, {}, scale);
    for (const RowNorm norm : {RowNorm::rms, RowNorm::layer}) {
      MomentAccumulator moments(9);
      moments.update(x, {norm});
      check(moments, normalised(rows({30, 9}, 17, DType::f64), norm == RowNorm::layer), 1e-12,
            1e-12);
    }
  }
  for (const DType dtype : kDTypes) {
    for (const std::int64_t dim : {7, 93}) {
      TestTensor x(dtype, {5, dim});
      x.fill([](std::int64_t) { return 1.0 / 3; });
      MomentAccumulator moments(dim);
      moments.update(x, {RowNorm::layer});
      for (const double value : moments.second_moment()) EXPECT_EQ(value, 0);
      EXPECT_EQ(moments.rows(), 5);
    }
  }
  TestTensor huge(DType::f64, {2, 3});
  huge.fill([](std::int64_t i) { return i == 4 ? 1e130 : 1; });
  for (const RowNorm norm : {RowNorm::none, RowNorm::rms, RowNorm::layer}) {
    MomentAccumulator moments(3);
    expect_error<NumericalError>([&] { moments.update(huge, {norm}); },
                                 "x: expected magnitudes up to 1e120, got 1e+130");
    EXPECT_EQ(moments.rows(), 0);
  }
}

// What a stride leaves out may be anything, in one chunk of rows and in several.
TEST(MomentAccumulator, RowsThatAreLeftOutDoNotMatter) {
  for (const std::int64_t tokens : {8, 20000}) {
    TestTensor x = rows({1, tokens, 3}, 18, DType::f32),
               clean = rows({1, tokens, 3}, 18, DType::f32);
    x.set(3 * 3 + 1, kNaN);
    for (const RowNorm norm : {RowNorm::none, RowNorm::layer}) {
      MomentAccumulator moments(3), wanted(3);
      moments.update(x, {norm, 4, 1});
      wanted.update(clean, {norm, 4, 1});
      EXPECT_EQ(moments.rows(), tokens / 4);
      expect_same(moments.state(), wanted.state());
      expect_error<NumericalError>([&] { moments.update(x, {norm, 4, 3}); },
                                   "x: expected finite values, got nan at (0, 3, 1)");
      expect_same(moments.state(), wanted.state());
    }
  }
}

TEST(MomentAccumulator, StrideRotatesOverTokens) {
  const std::int64_t images = 5, tokens = 9, dim = 7;
  const TestTensor x = rows({images, tokens, dim}, 15, DType::f32, {{2, 0, 1}, 1, {}});
  for (const std::int64_t stride : {2, 3, 4, 9, 12}) {
    std::vector<int> seen(static_cast<std::size_t>(images * tokens), 0);
    for (std::int64_t phase = 0; phase < stride; ++phase) {
      std::vector<double> chosen;
      for (std::int64_t b = 0; b < images; ++b) {
        for (std::int64_t n = 0; n < tokens; ++n) {
          if ((n - b - phase) % stride != 0) continue;
          ++seen[static_cast<std::size_t>(b * tokens + n)];
          for (std::int64_t c = 0; c < dim; ++c) {
            chosen.push_back(x.get((b * tokens + n) * dim + c));
          }
        }
      }
      const auto count = static_cast<std::int64_t>(chosen.size()) / dim;
      TestTensor wanted(DType::f32, {count, dim});
      wanted.fill([&](std::int64_t i) { return chosen[static_cast<std::size_t>(i)]; });
      MomentAccumulator moments(dim);
      moments.update(x, {RowNorm::none, stride, phase});
      check(moments, wanted, tolerance(DType::f32));
    }
    EXPECT_EQ(seen, std::vector<int>(seen.size(), 1)) << stride;
  }
  MomentAccumulator moments(dim, "fc2");
  for (const std::int64_t bad : {std::int64_t{0}, std::numeric_limits<std::int64_t>::max()}) {
    expect_error<InvalidArgument>(
        [&] { moments.update(x, {RowNorm::none, bad}); },
        "fc2 stride: expected 1 to 2147483648, got " + std::to_string(bad));
  }
  moments.update(x, {RowNorm::none, std::int64_t{1} << 31, 100});
  EXPECT_EQ(moments.rows(), 0);
  expect_error<InvalidArgument>([&] { moments.update(x, {RowNorm::none, 2, -1}); },
                                "fc2 phase: expected at least 0, got -1");
  expect_error<InvalidArgument>(
      [&] { moments.update(rows({4, 7}, 16, DType::f32), {RowNorm::none, 2}); },
      "fc2 x: expected shape (images, tokens, dim) with a stride, got (4, 7)");
  EXPECT_EQ(moments.rows(), 0);
}

// Magnitudes whose float32 products would overflow or vanish are multiplied in float64.
TEST(MomentAccumulator, ExtremeMagnitudes) {
  for (const double scale : {1e-30, 1e-12, 1e12, 1e30}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
      const TestTensor x = rows({40, 7}, 5, dtype, {}, scale);
      MomentAccumulator moments(7);
      moments.update(x);
      check(moments, x, tolerance(dtype));
    }
  }
}

TEST(MomentAccumulator, SameBitsForAnyThreads) {
  for (const DType dtype : {DType::f32, DType::f64}) {
    const TestTensor x = rows({5000, 150}, 6, dtype);
    MomentAccumulator one(150);
    {
      const Threads set(1);
      one.update(x);
    }
    for (const int threads : {2, 3, 5}) {
      const Threads set(threads);
      MomentAccumulator many(150);
      many.update(x);
      expect_same(many.state(), one.state());
    }
  }
}

TEST(MomentAccumulator, UpdatesAndMergesAddUp) {
  const TestTensor x = rows({10, 6}, 7, DType::f64);
  TensorView head = x, tail = x;
  head.shape = Dims{4, 6};
  tail.shape = Dims{6, 6};
  tail.data = static_cast<const char*>(tail.data) + 4 * 6 * 8;
  MomentAccumulator updates(6), a(6), b(6);
  updates.update(head);
  updates.update(tail);
  check(updates, x, 1e-14);
  a.update(head);
  b.update(tail);
  a.merge(b);
  check(a, x, 1e-14);
  a.merge(a);
  EXPECT_EQ(a.rows(), 20);
  EXPECT_EQ(a.sum()[5], 2 * updates.sum()[5]);
  expect_error<InvalidArgument>([&] { a.merge(MomentAccumulator(7)); },
                                "other: expected dim 6, got 7");
}

TEST(MomentAccumulator, NoRowsAreNoRows) {
  MomentAccumulator moments(3);
  moments.update(TestTensor(DType::f32, {0, 3}));
  EXPECT_EQ(moments.rows(), 0);
}

TEST(MomentAccumulator, StateIsCopiedToMemoryOfTheCallers) {
  MomentAccumulator moments(6);
  const auto check = [&] {
    std::vector<double> sum(6 + 1, -7.0), second(21 + 1, -7.0);
    moments.copy_state(sum.data(), second.data());
    for (std::vector<double>* values : {&sum, &second}) {
      EXPECT_EQ(values->back(), -7.0);
      values->pop_back();
    }
    EXPECT_EQ(sum, moments.state().sum);
    EXPECT_EQ(second, moments.state().second_moment);
  };
  check();
  EXPECT_EQ(moments.state().second_moment, std::vector<double>(21));
  check();
  moments.update(rows({5, 6}, 8, DType::f32));
  check();
  EXPECT_GT(moments.state().second_moment[0], 0);
}

TEST(MomentAccumulator, StateRoundTrip) {
  MomentAccumulator first(6), second(6), straight(6);
  first.update(rows({5, 6}, 8, DType::f32));
  second.load_state(first.state());
  second.update(rows({5, 6}, 9, DType::f32));
  straight.update(rows({5, 6}, 8, DType::f32));
  straight.update(rows({5, 6}, 9, DType::f32));
  expect_same(second.state(), straight.state());

  const MomentAccumulatorState good = second.state();
  const auto state = [&](auto change) {
    MomentAccumulatorState copy = good;
    change(copy);
    return [&second, copy] { second.load_state(copy); };
  };
  using State = MomentAccumulatorState;
  expect_error<InvalidArgument>(state([](State& s) { s.rows = -2; }),
                                "rows: expected at least 0, got -2");
  expect_error<InvalidArgument>(state([](State& s) { s.sum.clear(); }),
                                "sum: expected 6 values, got 0");
  expect_error<InvalidArgument>(state([](State& s) { s.second_moment.pop_back(); }),
                                "second_moment: expected 21 values, got 20");
  expect_error<NumericalError>(state([](State& s) { s.sum[3] = kInf; }),
                               "sum: expected finite values, got inf at 3");
  expect_error<NumericalError>(state([](State& s) { s.second_moment[20] = kNaN; }),
                               "second_moment: expected finite values, got nan at 20");
  expect_same(second.state(), good);
}

TEST(MomentAccumulator, RefusalsLeaveNoTrace) {
  expect_error<InvalidArgument>([] { MomentAccumulator(0); }, "dim: expected 1 to 65536, got 0");
  expect_error<InvalidArgument>([] { MomentAccumulator(65537, "fc1"); },
                                "fc1 dim: expected 1 to 65536, got 65537");
  for (const DType dtype : kDTypes) {
    MomentAccumulator moments(4, "blocks.0.mlp.fc2");
    moments.update(rows({3, 4}, 10, dtype));
    const MomentAccumulatorState before = moments.state();
    for (const double bad : {kNaN, kInf, -kInf}) {
      TestTensor x = rows({2, 3, 4}, 11, dtype);
      x.set(17, bad);
      const std::string text = std::isnan(bad) ? "nan" : bad < 0 ? "-inf" : "inf";
      expect_error<NumericalError>(
          [&] { moments.update(x); },
          "blocks.0.mlp.fc2 x: expected finite values, got " + text + " at (1, 1, 1)");
    }
    // Seen while rows are normalised, and in a batch of several chunks.
    TestTensor tall = rows({4097, 4}, 11, dtype);
    tall.set(4096 * 4 + 2, kNaN);
    for (const RowNorm norm : {RowNorm::none, RowNorm::rms, RowNorm::layer}) {
      expect_error<NumericalError>(
          [&] { moments.update(tall, {norm}); },
          "blocks.0.mlp.fc2 x: expected finite values, got nan at (4096, 2)");
    }
    expect_error<InvalidArgument>([&] { moments.update(rows({4, 3}, 12, dtype)); },
                                  "blocks.0.mlp.fc2 x: expected shape (..., 4), got (4, 3)");
    expect_error<InvalidArgument>([&] { moments.update(rows(Dims{}, 12, dtype)); },
                                  "blocks.0.mlp.fc2 x: expected shape (..., 4), got ()");
    expect_same(moments.state(), before);
  }
  TestTensor huge(DType::f64, {1, 2});
  huge.fill([](std::int64_t) { return 1e121; });
  expect_error<NumericalError>([&] { MomentAccumulator(2).update(huge); },
                               "x: expected magnitudes up to 1e120, got 1e+121");
}

TEST(MomentAccumulatorInTurn, ImagesGoToOneAfterTheOther) {
  const TestTensor x = rows({7, 11, 5}, 301, DType::f64);
  const auto image = [&](std::int64_t i) {
    TensorView view = x;
    view.data = static_cast<const double*>(view.data) + i * view.strides[0];
    view.shape[0] = 1;
    return view;
  };
  for (const std::int64_t stride : {1, 3}) {
    MomentAccumulator first(5), second(5), expected_first(5), expected_second(5);
    MomentAccumulator::update_in_turn({&first, &second}, x,
                                      {{RowNorm::layer, stride, 4}, {RowNorm::layer, stride, 8}});
    for (std::int64_t i = 0; i < 7; ++i) {
      // Of images of its own, an accumulator's i / 2-th.
      auto& one = i % 2 == 0 ? expected_first : expected_second;
      one.update(image(i), {RowNorm::layer, stride, (i % 2 == 0 ? 4 : 8) + i / 2});
    }
    for (const auto& [found, expected] :
         {std::pair{&first, &expected_first}, std::pair{&second, &expected_second}}) {
      found->wait();
      EXPECT_EQ(found->rows(), expected->rows());
      for (std::size_t e = 0; e < 25; ++e) {
        EXPECT_NEAR(found->second_moment()[e], expected->second_moment()[e], 1e-12);
      }
    }
  }
}

// The image is that of the batch, not of those of its accumulator.
TEST(MomentAccumulatorInTurn, NamesTheImageThatIsNotFinite) {
  TestTensor x = rows({6, 5, 4}, 303, DType::f32);
  x.set((3 * 5 + 2) * 4 + 1, kInf);
  for (const RowNorm norm : {RowNorm::none, RowNorm::rms}) {
    MomentAccumulator even(4, "even"), odd(4, "odd");
    expect_error<NumericalError>(
        [&] { MomentAccumulator::update_in_turn({&even, &odd}, x, {{norm}, {norm}}); },
        "odd x: expected finite values, got inf at (3, 2, 1)");
    EXPECT_EQ(even.rows(), 15);
    EXPECT_EQ(odd.rows(), 0);
  }
}

TEST(MomentAccumulatorInTurn, RefusesAccumulatorsThatDoNotFit) {
  const TestTensor x = rows({2, 3, 4}, 302, DType::f64);
  MomentAccumulator first(4, "fc2"), second(4), wide(5);
  using All = std::vector<MomentAccumulator*>;
  using Options = std::vector<secateur::RowOptions>;
  const auto expect = [&](const All& all, const Options& options, const std::string& text) {
    expect_error<InvalidArgument>([&] { MomentAccumulator::update_in_turn(all, x, options); },
                                  text);
    EXPECT_EQ(first.rows(), 0);
  };
  expect({}, {}, "accumulators: expected 1 to 8, got 0");
  expect({&first, &first}, {{}, {}},
         "accumulators: expected different objects, got the same one twice");
  expect({&first, &second}, {{}}, "fc2 options: expected 2, got 1");
  expect({&first, &wide}, {{}, {}}, "x: expected shape (..., 5), got (2, 3, 4)");
  expect({&first, &second}, {{RowNorm::none, 1}, {RowNorm::none, 2}},
         "fc2 options: expected one norm and stride for all, got several");
}

// Tokens that do not count may hold anything; of those that do the place in the batch is named.
TEST(MomentAccumulator, NamesTheTokenThatCountsAndIsNotFinite) {
  MomentAccumulator moments(2), other(2);
  TestTensor x = rows({2, 4, 2}, 1, DType::f32);
  x.set(2, kNaN);  // image 0, token 1
  x.set(5, kNaN);  // image 0, token 2
  const secateur::RowOptions even{RowNorm::none, 2, 0};
  expect_error<NumericalError>([&] { moments.update(x, even); },
                               "x: expected finite values, got nan at (0, 2, 1)");
  x.set(5, 1);
  moments.update(x, even);  // image 1 gives tokens 1 and 3
  x.set(14, kInf);          // image 1, token 3
  x.set(12, kInf);          // image 1, token 2
  expect_error<NumericalError>([&] { moments.update(x, even); },
                               "x: expected finite values, got inf at (1, 3, 0)");
  // Its first image is image 1 of the batch.
  expect_error<NumericalError>(
      [&] { MomentAccumulator::update_in_turn({&moments, &other}, x, {even, even}); },
      "x: expected finite values, got inf at (1, 2, 0)");
  x.set(12, 0);
  MomentAccumulator::update_in_turn({&moments, &other}, x, {even, even});
  EXPECT_EQ(other.rows(), 2);
}

// Squares of one row may be large together, where no element is.
TEST(MomentAccumulator, LargeRowsBesideTokensThatDoNotCount) {
  TestTensor x(DType::f64, {1, 2, 4});
  x.fill([](std::int64_t i) { return i < 4 ? 1e120 : kNaN; });
  MomentAccumulator moments(4);
  moments.update(x, {RowNorm::rms, 2, 0});
  EXPECT_EQ(moments.rows(), 1);
  EXPECT_NEAR(moments.sum()[0], 1, 1e-12);
}

TEST(MomentAccumulator, CountsAndSumsThatDoNotFitAreRefused) {
  MomentAccumulator moments(2, "fc2"), other(2);
  secateur::MomentAccumulatorState state = moments.state();
  state.rows = (std::int64_t{1} << 62) + 1;
  expect_error<InvalidArgument>([&] { moments.load_state(state); },
                                "fc2 rows: expected at most 2^62, got 4611686018427387905");
  state.rows = std::int64_t{1} << 62;
  other.load_state(state);
  moments.update(rows({3, 2}, 1, DType::f32));
  expect_error<InvalidArgument>([&] { moments.merge(other); },
                                "fc2 rows: expected at most 2^62 in all, got 3 and "
                                "4611686018427387904");
  state.rows = 1;
  state.sum = {-1e308, 0};
  other.load_state(state);
  moments.load_state(state);
  expect_error<NumericalError>(
      [&] { moments.merge(other); },
      "fc2 sum: expected sums that fit into float64, got -1e+308 and -1e+308 at 0");
  EXPECT_EQ(moments.rows(), 1);
}

}  // namespace
