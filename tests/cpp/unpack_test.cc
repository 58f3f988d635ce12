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

}  // namespace
