// Device functions of compact and of the moments, run on the host (see cuda_score_head_test.cc).
#include <algorithm>

#include "../../csrc/cuda/index.h"
#include "../../csrc/cuda/rows.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::cuda::Block;
using Values = std::vector<double>;
using Keep = std::vector<std::int64_t>;

secateur::cuda::Layout layout_of(const secateur::TensorGeometry& view) {
  secateur::cuda::Layout layout{};
  layout.rank = static_cast<int>(view.rank());
  for (std::size_t axis = 0; axis < view.rank(); ++axis) {
    layout.shape[axis] = view.shape[axis];
    layout.strides[axis] = view.strides[axis];
  }
  return layout;
}

TEST(CudaIndex, OffsetsAreTheViews) {
  for (const Layout& layout :
       std::vector<Layout>{{}, {{2, 0, 1}, 3, {0, 2}}, {{1, 2, 0}, 2, {1}}}) {
    const TestTensor tensor(DType::f32, {3, 4, 5}, layout);
    const auto where = layout_of(tensor.view());
    for (std::int64_t i = 0; i < 60; ++i) {
      const auto* at =
          static_cast<const char*>(tensor.view().data) + 4 * secateur::cuda::offset_of(where, i);
      EXPECT_EQ(at, tensor.memory().data() + tensor.position(i));
    }
  }
}

// What compact.cu does: part after part, a part's elements all read before one is written. Against
// the CPU's compact, for parts of every size and all axes, packed and strided.
TEST(CudaIndex, MovesAreCompacts) {
  const Keep keeps[3] = {{1, 2}, {0, 3}, {1, 2, 4}};
  for (const Layout& layout :
       std::vector<Layout>{{}, {{2, 0, 1}, 3, {0, 2}}, {{1, 2, 0}, 2, {1}}}) {
    for (std::size_t axis = 0; axis < 3; ++axis) {
      for (const std::int64_t part : {1, 2, 7, 100}) {
        const Dims shape{3, 4, 5};
        TestTensor expected(DType::f32, shape, layout), found(DType::f32, shape, layout);
        const auto count = [](std::int64_t i) { return static_cast<double>(i); };
        expected.fill(count);
        found.fill(count);
        const Keep& keep = keeps[axis];
        secateur::compact(expected.view(), static_cast<std::int64_t>(axis), keep);

        secateur::cuda::Moves moves{};
        moves.packed = found.view().is_contiguous();
        moves.kept = static_cast<std::int64_t>(keep.size());
        moves.size = shape[axis];
        moves.outer = moves.inner = 1;
        for (std::size_t i = 0; i < axis; ++i) moves.outer *= shape[i];
        for (std::size_t i = axis + 1; i < 3; ++i) moves.inner *= shape[i];
        moves.step = found.view().strides[axis];
        moves.lines = layout_of(found.view());
        moves.lines.shape[axis] = 1;
        moves.keep = keep.data();
        auto* data = static_cast<float*>(found.view().data);
        const std::int64_t total = moves.outer * moves.kept * moves.inner;
        for (std::int64_t begin = 0; begin < total; begin += part) {
          const std::int64_t size = std::min(part, total - begin);
          std::vector<float> on_their_way(static_cast<std::size_t>(size));
          for (const bool write : {false, true}) {
            for (std::int64_t i = 0; i < size; ++i) {
              std::int64_t from = 0, to = 0;
              secateur::cuda::move_of(moves, begin + i, &from, &to);
              float& scratch = on_their_way[static_cast<std::size_t>(i)];
              if (write) {
                data[to] = scratch;
              } else {
                scratch = data[from];
              }
            }
          }
        }
        // Behind a packed result lies what was left of either.
        const std::size_t bytes =
            moves.packed ? found.position(total - 1) + 4 : found.memory().size();
        EXPECT_TRUE(std::equal(found.memory().begin(),
                               found.memory().begin() + static_cast<std::ptrdiff_t>(bytes),
                               expected.memory().begin()))
            << "axis " << axis << " part " << part;
      }
    }
  }
}

template <typename T, typename Source>
Values moments_by_phases(const TestTensor& x, const secateur::cuda::RowNorms& norms,
                         const Block& block, double* peak) {
  const int rows = static_cast<int>(x.view().shape[0]), dim = static_cast<int>(x.view().shape[1]);
  std::vector<T> packed(static_cast<std::size_t>(rows * dim));
  Values room(secateur::cuda::kRowParts, kNaN);
  *peak = 0;
  for (int r = 0; r < rows; ++r) {
    const auto* row = static_cast<const Source*>(x.view().data) + r * x.view().strides[0];
    *peak = std::max(*peak, secateur::cuda::pack_row<T>(block, row, x.view().strides[1], dim, norms,
                                                        room.data(), packed.data() + r * dim));
  }
  constexpr int kSide = secateur::cuda::kSide;
  std::vector<T> strip(2 * secateur::cuda::strip_rows<T>() * kSide);
  Values sums(kSide * kSide, kNaN);
  Values result(static_cast<std::size_t>(dim + dim * (dim + 1) / 2), 0.0);
  const int squares = (dim + kSide - 1) / kSide;
  for (int left = 0; left < squares; ++left) {
    for (int right = left; right < squares; ++right) {
      secateur::cuda::add_square<T>(block, packed.data(), rows, dim, left, right, strip.data(),
                                    sums.data(), result.data(), result.data() + dim);
    }
  }
  return result;
}

TestTensor features(DType dtype, std::int64_t rows, std::int64_t dim, const Layout& layout = {}) {
  TestTensor x(dtype, {rows, dim}, layout);
  Random random(static_cast<std::uint64_t>(rows * 1000 + dim));
  x.fill([&](std::int64_t) { return 0.5 + random.normal(); });
  return x;
}

// Against the CPU's accumulator in float64, which has its own literal test.
TEST(CudaRows, MomentsForEverySizeAndNorm) {
  const secateur::RowNorm kinds[3] = {secateur::RowNorm::none, secateur::RowNorm::rms,
                                      secateur::RowNorm::layer};
  for (const std::int64_t dim : {1, 3, 16, 63, 64, 65, 130}) {
    for (const std::int64_t rows : {1, 15, 16, 17, 33, 70}) {
      for (const auto kind : kinds) {
        const TestTensor x = features(DType::f64, rows, dim, {{1, 0}, 2, {0}});
        secateur::MomentAccumulator literal(dim);
        literal.update(x, {kind});
        const secateur::cuda::RowNorms norms{kind != secateur::RowNorm::none,
                                             kind == secateur::RowNorm::layer};
        double peak = 0;
        const Values exact = moments_by_phases<double, double>(x, norms, Block(7), &peak);
        const Values single = moments_by_phases<float, double>(x, norms, Block(7), &peak);
        EXPECT_GT(peak, 0);
        Values wanted = literal.state().sum;
        wanted.insert(wanted.end(), literal.state().second_moment.begin(),
                      literal.state().second_moment.end());
        const double scale = static_cast<double>(rows) * 16;
        for (std::size_t i = 0; i < wanted.size(); ++i) {
          ASSERT_NEAR(exact[i], wanted[i], 1e-13 * scale) << dim << " " << rows << " " << i;
          ASSERT_NEAR(single[i], wanted[i], 1e-6 * scale) << dim << " " << rows << " " << i;
        }
      }
    }
  }
}

TEST(CudaRows, EveryDType) {
  const auto close = [](const TestTensor& x, const Values& found) {
    secateur::MomentAccumulator literal(x.view().shape[1]);
    literal.update(x);
    const auto& state = literal.state();
    for (std::size_t i = 0; i < state.sum.size(); ++i) EXPECT_NEAR(found[i], state.sum[i], 1e-4);
    for (std::size_t i = 0; i < state.second_moment.size(); ++i) {
      EXPECT_NEAR(found[state.sum.size() + i], state.second_moment[i], 1e-4);
    }
  };
  double peak = 0;
  const secateur::cuda::RowNorms none{false, false};
  const TestTensor single = features(DType::f32, 40, 33), half = features(DType::f16, 40, 33),
                   brain = features(DType::bf16, 40, 33);
  close(single, moments_by_phases<float, float>(single, none, Block(5), &peak));
  close(half, moments_by_phases<float, secateur::cuda::Half>(half, none, Block(5), &peak));
  close(brain, moments_by_phases<float, secateur::cuda::BFloat>(brain, none, Block(5), &peak));
}

TEST(CudaRows, SameBitsForAnyThreads) {
  const TestTensor x = features(DType::f32, 50, 70);
  double peak = 0;
  const Values one = moments_by_phases<float, float>(x, {true, true}, Block(1), &peak);
  for (const int threads : {3, 64, 256}) {
    for (const bool backwards : {false, true}) {
      EXPECT_EQ(one, (moments_by_phases<float, float>(x, {true, true}, Block(threads, backwards),
                                                      &peak)));
    }
  }
}

TEST(CudaRows, PeaksAndFaults) {
  TestTensor x = features(DType::f32, 5, 40);
  x.set(77, -123);
  double peak = 0;
  moments_by_phases<float, float>(x, {false, false}, Block(5), &peak);
  EXPECT_EQ(peak, 123);
  for (const double value : {kNaN, kInf, -kInf}) {
    for (const bool normalise : {false, true}) {
      x.set(77, value);
      moments_by_phases<float, float>(x, {normalise, normalise}, Block(5), &peak);
      EXPECT_EQ(peak, kInf) << value << normalise;
    }
  }
  // A constant row has no direction.
  x.fill([](std::int64_t) { return 3; });
  for (const double sum : moments_by_phases<float, float>(x, {true, true}, Block(5), &peak)) {
    EXPECT_EQ(sum, 0);
  }
}

}  // namespace
