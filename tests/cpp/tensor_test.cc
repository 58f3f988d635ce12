#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::InvalidArgument;

TEST(Tensor, RefusesRanks) {
  expect_error<InvalidArgument>([] { Dims({1, 1, 1, 1, 1, 1, 1, 1, 1}); },
                                "shape: expected at most 8 dimensions, got 9");
  expect_error<InvalidArgument>([] { TensorView(nullptr, DType::f32, Dims{2, 3}, Dims{1}); },
                                "strides: expected 2 values, one per dimension, got 1");
}

TEST(Tensor, RefusesMoreElementsThanCanBeCounted) {
  const std::int64_t large = std::int64_t{1} << 32;
  expect_error<InvalidArgument>([&] { TensorView(nullptr, DType::f32, {2, large, large}); },
                                "shape: expected fewer than 2^63 elements, got (2, 4294967296, "
                                "4294967296)");
  const TensorView view(nullptr, DType::f32, {large, large}, {0, 0});
  expect_error<InvalidArgument>([&] { view.numel(); },
                                "shape: expected fewer than 2^63 elements, got (4294967296, "
                                "4294967296)");
  EXPECT_EQ(TensorView(nullptr, DType::f32, {large, large, 0}, {0, 0, 0}).numel(), 0);
}

TEST(Tensor, Contiguity) {
  float x[24] = {};
  EXPECT_EQ(TensorView(x, DType::f32, {2, 3, 4}).strides, (Dims{12, 4, 1}));
  EXPECT_TRUE(TensorView(x, DType::f32, {2, 3, 4}).is_contiguous());
  EXPECT_TRUE(TensorView(x, DType::f32, {2, 1, 4}, {4, 99, 1}).is_contiguous());
  EXPECT_TRUE(TensorView(x, DType::f32, {2, 0, 4}, {7, 7, 7}).is_contiguous());
  EXPECT_FALSE(TensorView(x, DType::f32, {4, 3}, {1, 4}).is_contiguous());
  EXPECT_FALSE(TensorView(x, DType::f32, {3}, {-1}).is_contiguous());
  EXPECT_EQ(TensorView(x, DType::f32, {2, 3, 4}).numel(), 24);
  EXPECT_EQ(TensorView(x, DType::f32, Dims{}).numel(), 1);
}

TEST(Tensor, Text) {
  EXPECT_EQ(secateur::to_string(Dims{}), "()");
  EXPECT_EQ(secateur::to_string(Dims{5}), "(5,)");
  EXPECT_EQ(secateur::to_string(Dims{2, -3}), "(2, -3)");
  EXPECT_STREQ(secateur::name(DType::bf16), "bfloat16");
}

// The checks that every function shares, seen through one of them.
TEST(Tensor, EveryFunctionRefusesBadViews) {
  alignas(8) char memory[64] = {};
  const auto call = [&](const TensorView& view) {
    return [view] { secateur::value_similarity(view); };
  };
  expect_error<secateur::Unsupported>(
      call(TensorView(memory, DType::f32, {2, 2}, secateur::Device{secateur::DeviceType::cuda, 1})),
      "weights: expected a tensor on the CPU, got one on cuda:1");
  expect_error<InvalidArgument>(call(TensorView(memory + 1, DType::f32, {2, 2})),
                                "weights: expected memory aligned to 4 bytes, got an unaligned "
                                "pointer");
  expect_error<InvalidArgument>(call(TensorView(nullptr, DType::f32, {2, 2})),
                                "weights: expected memory, got a null pointer");
  expect_error<InvalidArgument>(call(TensorView(memory, DType::f32, {2, -2})),
                                "weights: expected sizes of at least 0, got (2, -2)");
  TensorView torn(memory, DType::f32, {2, 2});
  torn.strides = Dims{1};
  expect_error<InvalidArgument>(call(torn), "weights: expected one stride per dimension, got (1,)");
}

// The same views through every other function: none may forget to check. In a build with CUDA the
// memory is not the device's, or there is no device.
TEST(Tensor, EveryFunctionRefusesCuda) {
  float memory[4] = {};
  const secateur::Device cuda{secateur::DeviceType::cuda, 0};
  const MutableTensorView matrix(memory, DType::f32, {2, 2}, cuda);
  const TensorView batch(memory, DType::f32, {1, 1, 2, 2}, cuda);
  const TensorView good(memory, DType::f32, {1, 1, 2, 2});
  const std::string got = ": expected a tensor on the CPU, got one on cuda:0";
  using secateur::Unsupported;
  const auto refuses = [](const std::string& argument, const auto& call) {
    if (!secateur::has_cuda()) {
      return expect_error<Unsupported>(
          call,
          argument + ": expected a tensor on the CPU (this build has no CUDA), got one on cuda:0");
    }
    try {
      call();
    } catch (const secateur::Error& error) {
      EXPECT_EQ(std::string(error.what()).rfind(argument + ": expected ", 0), 0u) << error.what();
      return;
    }
    FAIL() << argument;
  };
  secateur::AttentionScorer scorer(2, 2);
  secateur::MomentAccumulator moments(2);
  refuses("q", [&] { scorer.update(batch, good); });
  refuses("k", [&] { scorer.update(good, batch); });
  refuses("x", [&] { moments.update(matrix); });
  expect_error<Unsupported>([&] { secateur::value_similarity_from_moment(matrix); },
                            "moment" + got);
  expect_error<Unsupported>([&] { secateur::select(matrix, 1); }, "scores" + got);
  refuses("tensor", [&] { secateur::compact(matrix, 0, {0}); });
}

}  // namespace
