// Device functions of compact and of the moments, run on the host (see cuda_score_head_test.cc).
#include <algorithm>
#include <cmath>

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

/// What peak_kernel's warps do, number after number.
template <typename Source>
secateur::cuda::RowNorm norm_of(const Source* x, std::int64_t stride, int dim, bool center) {
  double mean = 0;
  for (int c = 0; center && c < dim; ++c) mean += secateur::cuda::to_double(x[c * stride]) / dim;
  const auto squares = [&](double scale) {
    double sum = 0;
    for (int c = 0; c < dim; ++c) {
      const double value = (secateur::cuda::to_double(x[c * stride]) - mean) * scale;
      sum += value * value;
    }
    return sum;
  };
  const double scale = secateur::cuda::needs_scale(squares(1)) ? secateur::cuda::kRowScale : 1;
  return secateur::cuda::row_norm(dim, mean, scale, squares(scale));
}

template <typename T, typename Source>
Values moments_by_phases(const TestTensor& x, secateur::RowNorm kind, const Block& block) {
  const auto& view = x.view();
  const int rows = static_cast<int>(view.shape[0]), dim = static_cast<int>(view.shape[1]);
  // Rows that are not there among those that are.
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(2 * rows), secateur::cuda::kNoRow);
  std::vector<secateur::cuda::RowNorm> norms(offsets.size());
  const auto* data = static_cast<const Source*>(view.data);
  for (int r = 0; r < rows; ++r) {
    const auto at = static_cast<std::size_t>(2 * r + 1);
    offsets[at] = r * view.strides[0];
    norms[at] = norm_of(data + offsets[at], view.strides[1], dim, kind == secateur::RowNorm::layer);
  }
  const secateur::cuda::RowReader<T, Source> reader{
      data, offsets.data(), view.strides[1],
      kind == secateur::RowNorm::none ? nullptr : norms.data()};
  constexpr int kSide = secateur::cuda::kSide;
  std::vector<T> strip(2 * secateur::cuda::strip_rows<T>() * kSide);
  Values sums(kSide * kSide, kNaN);
  Values result(static_cast<std::size_t>(dim + dim * (dim + 1) / 2), 0.0);
  const int side = (dim + kSide - 1) / kSide;
  for (int i = 0; i < side * (side + 1) / 2; ++i) {
    int left = 0, right = 0;
    secateur::cuda::square_of(i, side, &left, &right);
    secateur::cuda::add_square<T>(block, reader, 2 * rows, dim, left, right, strip.data(),
                                  sums.data(), result.data(), result.data() + dim);
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
        const Values exact = moments_by_phases<double, double>(x, kind, Block(7));
        const Values single = moments_by_phases<float, double>(x, kind, Block(7));
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
  const TestTensor single = features(DType::f32, 40, 33), half = features(DType::f16, 40, 33),
                   brain = features(DType::bf16, 40, 33);
  const auto none = secateur::RowNorm::none;
  close(single, moments_by_phases<float, float>(single, none, Block(5)));
  close(half, moments_by_phases<float, secateur::cuda::Half>(half, none, Block(5)));
  close(brain, moments_by_phases<float, secateur::cuda::BFloat>(brain, none, Block(5)));
}

TEST(CudaRows, SameBitsForAnyThreads) {
  const TestTensor x = features(DType::f32, 50, 70);
  const auto layer = secateur::RowNorm::layer;
  const Values one = moments_by_phases<float, float>(x, layer, Block(1));
  for (const int threads : {3, 64, 256}) {
    for (const bool backwards : {false, true}) {
      EXPECT_EQ(one, (moments_by_phases<float, float>(x, layer, Block(threads, backwards))));
    }
  }
}

TEST(CudaRows, NormsThatFloat64CannotHold) {
  Values row(40, 0.0);
  const auto norm = [&](bool center) { return norm_of(row.data(), 1, 40, center); };
  for (const double value : {kNaN, kInf, -kInf, 1e130}) {
    row[7] = value;
    EXPECT_FALSE(norm(false).fits) << value;
    EXPECT_FALSE(norm(true).fits) << value;
  }
  row[7] = 1e-200;  // whose square is 0
  EXPECT_TRUE(norm(false).fits);
  EXPECT_NEAR(norm(false).factor * 1e-200, std::sqrt(40.0), 1e-12);
  // A constant row has no direction.
  row.assign(40, 0.1);
  EXPECT_TRUE(norm(true).fits);
  EXPECT_EQ(norm(true).factor, 0);
}

// Against what backend.h says of MomentRows, for numbers of images, sums and strides.
TEST(CudaRows, RowsAreThoseOfImagesInTurn) {
  const TestTensor x(DType::f32, {7, 10, 3}, {{1, 0, 2}, 2, {1}});
  const auto& view = x.view();
  for (const std::int64_t turns : {1, 2, 3, 8}) {
    for (const std::int64_t stride : {1, 3, 4, 50}) {
      secateur::cuda::RowChoice choice{};
      choice.rows = layout_of(view);
      choice.rows.rank = 2;
      choice.count = 70;
      choice.in_turn = true;
      choice.turns = turns;
      choice.stride = stride;
      choice.per_image = (10 + stride - 1) / stride;
      for (std::int64_t s = 0; s < turns; ++s) {
        const std::int64_t phase = (2 * s + 1) % stride;
        std::vector<std::int64_t> wanted, found;
        for (std::int64_t b = s; b < 7; b += turns) {
          for (std::int64_t n = 0; n < 10; ++n) {
            if ((n - phase - b / turns) % stride != 0) continue;
            wanted.push_back(b * view.strides[0] + n * view.strides[1]);
          }
        }
        // Some more rows than any of the sums has.
        for (std::int64_t r = 0; r < 8 * choice.per_image; ++r) {
          const std::int64_t offset = secateur::cuda::row_offset(choice, s, phase, r);
          if (offset != secateur::cuda::kNoRow) found.push_back(offset);
        }
        EXPECT_EQ(found, wanted) << turns << " " << stride << " " << s;
      }
    }
  }
  secateur::cuda::RowChoice every{};
  every.rows = layout_of(view);
  every.rows.rank = 2;
  every.count = 70;
  for (std::int64_t r = 0; r < 70; ++r) {
    EXPECT_EQ(secateur::cuda::row_offset(every, 0, 0, r),
              r / 10 * view.strides[0] + r % 10 * view.strides[1]);
  }
  EXPECT_EQ(secateur::cuda::row_offset(every, 0, 0, 70), secateur::cuda::kNoRow);
}

TEST(CudaRows, SquaresAreTheUpperTriangle) {
  for (int side = 1; side < 6; ++side) {
    int index = 0;
    for (int i = 0; i < side; ++i) {
      for (int j = i; j < side; ++j, ++index) {
        int left = -1, right = -1;
        secateur::cuda::square_of(index, side, &left, &right);
        EXPECT_EQ(left, i);
        EXPECT_EQ(right, j);
      }
    }
  }
  EXPECT_EQ(secateur::cuda::tiles_of(1), 1);
  EXPECT_EQ(secateur::cuda::tiles_of(128), 1);
  EXPECT_EQ(secateur::cuda::tiles_of(129), 2);
}

TEST(CudaRows, TilesCoverTheUpperTriangle) {
  for (int side = 1; side < 6; ++side) {
    for (int tall = 1; tall < 3; ++tall) {
      int index = 0;
      for (int i = 0; i * tall < side; ++i) {
        for (int j = i * tall; j < side; ++j, ++index) {
          int band = -1, right = -1;
          secateur::cuda::tile_of(index, side, tall, &band, &right);
          EXPECT_EQ(band, i);
          EXPECT_EQ(right, j);
        }
      }
      EXPECT_EQ(secateur::cuda::tiles_in(side, tall), index);
    }
  }
}

TEST(CudaRows, SplitsHoldAllRowsAndFillTheDevice) {
  for (const std::int64_t rows : {1, 128, 129, 4096, 4097, 9001, 25216, 50432, 10000000}) {
    for (const std::int64_t blocks : {1, 6, 12, 156, 1056}) {
      const auto splits = secateur::cuda::split_rows(rows, blocks, 132);
      const std::int64_t held = std::int64_t{splits.rows} * splits.count;
      EXPECT_EQ(splits.rows % secateur::cuda::kTile, 0);
      EXPECT_LE(splits.rows, secateur::cuda::kSplitRows);
      EXPECT_GE(held, rows);
      EXPECT_LT(held - splits.rows, rows);
    }
  }
  // A calibration batch of DeiT-Small in two sums of six tiles: one wave.
  EXPECT_EQ(secateur::cuda::split_rows(25216, 12, 132).count, 11);
}

}  // namespace
