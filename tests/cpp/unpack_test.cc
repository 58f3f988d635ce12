#include <vector>

#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::InvalidArgument;
using secateur::unpack;

TEST(Unpack, BothTrianglesOverTheDivisor) {
  Random random(1);
  for (const std::int64_t n : {1, 2, 3, 8, 63, 64, 65, 131}) {
    const std::int64_t matrices = 3, size = n * (n + 1) / 2;
    TestTensor packed(DType::f64, {matrices, size});
    packed.fill([&](std::int64_t) { return random.uniform() - 0.5; });
    TestTensor out(DType::f64, {matrices, n, n});
    out.fill([](std::int64_t) { return kNaN; });
    unpack(packed, out.view(), 7.0);
    std::int64_t at = 0;
    for (std::int64_t m = 0; m < matrices; ++m) {
      for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = i; j < n; ++j, ++at) {
          const double wanted = packed.get(at) / 7.0;
          ASSERT_EQ(out.get((m * n + i) * n + j), wanted) << n << " " << i << " " << j;
          ASSERT_EQ(out.get((m * n + j) * n + i), wanted) << n << " " << i << " " << j;
        }
      }
    }
  }
}

TEST(Unpack, Refuses) {
  TestTensor packed(DType::f64, {2, 6}), out(DType::f64, {2, 3, 3});
  out.fill([](std::int64_t) { return 5.0; });
  const auto refused = [&](const TensorView& from, const MutableTensorView& to, double divisor,
                           const std::string& text) {
    expect_error<InvalidArgument>([&] { unpack(from, to, divisor); }, text);
  };
  const MutableTensorView good = out.view();
  refused(TestTensor(DType::f64, {2, 5}), good, 1,
          "packed: expected shape (..., n(n+1)/2), got (2, 5)");
  refused(TestTensor(DType::f32, {2, 6}), good, 1, "packed: expected float64, got float32");
  refused(TestTensor(DType::f64, {2, 6}, Layout{{1, 0}}), good, 1,
          "packed: expected contiguous memory, got strides (1, 2)");
  for (const Dims& shape : {Dims{3, 3}, Dims{2, 3, 2}, Dims{1, 3, 3}}) {
    TestTensor other(DType::f64, shape);
    refused(packed, other.view(), 1,
            "out: expected the leading sizes of packed, then n twice (n = 3), got " +
                secateur::to_string(shape));
  }
  for (const double divisor : {0.0, -1.0, kNaN, kInf}) {
    EXPECT_THROW(unpack(packed, good, divisor), InvalidArgument);
  }
  for (std::int64_t i = 0; i < 18; ++i) EXPECT_EQ(out.get(i), 5.0);
}

TEST(Unpack, NothingOfNothing) {
  for (const Dims& leading : {Dims{}, Dims{3}, Dims{0}, Dims{2, 0}}) {
    std::vector<std::int64_t> from(leading.begin(), leading.end()), to = from;
    from.push_back(0);
    to.insert(to.end(), {0, 0});
    unpack({nullptr, DType::f64, Dims(from)}, {nullptr, DType::f64, Dims(to)}, 1);
  }
  TestTensor packed(DType::f64, {0, 6}), out(DType::f64, {0, 3, 3});
  unpack(packed, out.view());
  expect_error<InvalidArgument>(
      [&] { unpack({nullptr, DType::f64, {0}}, {nullptr, DType::f64, {0, 1}}, 1); },
      "out: expected the leading sizes of packed, then n twice (n = 0), got (0, 1)");
  expect_error<InvalidArgument>(
      [&] { unpack({nullptr, DType::f64, {0}}, {nullptr, DType::f64, {0, 0}}, 0); },
      "divisor: expected a finite number above 0, got 0");
}

/// Views of no elements may have any size.
TEST(Unpack, SizesNearTheLargest) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  const auto call = [](std::int64_t size, std::int64_t n) {
    // Strides of its own: row-major ones would not fit.
    unpack({nullptr, DType::f64, {0, size}}, {nullptr, DType::f64, {0, n, n}, {0, 0, 0}}, 1);
  };
  // n(n+1) is beyond 2^63 from 3037000499 on; 4294967295 is the last n of all.
  for (const std::int64_t n : {94906265LL, 94906266LL, 134217728LL, 3037000499LL, 3037000500LL,
                               4294967294LL, 4294967295LL}) {
    const std::int64_t size = n % 2 == 0 ? n / 2 * (n + 1) : (n + 1) / 2 * n;
    call(size, n);
    for (const std::int64_t other : {size - 1, size + 1}) {
      expect_error<InvalidArgument>(
          [&] { call(other, n); },
          "packed: expected shape (..., n(n+1)/2), got (0, " + std::to_string(other) + ")");
    }
  }
  expect_error<InvalidArgument>(
      [&] { call(kMost, 4294967295); },
      "packed: expected shape (..., n(n+1)/2), got (0, 9223372036854775807)");
}

TEST(Unpack, RefusesMemoryThatOverlaps) {
  // Two matrices: 12 elements of packed, 18 of out.
  std::vector<double> memory;
  while (memory.size() < 60) memory.push_back(static_cast<double>(memory.size()));
  const std::vector<double> before = memory;
  const TensorView packed(memory.data() + 20, DType::f64, {2, 6});
  for (const std::size_t place : {3, 19, 20, 21, 31}) {
    expect_error<InvalidArgument>(
        [&] { unpack(packed, {memory.data() + place, DType::f64, {2, 3, 3}}, 1); },
        "out: expected memory apart from that of packed, got memory that overlaps it");
    EXPECT_EQ(memory, before);
  }
  for (const std::size_t place : {2, 32}) {  // right before it, and right behind it
    memory = before;
    unpack(packed, {memory.data() + place, DType::f64, {2, 3, 3}}, 1);
    for (std::size_t i = 20; i < 32; ++i) EXPECT_EQ(memory[i], before[i]);
    EXPECT_EQ(memory[place + 3], 21);
    EXPECT_EQ(memory[place + 17], 31);
  }
}

}  // namespace
