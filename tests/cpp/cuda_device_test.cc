// The core on CUDA devices, against the literal forms. Everything is left out where there is none.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>

#include "reference.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::AttentionScorer;
using secateur::AttentionScorerState;
using secateur::Device;
using secateur::DeviceType;
using secateur::Error;
using secateur::InvalidArgument;
using secateur::MomentAccumulator;
using secateur::NumericalError;
using secateur::RowNorm;
using secateur::RowOptions;
using secateur::Unsupported;
using Values = std::vector<double>;

// What issue and documentation promise, and what float64 gives where nothing is close to a tie.
constexpr double kBar = 1e-5;
constexpr double kUsual = 1e-9;
// Of products of float32 and narrower, to the largest sum.
constexpr double kSingle = 1e-6;

class CudaDevice : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device";
  }
};

/// A tensor's memory, guards and all, on the device.
class OnDevice {
 public:
  explicit OnDevice(const TestTensor& x, cudaStream_t stream = nullptr)
      : size_(x.memory().size()), view_(x.view()) {
    EXPECT_EQ(cudaMalloc(&memory_, size_), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(memory_, x.memory().data(), size_, cudaMemcpyHostToDevice), cudaSuccess);
    if (x.view().numel() > 0) {
      view_.data = static_cast<char*>(memory_) +
                   (static_cast<const char*>(x.view().data) - x.memory().data());
    }
    view_.device = {DeviceType::cuda, 0, stream};
  }
  ~OnDevice() { cudaFree(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  const MutableTensorView& view() const { return view_; }
  operator TensorView() const { return view_; }  // NOLINT
  std::vector<char> memory() const {
    std::vector<char> result(size_);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(result.data(), memory_, size_, cudaMemcpyDeviceToHost), cudaSuccess);
    return result;
  }

 private:
  std::size_t size_;
  void* memory_ = nullptr;
  MutableTensorView view_;
};

TestTensor batch(const Dims& shape, std::uint64_t seed, DType dtype, const Layout& layout = {},
                 double offset = 0, double scale = 1) {
  TestTensor tensor(dtype, shape, layout);
  Random random(seed);
  tensor.fill([&](std::int64_t) { return offset + scale * random.normal(); });
  return tensor;
}

/// The largest error of the device's scores, images of which the literal is ill-defined left out.
double score_error(const TestTensor& q, const TestTensor& k, std::int64_t gamma, int* compared) {
  const Dims& shape = q.view().shape;
  double worst = 0;
  for (std::int64_t b = 0; b < shape[0]; ++b) {
    TestTensor one_q(q.view().dtype, {1, shape[1], shape[2], shape[3]});
    TestTensor one_k(k.view().dtype, {1, shape[1], shape[2], shape[3]});
    const std::int64_t size = shape[1] * shape[2] * shape[3];
    one_q.fill([&](std::int64_t i) { return q.get(b * size + i); });
    one_k.fill([&](std::int64_t i) { return k.get(b * size + i); });
    AttentionScorer scorer(shape[2], shape[3], gamma);
    const OnDevice device_q(one_q), device_k(one_k);
    scorer.update(device_q, device_k);
    const Values scores = scorer.scores();
    for (std::int64_t h = 0; h < shape[2]; ++h) {
      const auto literal = reference::attention_scores(head_of(q, b, h), head_of(k, b, h),
                                                       static_cast<std::size_t>(gamma));
      if (!literal.comparable) continue;
      ++*compared;
      for (std::int64_t i = 0; i < shape[3]; ++i) {
        const double error = std::fabs(scores[static_cast<std::size_t>(h * shape[3] + i)] -
                                       literal.omega[static_cast<std::size_t>(i)]);
        worst = std::isnan(error) ? kInf : std::max(worst, error);
      }
    }
  }
  return worst;
}

void expect_scores(const TestTensor& q, const TestTensor& k, std::int64_t gamma, double bar,
                   const std::string& what) {
  int compared = 0;
  EXPECT_LT(score_error(q, k, gamma, &compared), bar) << what;
  EXPECT_GT(compared, 0) << what;
}

TEST_F(CudaDevice, ScoresMatchTheSvdForEverySize) {
  std::vector<std::int64_t> sizes = kSizes;
  sizes.insert(sizes.end(), {2, 24, 48, 80, 96, 127, 128});
  for (const std::int64_t d : sizes) {
    for (const std::int64_t n : {(d + 1) / 2, d + 9}) {
      for (const std::int64_t gamma : {std::int64_t{8}, d + 5}) {
        if (d > 65 && (gamma > 8 || n > d)) continue;  // the literal would take the minute
        const std::string what =
            std::to_string(n) + "x" + std::to_string(d) + " gamma " + std::to_string(gamma);
        expect_scores(batch({1, n, 2, d}, 1, DType::f64), batch({1, n, 2, d}, 2, DType::f64), gamma,
                      kUsual, what);
      }
    }
  }
}

TEST_F(CudaDevice, ScoresMatchTheSvdForEveryDTypeAndLayout) {
  const std::vector<Layout> layouts{
      {}, {{0, 1, 2, 3}, 3, {}}, {{3, 2, 1, 0}, 1, {}}, {{0, 2, 1, 3}, 2, {1, 3}}};
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : layouts) {
      for (const std::int64_t d : {17, 64}) {
        for (const std::int64_t n : {7, 50, 197}) {
          if (n == 197 && !layout.order.empty()) continue;
          const std::string what = std::string(secateur::name(dtype)) + " " + std::to_string(n) +
                                   "x" + std::to_string(d);
          expect_scores(batch({2, n, 3, d}, 5, dtype, layout), batch({2, n, 3, d}, 6, dtype), 8,
                        kUsual, what);
          expect_scores(batch({2, n, 3, d}, 7, dtype), batch({2, n, 3, d}, 8, dtype, layout), 8,
                        kUsual, what);
        }
      }
    }
  }
}

TEST_F(CudaDevice, ScoresMatchTheSvdOnBadGround) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t n : {20, 70}) {
      for (const std::int64_t d : {33, 64}) {
        // Neurons alike but for a thousandth, some dead, one loud, behind an offset.
        TestTensor q(dtype, {1, n, 2, d}), k(dtype, {1, n, 2, d});
        Random random(3);
        Values first(static_cast<std::size_t>(n * 2));
        for (double& value : first) value = random.normal();
        const auto fill = [&](TestTensor& x, double offset) {
          x.fill([&](std::int64_t i) {
            const std::int64_t c = i % d;
            const double base = first[static_cast<std::size_t>(i / d)];
            if (c % 7 == 3) return 0.0;
            return offset + (c == 5 ? 200 : 1) *
                                (c % 3 == 0 ? base + 1e-3 * random.normal() : random.normal());
          });
        };
        fill(q, 0);
        fill(k, 30);
        const std::string what =
            std::string(secateur::name(dtype)) + " " + std::to_string(n) + "x" + std::to_string(d);
        expect_scores(q, k, 8, kBar, what);
      }
    }
  }
}

TEST_F(CudaDevice, ScorersAddUpMomentsAndImagesInOrder) {
  for (const DType dtype : kDTypes) {
    const std::int64_t d = 21, n = 33, heads = 2, images = 9;
    const TestTensor q = batch({images, n, heads, d}, 11, dtype);
    const TestTensor k = batch({images, n, heads, d}, 12, dtype, {}, 4);
    const OnDevice device_q(q), device_k(k);
    AttentionScorer whole(heads, d, 8, true), again(heads, d, 8, true), parts(heads, d, 8, true);
    whole.update(device_q, device_k);
    again.update(device_q, device_k);
    const auto images_from = [&](const OnDevice& x, std::int64_t begin, std::int64_t count) {
      TensorView view = x;
      view.data = static_cast<const char*>(view.data) +
                  begin * view.strides[0] * static_cast<std::int64_t>(item_size(view.dtype));
      view.shape[0] = count;
      return view;
    };
    parts.update(images_from(device_q, 0, 4), images_from(device_k, 0, 4));
    EXPECT_EQ(parts.images(), 4);
    parts.update(images_from(device_q, 4, 5), images_from(device_k, 4, 5));
    const AttentionScorerState& state = whole.state();
    EXPECT_EQ(state.images, images);
    EXPECT_EQ(state.tokens, images * n);
    for (const AttentionScorer* other : {&again, &parts}) {
      EXPECT_EQ(state.score_sum, other->state().score_sum);
      EXPECT_EQ(state.query_gram, other->state().query_gram);
      EXPECT_EQ(state.key_gram, other->state().key_gram);
      EXPECT_EQ(state.score_gram, other->state().score_gram);
    }
    const Values query_gram = whole.query_gram(), key_gram = whole.key_gram(),
                 score_gram = whole.score_gram();
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < d; ++i) {
        for (std::int64_t j = 0; j < d; ++j) {
          double queries = 0, keys = 0, products = 0;
          for (std::int64_t b = 0; b < images; ++b) {
            const auto left = reference::gram(head_of(q, b, h), false);
            const auto right = reference::gram(head_of(k, b, h), true);
            const auto r = static_cast<std::size_t>(i), c = static_cast<std::size_t>(j);
            queries += left(r, c);
            keys += right(r, c);
            products += left(r, c) * right(r, c);
          }
          const auto at = static_cast<std::size_t>((h * d + i) * d + j);
          ASSERT_NEAR(query_gram[at], queries, 1e-10 * n * images);
          ASSERT_NEAR(key_gram[at], keys, 1e-10 * n * images);
          ASSERT_NEAR(score_gram[at], products, 1e-10 * n * n * images);
        }
      }
    }
  }
}

TEST_F(CudaDevice, ScorersOfTheHostAndOfTheDeviceGoOnFromEachOther) {
  const TestTensor q = batch({4, 30, 2, 16}, 21, DType::f32);
  const TestTensor k = batch({4, 30, 2, 16}, 22, DType::f32);
  const OnDevice device_q(q), device_k(k);
  AttentionScorer mixed(2, 16, 8, true), host(2, 16, 8, true);
  mixed.update(device_q, device_k);
  mixed.update(q, k);
  mixed.update(device_q, device_k);
  for (int i = 0; i < 3; ++i) host.update(q, k);
  ASSERT_EQ(mixed.images(), host.images());
  for (std::size_t i = 0; i < host.scores().size(); ++i) {
    EXPECT_NEAR(mixed.scores()[i], host.scores()[i], kUsual);
  }
  AttentionScorer merged(2, 16, 8, true);
  merged.merge(mixed);
  EXPECT_EQ(merged.state().key_gram, mixed.state().key_gram);
}

TEST_F(CudaDevice, ScorersNameWhatIsNotFinite) {
  for (const DType dtype : kDTypes) {
    const TestTensor q = batch({3, 40, 2, 24}, 31, dtype);
    TestTensor k = batch({3, 40, 2, 24}, 32, dtype);
    AttentionScorer scorer(2, 24, 8, true, "blocks.3.attn");
    const OnDevice device_q(q), good(k);
    scorer.update(device_q, good);
    const AttentionScorerState before = scorer.state();
    k.set(((2 * 40 + 7) * 2 + 1) * 24 + 5, kNaN);
    const OnDevice bad(k);
    expect_error<NumericalError>(
        [&] {
          scorer.update(device_q, bad);
          scorer.scores();
        },
        "blocks.3.attn k: expected finite values, got nan at (image 2, token 7, head 1, channel "
        "5)");
    EXPECT_EQ(scorer.images(), 3);
    EXPECT_EQ(scorer.state().score_sum, before.score_sum);
    EXPECT_EQ(scorer.state().key_gram, before.key_gram);
    scorer.update(device_q, good);
    EXPECT_EQ(scorer.images(), 6);
  }
}

TensorView images_of(const TensorView& x, std::int64_t first, std::int64_t step) {
  TensorView view = x;
  view.data = static_cast<const char*>(view.data) +
              first * view.strides[0] * static_cast<std::int64_t>(item_size(view.dtype));
  view.shape[0] = (x.shape[0] - first + step - 1) / step;
  view.strides[0] *= step;
  return view;
}

TEST_F(CudaDevice, ScorersInTurnAreScorersOfEveryNthImage) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t d : {24, 72}) {
      for (const std::int64_t turns : {1, 2, 3, 8}) {
        const TestTensor q = batch({7, 31, 2, d}, 25, dtype), k = batch({7, 31, 2, d}, 26, dtype);
        const OnDevice device_q(q), device_k(k);
        std::vector<AttentionScorer> found, expected;
        std::vector<AttentionScorer*> all;
        for (std::int64_t i = 0; i < turns; ++i) found.emplace_back(2, d, 8, true);
        expected = found;
        for (AttentionScorer& scorer : found) all.push_back(&scorer);
        AttentionScorer::update_in_turn(all, device_q, device_k, false);
        AttentionScorer::update_in_turn(all, device_q, device_k, false);
        for (std::int64_t i = 0; i < turns; ++i) {
          const auto at = static_cast<std::size_t>(i);
          for (int round = 0; i < 7 && round < 2; ++round) {
            expected[at].update(images_of(device_q, i, turns), images_of(device_k, i, turns));
          }
          EXPECT_EQ(found[at].images(), expected[at].images());
          EXPECT_EQ(found[at].state().tokens, expected[at].state().tokens);
          EXPECT_EQ(found[at].state().score_sum, expected[at].state().score_sum);
          EXPECT_EQ(found[at].state().score_gram, expected[at].state().score_gram);
        }
      }
    }
  }
}

TEST_F(CudaDevice, ScorersThatNobodyWaitsForKeepWhatWasBeforeAFault) {
  for (const std::int64_t d : {24, 72}) {
    const TestTensor q = batch({4, 40, 2, d}, 33, DType::bf16);
    TestTensor k = batch({4, 40, 2, d}, 34, DType::bf16);
    const OnDevice device_q(q), good(k);
    k.set((1 * 40 + 3) * 2 * d + 5, kInf);  // of image 1
    const OnDevice bad(k);
    AttentionScorer even(2, d, 8, true, "even"), odd(2, d, 8, true, "odd"), one(2, d, 8, true);
    for (const OnDevice* keys : {&good, &good, &bad, &good}) {
      AttentionScorer::update_in_turn({&even, &odd}, device_q, *keys, false);
    }
    even.wait();
    EXPECT_EQ(even.images(), 8);
    EXPECT_EQ(odd.images(), 8);
    expect_error<NumericalError>(
        [&] { odd.wait(); },
        "odd q: expected finite values, got one that is not, in a batch that was not waited for");
    EXPECT_EQ(odd.images(), 4);
    for (int i = 0; i < 2; ++i) one.update(images_of(device_q, 1, 2), images_of(good, 1, 2));
    EXPECT_EQ(odd.state().score_sum, one.state().score_sum);
    EXPECT_EQ(odd.state().query_gram, one.state().query_gram);
    AttentionScorer::update_in_turn({&even, &odd}, device_q, good, false);
    EXPECT_EQ(odd.state().images, 6);
  }
}

// With moments a batch of many images is folded part by part: at most 168 of these make one.
TEST_F(CudaDevice, ScorersKeepNothingOfABatchWithAFaultBehindItsFirstPart) {
  const std::int64_t images = 200, heads = 8, d = 128;
  const TestTensor q = batch({images, 3, heads, d}, 35, DType::f32);
  TestTensor k = batch({images, 3, heads, d}, 36, DType::f32);
  const OnDevice device_q(q), good(k);
  k.set((190 * 3 + 1) * heads * d + 7, kNaN);
  const OnDevice bad(k);
  AttentionScorer scorer(heads, d, 8, true), one(heads, d, 8, true);
  scorer.update(device_q, good);
  one.update(device_q, good);
  EXPECT_THROW(scorer.update(device_q, bad), NumericalError);
  EXPECT_EQ(scorer.images(), images);
  EXPECT_EQ(scorer.state().score_sum, one.state().score_sum);
  EXPECT_EQ(scorer.state().key_gram, one.state().key_gram);
}

/// Rows as RowOptions chooses and normalises them.
reference::Matrix rows_of(const TestTensor& x, const RowOptions& options) {
  const Dims& shape = x.view().shape;
  const std::int64_t dim = shape[shape.size() - 1], rows = x.view().numel() / dim;
  std::vector<std::int64_t> chosen;
  for (std::int64_t r = 0; r < rows; ++r) {
    const bool counts =
        options.stride == 1 || (r % shape[1] - r / shape[1] - options.phase) % options.stride == 0;
    if (counts) chosen.push_back(r);
  }
  reference::Matrix result(chosen.size(), static_cast<std::size_t>(dim));
  for (std::size_t r = 0; r < chosen.size(); ++r) {
    double mean = 0, square = 0;
    for (std::int64_t c = 0; c < dim; ++c) mean += x.get(chosen[r] * dim + c) / double(dim);
    if (options.norm != RowNorm::layer) mean = 0;
    for (std::int64_t c = 0; c < dim; ++c) {
      const double value = x.get(chosen[r] * dim + c) - mean;
      square += value * value;
    }
    const double factor = options.norm == RowNorm::none ? 1
                          : square > 0                  ? std::sqrt(double(dim) / square)
                                                        : 0;
    for (std::int64_t c = 0; c < dim; ++c) {
      result(r, static_cast<std::size_t>(c)) = factor * (x.get(chosen[r] * dim + c) - mean);
    }
  }
  return result;
}

void expect_moments(const MomentAccumulator& found, const reference::Matrix& rows,
                    const std::string& what) {
  const auto d = static_cast<std::size_t>(found.dim());
  ASSERT_EQ(found.rows(), static_cast<std::int64_t>(rows.rows)) << what;
  const reference::Matrix second = reference::gram(rows, false);
  const Values moment = found.second_moment();
  double largest = 0, worst = 0, worst_sum = 0;
  for (std::size_t i = 0; i < d; ++i) {
    largest = std::max(largest, second(i, i));
    double sum = 0;
    for (std::size_t r = 0; r < rows.rows; ++r) sum += rows(r, i);
    worst_sum = std::max(worst_sum, std::fabs(found.sum()[i] - sum));
    for (std::size_t j = 0; j < d; ++j) {
      const double error = std::fabs(moment[i * d + j] - second(i, j));
      worst = std::isnan(error) ? kInf : std::max(worst, error);
    }
  }
  EXPECT_LE(worst, kSingle * largest) << what;
  EXPECT_LE(worst_sum, kSingle * std::sqrt(largest * double(rows.rows)) + 1e-300) << what;
}

TEST_F(CudaDevice, MomentsMatchTheLiteralForEverySizeAndDType) {
  std::vector<std::int64_t> sizes = kSizes;
  sizes.insert(sizes.end(), {96, 127, 128, 129, 192, 200, 257});
  for (const DType dtype : kDTypes) {
    for (const std::int64_t d : sizes) {
      for (const std::int64_t rows : {1, 37, 300}) {
        const TestTensor x = batch({rows, d}, 41, dtype, {}, 0.5);
        const OnDevice device(x);
        MomentAccumulator found(d);
        found.update(device);
        const std::string what = std::string(secateur::name(dtype)) + " " + std::to_string(rows) +
                                 "x" + std::to_string(d);
        expect_moments(found, rows_of(x, {}), what);
      }
    }
  }
}

TEST_F(CudaDevice, MomentsMatchTheLiteralForEveryRowOptionAndLayout) {
  const std::vector<Layout> layouts{
      {}, {{0, 1, 2}, 3, {}}, {{2, 1, 0}, 1, {}}, {{1, 0, 2}, 1, {0}}, {{0, 1, 2}, 2, {2}}};
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : layouts) {
      for (const RowNorm norm : {RowNorm::none, RowNorm::rms, RowNorm::layer}) {
        for (const RowOptions& options : {RowOptions{norm, 1, 0}, RowOptions{norm, 3, 2},
                                          RowOptions{norm, 4, 9}, RowOptions{norm, 50, 4}}) {
          for (const std::int64_t d : {40, 130}) {
            const TestTensor x = batch({11, 29, d}, 51, dtype, layout, -0.3);
            const OnDevice device(x);
            MomentAccumulator found(d);
            found.update(device, options);
            expect_moments(found, rows_of(x, options),
                           std::string(secateur::name(dtype)) + " stride " +
                               std::to_string(options.stride) + " dim " + std::to_string(d) +
                               " norm " + std::to_string(int(norm)));
          }
        }
      }
    }
  }
}

TEST_F(CudaDevice, MomentsOfManyRowsKeepTheirPrecision) {
  // An offset of a hundred deviations over 9,001 rows: float32 sums of so many would drift.
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const TestTensor x = batch({9001, 72}, 61, dtype, {}, 100);
    const OnDevice device(x);
    MomentAccumulator found(72), again(72);
    found.update(device);
    again.update(device);
    expect_moments(found, rows_of(x, {}), secateur::name(dtype));
    EXPECT_EQ(found.state().second_moment, again.state().second_moment);
    EXPECT_EQ(found.state().sum, again.state().sum);
  }
}

TEST_F(CudaDevice, MomentsTakeWhatFloat32ProductsCannotHold) {
  for (const double scale : {1e-25, 1e25}) {
    const TestTensor x = batch({50, 33}, 71, DType::f32, {}, 0, scale);
    const OnDevice device(x);
    MomentAccumulator found(33);
    found.update(device);
    expect_moments(found, rows_of(x, {}), std::to_string(scale));
  }
}

TEST_F(CudaDevice, MomentsNameWhatIsNotFinite) {
  for (const DType dtype : kDTypes) {
    for (const RowNorm norm : {RowNorm::none, RowNorm::layer}) {
      TestTensor x = batch({60, 40}, 81, dtype);
      const OnDevice good(x);
      MomentAccumulator found(40, "fc2");
      found.update(good, {norm});
      const auto before = found.state();
      x.set(31 * 40 + 9, kInf);
      const OnDevice bad(x);
      expect_error<NumericalError>(
          [&] {
            found.update(bad, {norm});
            found.second_moment();
          },
          "fc2 x: expected finite values, got inf at (31, 9)");
      EXPECT_EQ(found.rows(), 60);
      EXPECT_EQ(found.state().second_moment, before.second_moment);
      EXPECT_EQ(found.state().sum, before.sum);
    }
  }
}

TEST_F(CudaDevice, MomentsInTurnAreThoseOfEveryNthImage) {
  for (const DType dtype : kDTypes) {
    for (const RowNorm norm : {RowNorm::none, RowNorm::layer}) {
      for (const std::int64_t stride : {1, 4}) {
        for (const std::int64_t d : {40, 136}) {
          const TestTensor x = batch({9, 29, d}, 85, dtype, {}, 0.2);
          const OnDevice device(x);
          MomentAccumulator even(d), odd(d), one(d), other(d);
          for (int round = 0; round < 2; ++round) {
            MomentAccumulator::update_in_turn({&even, &odd}, device,
                                              {{norm, stride, 3}, {norm, stride, 4}}, false);
            one.update(images_of(device, 0, 2), {norm, stride, 3});
            other.update(images_of(device, 1, 2), {norm, stride, 4});
          }
          for (const auto& [found, expected] : {std::pair{&even, &one}, std::pair{&odd, &other}}) {
            ASSERT_EQ(found->rows(), expected->rows());
            const Values mine = found->second_moment(), theirs = expected->second_moment();
            const double largest = *std::max_element(theirs.begin(), theirs.end());
            for (std::size_t i = 0; i < mine.size(); ++i) {
              ASSERT_NEAR(mine[i], theirs[i], kSingle * largest) << secateur::name(dtype);
            }
            for (std::size_t i = 0; i < found->sum().size(); ++i) {
              ASSERT_NEAR(found->sum()[i], expected->sum()[i], kSingle * largest);
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaDevice, MomentsThatNobodyWaitsForKeepWhatWasBeforeAFault) {
  for (const DType dtype : kDTypes) {
    for (const RowNorm norm : {RowNorm::none, RowNorm::rms}) {
      TestTensor x = batch({6, 20, 48}, 87, dtype);
      const OnDevice good(x);
      x.set((3 * 20 + 7) * 48 + 2, kNaN);  // of image 3
      const OnDevice bad(x);
      MomentAccumulator even(48), odd(48, "odd");
      const std::vector<RowOptions> options{{norm}, {norm}};
      for (const OnDevice* batch : {&good, &bad, &good}) {
        MomentAccumulator::update_in_turn({&even, &odd}, *batch, options, false);
      }
      std::vector<double> sum(48), second(48 * 49 / 2);
      even.copy_state(sum.data(), second.data());
      EXPECT_EQ(even.state().rows, 180);
      EXPECT_EQ(sum, even.state().sum);
      EXPECT_EQ(second, even.state().second_moment);
      expect_error<NumericalError>([&] { odd.wait(); },
                                   "odd x: expected finite magnitudes up to 1e120, got one that is "
                                   "not, in a batch that was not waited for");
      MomentAccumulator one(48);
      one.update(images_of(good, 1, 2), {norm});
      EXPECT_EQ(odd.rows(), 60);
      const double largest = one.second_moment()[0] + 60;
      for (std::size_t i = 0; i < 48 * 48; ++i) {
        ASSERT_NEAR(odd.second_moment()[i], one.second_moment()[i], kSingle * largest);
      }
    }
  }
}

TEST_F(CudaDevice, CompactMovesWhatTheHostDoes) {
  const std::vector<Layout> layouts{
      {}, {{0, 1, 2}, 2, {}}, {{2, 1, 0}, 1, {}}, {{1, 0, 2}, 1, {1}}};
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : layouts) {
      for (std::size_t axis = 0; axis < 3; ++axis) {
        TestTensor host = batch({17, 19, 23}, 91, dtype, layout);
        const OnDevice device(host);
        const std::vector<std::int64_t> keep{0, 2, 3, 8, 15};
        const MutableTensorView expected = secateur::compact(host.view(), axis, keep);
        const MutableTensorView found = secateur::compact(device.view(), axis, keep);
        EXPECT_EQ(found.shape, expected.shape);
        EXPECT_EQ(found.strides, expected.strides);
        // Of what is no longer part of the result, nothing is promised but that guards stay.
        const std::vector<char> memory = device.memory();
        const auto origin = static_cast<const char*>(expected.data) - host.memory().data();
        const auto size = static_cast<std::int64_t>(item_size(dtype));
        for (const auto& index : indices(expected.shape)) {
          std::int64_t at = origin;
          for (std::size_t a = 0; a < 3; ++a) at += index[a] * expected.strides[a] * size;
          ASSERT_EQ(std::memcmp(memory.data() + at, host.memory().data() + at,
                                static_cast<std::size_t>(size)),
                    0);
        }
      }
    }
  }
}

TEST_F(CudaDevice, WorkIsDoneOnTheViewsStream) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  const TestTensor x = batch({4000, 96}, 95, DType::f32);
  const OnDevice device(x, stream);
  // The view's memory is filled on its stream, behind a kernel's worth of other copies.
  std::vector<char> pinned(x.memory());
  const auto* source = pinned.data();
  auto* to = const_cast<char*>(static_cast<const char*>(device.view().data)) -
             (static_cast<const char*>(x.view().data) - x.memory().data());
  ASSERT_EQ(cudaMemsetAsync(to, 0, pinned.size(), stream), cudaSuccess);
  ASSERT_EQ(cudaMemcpyAsync(to, source, pinned.size(), cudaMemcpyHostToDevice, stream),
            cudaSuccess);
  MomentAccumulator found(96);
  found.update(device);
  expect_moments(found, rows_of(x, {}), "stream");
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  MomentAccumulator later(96);
  later.merge(found);
  EXPECT_EQ(later.rows(), 4000);
}

TEST_F(CudaDevice, RefusesWhatItCannotReach) {
  const TestTensor q = batch({1, 5, 1, 4}, 97, DType::f32);
  AttentionScorer scorer(1, 4);
  TensorView elsewhere = OnDevice(q).view();
  elsewhere.device.index = 63;
  EXPECT_THROW(scorer.update(elsewhere, elsewhere), Unsupported);
  TensorView host = q;
  host.device = {DeviceType::cuda, 0, nullptr};
  expect_error<InvalidArgument>([&] { scorer.update(host, host); },
                                "q: expected memory of cuda:0, got memory of the host");
  EXPECT_EQ(scorer.images(), 0);
}

}  // namespace
