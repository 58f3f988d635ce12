#include <cstring>

#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::compact;
using secateur::InvalidArgument;
using Keep = std::vector<std::int64_t>;

/// The bytes of every element, in row-major order.
std::vector<std::string> elements(const char* base, const secateur::TensorGeometry& geometry) {
  const auto size = static_cast<std::int64_t>(secateur::item_size(geometry.dtype));
  std::vector<std::string> result;
  for (const auto& index : indices(geometry.shape)) {
    std::int64_t offset = 0;
    for (std::size_t axis = 0; axis < index.size(); ++axis) {
      offset += index[axis] * geometry.strides[axis];
    }
    result.emplace_back(base + offset * size, static_cast<std::size_t>(size));
  }
  return result;
}

std::vector<std::string> kept_elements(const TestTensor& tensor, std::size_t dim,
                                       const Keep& keep) {
  const auto all = elements(static_cast<const char*>(tensor.view().data), tensor.view());
  const auto places = indices(tensor.view().shape);
  std::vector<std::string> result;
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (const std::int64_t k : keep) {
      if (places[i][dim] == k) result.push_back(all[i]);
    }
  }
  return result;
}

/// Compacts every axis of the tensor by several keep lists and compares with a plain gather.
void check_all(DType dtype, const Dims& shape, const Layout& layout) {
  Random random(7);
  for (std::size_t dim = 0; dim < shape.size(); ++dim) {
    const std::int64_t size = shape[dim];
    Keep all, odd, some;
    for (std::int64_t i = 0; i < size; ++i) {
      all.push_back(i);
      if (i % 2 == 1) odd.push_back(i);
      if (random.uniform() < 0.6) some.push_back(i);
    }
    for (const Keep& keep : {all, odd, some, Keep{0}, Keep{size - 1}}) {
      if (keep.empty()) continue;
      TestTensor tensor(dtype, shape, layout);
      tensor.fill([](std::int64_t i) { return static_cast<double>(i % 1000); });
      const std::vector<char> before = tensor.memory();
      const auto expected = kept_elements(tensor, dim, keep);
      const bool contiguous = tensor.view().is_contiguous();

      const MutableTensorView result = compact(tensor.view(), static_cast<std::int64_t>(dim), keep);
      EXPECT_EQ(result.data, tensor.view().data);
      EXPECT_EQ(result.dtype, dtype);
      Dims wanted = shape;
      wanted[dim] = static_cast<std::int64_t>(keep.size());
      EXPECT_EQ(result.shape, wanted);
      EXPECT_EQ(result.strides,
                contiguous ? secateur::contiguous_strides(wanted) : tensor.view().strides);
      EXPECT_EQ(elements(static_cast<const char*>(result.data), result), expected);

      // Memory that belongs to no element of the view is as it was.
      std::vector<bool> mine(before.size(), false);
      for (std::int64_t i = 0; i < tensor.view().numel(); ++i) {
        for (std::size_t b = 0; b < secateur::item_size(dtype); ++b) {
          mine[tensor.position(i) + b] = true;
        }
      }
      for (std::size_t i = 0; i < before.size(); ++i) {
        if (!mine[i]) {
          ASSERT_EQ(before[i], tensor.memory()[i]) << "guard byte " << i;
        }
      }
    }
  }
}

TEST(Compact, EveryRankDTypeAndLayout) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t n : {1, 2, 9, 17}) {
      for (const std::int64_t gap : {1, 3}) {
        check_all(dtype, {n}, {{}, gap, {}});
        check_all(dtype, {n}, {{}, gap, {0}});
        check_all(dtype, {n, 5}, {{}, gap, {}});
        check_all(dtype, {4, n}, {{1, 0}, gap, {0}});
        check_all(dtype, {3, n, 4}, {{}, gap, {}});
        check_all(dtype, {3, n, 4}, {{2, 0, 1}, gap, {1, 2}});
        check_all(dtype, {2, 3, n, 4}, {{}, gap, {}});
        check_all(dtype, {2, 3, n, 4}, {{0, 2, 1, 3}, gap, {3}});
      }
    }
  }
}

TEST(Compact, EmptyAxesElsewhere) {
  TestTensor tensor(DType::f32, {3, 0});
  EXPECT_EQ(compact(tensor.view(), 0, {0, 2}).shape, (Dims{2, 0}));
}

// An axis of size 1 may have any stride.
TEST(Compact, StridesOfSingleElementsDoNotMatter) {
  float x[6] = {0, 1, 2, 3, 4, 5};
  const MutableTensorView view(x, DType::f32, {2, 1, 3}, {3, 0, 1});
  EXPECT_EQ(compact(view, 2, {0, 2}).strides, (Dims{2, 2, 1}));
  EXPECT_EQ((std::vector<float>{x, x + 4}), (std::vector<float>{0, 2, 3, 5}));
}

TEST(Compact, RefusesBeforeAnythingMoves) {
  float x[12];
  for (int i = 0; i < 12; ++i) x[i] = static_cast<float>(i);
  const MutableTensorView view(x, DType::f32, {3, 4});
  const auto refused = [&](const MutableTensorView& tensor, std::int64_t dim, const Keep& keep,
                           const std::string& text) {
    expect_error<InvalidArgument>([&] { compact(tensor, dim, keep); }, text);
    for (int i = 0; i < 12; ++i) ASSERT_EQ(x[i], static_cast<float>(i)) << text;
  };
  refused(view, 1, {}, "keep: expected at least one index, got none");
  refused(view, 1, {1, 4}, "keep: expected indices in [0, 4), got 4");
  refused(view, 1, {-1, 2}, "keep: expected indices in [0, 4), got -1");
  refused(view, 1, {2, 1}, "keep: expected ascending, unique indices, got 1 after 2");
  refused(view, 1, {1, 1}, "keep: expected ascending, unique indices, got 1 after 1");
  refused(view, 2, {0}, "dim: expected 0 to 1, got 2");
  refused(view, -1, {0}, "dim: expected 0 to 1, got -1");
  refused(MutableTensorView(x, DType::f32, Dims{}), 0, {0},
          "tensor: expected at least one dimension, got ()");
  refused(MutableTensorView(x, DType::f32, {3, 4}, {0, 1}), 1, {1},
          "tensor: expected elements that do not share memory, got strides (0, 1) for shape "
          "(3, 4)");
  refused(MutableTensorView(x, DType::f32, {3, 4}, {2, 1}), 0, {1},
          "tensor: expected elements that do not share memory, got strides (2, 1) for shape "
          "(3, 4)");
  refused(MutableTensorView(x, DType::f32, {2, 0}), 1, {0},
          "keep: expected indices in [0, 0), got 0");
}

TEST(Compact, NothingTakesNoTime) {
  constexpr std::int64_t kLarge = std::int64_t{1} << 40;
  const MutableTensorView nothing(nullptr, DType::f32, {kLarge, kLarge, 0, 3});
  EXPECT_EQ(compact(nothing, 3, {0, 2}).shape, (Dims{kLarge, kLarge, 0, 2}));
}

}  // namespace
