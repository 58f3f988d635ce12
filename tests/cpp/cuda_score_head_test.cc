// The scoring kernel's device functions, run on the host: the code that nvcc compiles, with a block
// of threads that take turns. What this cannot show is how a device runs it.
#include "../../csrc/cuda/score_small_head.h"

#include <algorithm>

#include "reference.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::cuda::Block;
using secateur::cuda::HeadFault;
using secateur::cuda::HeadInput;
using secateur::cuda::HeadScore;
using secateur::cuda::SmallHeadScore;
using secateur::cuda::Team;
using Values = std::vector<double>;

// What issue and documentation promise.
constexpr double kBar = 1e-5;
// What float64 gives where nothing is close to a tie; on bad ground the bar has to do.
constexpr double kUsual = 1e-9;
constexpr double kMaxMagnitude = 1e60;

/// Every test with the general kernel alone, and with that for small heads where they are small.
bool use_small = false;
class CudaScoreHead : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { use_small = std::string(GetParam()) == "small"; }
};
INSTANTIATE_TEST_SUITE_P(Kernels, CudaScoreHead, testing::Values("general", "small"),
                         [](const auto& kernel) { return std::string(kernel.param); });

TestTensor head(DType dtype, std::int64_t tokens, std::int64_t dim, std::uint64_t seed,
                double offset = 0, const Layout& layout = {}) {
  TestTensor tensor(dtype, {tokens, dim}, layout);
  Random random(seed);
  tensor.fill([&](std::int64_t) { return offset + random.normal(); });
  return tensor;
}

reference::Matrix matrix(const TestTensor& x) {
  const Dims& shape = x.view().shape;
  reference::Matrix result(static_cast<std::size_t>(shape[0]), static_cast<std::size_t>(shape[1]));
  for (std::size_t i = 0; i < result.values.size(); ++i) {
    result.values[i] = x.get(static_cast<std::int64_t>(i));
  }
  return result;
}

struct Result {
  HeadFault fault = secateur::cuda::kSound;
  Values values{};
};

template <typename Source>
Result run_as(const TestTensor& q, const TestTensor& k, int gamma, bool moments, const Block& block,
              bool backwards) {
  const MutableTensorView& query = q.view();
  const MutableTensorView& key = k.view();
  HeadInput input{};
  input.query = query.data;
  input.key = key.data;
  input.query_token = query.strides[0];
  input.query_channel = query.strides[1];
  input.key_token = key.strides[0];
  input.key_channel = key.strides[1];
  input.tokens = query.shape[0];
  input.dim = static_cast<int>(query.shape[1]);
  input.limit =
      static_cast<int>(std::min<std::int64_t>(gamma, std::min(query.shape[0], query.shape[1])));
  input.moments = moments;
  Result result;
  result.values.assign(static_cast<std::size_t>(secateur::cuda::result_size(input.dim, moments)),
                       kNaN);
  // A workspace of exactly the size that a device has; NaN shows what nobody wrote.
  if (use_small && input.dim <= secateur::cuda::kSmallHead &&
      input.limit <= secateur::cuda::kSmallLimit) {
    Values work(secateur::cuda::kSmallWork, kNaN);
    const Team team(backwards);
    SmallHeadScore<Source> score(team, input, work.data());
    result.fault = score.run(kMaxMagnitude, result.values.data());
    return result;
  }
  Values work(static_cast<std::size_t>(secateur::cuda::workspace_size(input.dim, input.limit)),
              kNaN);
  result.fault =
      HeadScore<Source>(block, input, work.data()).run(kMaxMagnitude, result.values.data());
  return result;
}

Result run(const TestTensor& q, const TestTensor& k, int gamma = 8, bool moments = false,
           const Block& block = Block(5), bool backwards = false) {
  switch (q.view().dtype) {
    case DType::f16:
      return run_as<secateur::cuda::Half>(q, k, gamma, moments, block, backwards);
    case DType::bf16:
      return run_as<secateur::cuda::BFloat>(q, k, gamma, moments, block, backwards);
    case DType::f32:
      return run_as<float>(q, k, gamma, moments, block, backwards);
    case DType::f64:
      break;
  }
  return run_as<double>(q, k, gamma, moments, block, backwards);
}

struct Comparison {
  bool comparable = false;
  double error = kInf;
};

Comparison compare(const TestTensor& q, const TestTensor& k, int gamma) {
  const Result mine = run(q, k, gamma);
  EXPECT_EQ(mine.fault, secateur::cuda::kSound);
  const auto literal =
      reference::attention_scores(matrix(q), matrix(k), static_cast<std::size_t>(gamma));
  Comparison result{literal.comparable, 0};
  for (std::size_t i = 0; i < literal.omega.size(); ++i) {
    const double error = std::fabs(mine.values[i] - literal.omega[i]);
    result.error = std::isnan(error) ? kInf : std::max(result.error, error);
  }
  return result;
}

void expect_within(const Comparison& found, double bar, const std::string& what) {
  EXPECT_TRUE(found.comparable) << what;
  EXPECT_LT(found.error, bar) << what;
}

TEST_P(CudaScoreHead, MatchesTheSvdForEverySize) {
  std::vector<std::int64_t> sizes = kSizes;
  sizes.insert(sizes.end(), {2, 5, 96, 128});
  for (const std::int64_t d : sizes) {
    // Fewer tokens than neurons, about as many, more.
    for (const std::int64_t n : {(d + 1) / 2, d, d + 9}) {
      if (d > 65 && n > d) continue;  // the literal's N×N SVD would take the minute
      for (const int gamma : {3, static_cast<int>(d) + 5}) {
        if (d > 65 && gamma > 3) continue;
        const std::string what =
            std::to_string(n) + "x" + std::to_string(d) + " gamma " + std::to_string(gamma);
        expect_within(compare(head(DType::f64, n, d, 1), head(DType::f64, n, d, 2), gamma), kUsual,
                      what);
      }
    }
  }
}

TEST_P(CudaScoreHead, MatchesTheSvdForEveryDTypeAndLayout) {
  const std::vector<Layout> layouts{{}, {{0, 1}, 3, {}}, {{1, 0}, 1, {}}, {{1, 0}, 2, {0, 1}}};
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : layouts) {
      for (const std::int64_t n : {7, 50}) {
        const std::string what = std::string(secateur::name(dtype)) + " " + std::to_string(n);
        expect_within(compare(head(dtype, n, 17, 5, 0, layout), head(dtype, n, 17, 6), 8), kUsual,
                      what);
        expect_within(compare(head(dtype, n, 17, 7), head(dtype, n, 17, 8, 0, layout), 8), kUsual,
                      what);
      }
    }
  }
}

// As trained models are: a few directions hold nearly all, and the Grams are singular to rounding.
TEST_P(CudaScoreHead, NearlySingularGrams) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t d : {8, 33, 64}) {
      TestTensor q = head(dtype, 65, d, 71), k = head(dtype, 65, d, 72);
      for (TestTensor* x : {&q, &k}) {
        Random random(73);
        Values basis(static_cast<std::size_t>(4 * d));
        for (double& value : basis) value = random.normal();
        for (std::int64_t t = 0; t < 65; ++t) {
          double part[4];
          for (int r = 0; r < 4; ++r) part[r] = random.normal() * (4 - r);
          for (std::int64_t c = 0; c < d; ++c) {
            double value = 1e-6 * x->get(t * d + c);
            for (int r = 0; r < 4; ++r)
              value += part[r] * basis[static_cast<std::size_t>(r * d + c)];
            x->set(t * d + c, value);
          }
        }
      }
      expect_within(compare(q, k, 3), kBar,
                    std::string(secateur::name(dtype)) + " " + std::to_string(d));
    }
  }
}

// 16-bit types hold few digits of 1000 + x: what they do hold is what counts.
TEST_P(CudaScoreHead, SharedOffsetsDoNotCancel) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t d : {3, 16, 33, 64}) {
      const std::string what = std::string(secateur::name(dtype)) + " " + std::to_string(d);
      const Comparison both =
          compare(head(dtype, d + 20, d, 11, 1000), head(dtype, d + 20, d, 12, 1000), 8);
      EXPECT_LT(both.comparable ? both.error : 0, kBar) << what;
      const Comparison keys =
          compare(head(dtype, d + 20, d, 13), head(dtype, d + 20, d, 14, 1000), 8);
      EXPECT_LT(keys.comparable ? keys.error : 0, kBar) << what;
      EXPECT_TRUE(both.comparable || keys.comparable) << what;
    }
  }
}

// Neurons that are zero, that are the same as another, and that say nothing in the other matrix.
TEST_P(CudaScoreHead, ZeroAndDuplicateNeurons) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t d : {4, 9, 33}) {
      for (const std::int64_t n : {d - 1, d + 30}) {
        TestTensor q = head(dtype, n, d, 21), k = head(dtype, n, d, 22);
        for (std::int64_t t = 0; t < n; ++t) {
          q.set(t * d + 1, 0);
          k.set(t * d + 2, 0);
          q.set(t * d + 3, q.get(t * d));
        }
        const Comparison found = compare(q, k, 6);
        expect_within(found, kBar, std::string(secateur::name(dtype)) + " " + std::to_string(d));
        const Values scores = run(q, k).values;
        EXPECT_EQ(scores[1], 0);
        EXPECT_EQ(scores[2], 0);
        // All the same: one singular value.
        for (std::int64_t i = 0; i < n * d; ++i) {
          q.set(i, q.get(i / d * d));
          k.set(i, k.get(i / d * d));
        }
        expect_within(compare(q, k, 6), kBar, "rank one");
      }
    }
  }
}

TEST_P(CudaScoreHead, NothingScoresNothing) {
  TestTensor q = head(DType::f32, 9, 5, 1);
  q.fill([](std::int64_t) { return 0; });
  const Result result = run(q, head(DType::f32, 9, 5, 2));
  EXPECT_EQ(result.fault, secateur::cuda::kSound);
  EXPECT_EQ(result.values, Values(5, 0.0));
}

// Tied singular values leave the score undefined, but not its sum over the tied ones' span: with
// orthogonal neurons of one norm the neurons' shares add up to what the leading γ take.
TEST_P(CudaScoreHead, TiedSingularValues) {
  for (const std::int64_t d : {2, 8, 31, 64}) {
    TestTensor q(DType::f64, {d, d}), k(DType::f64, {d, d});
    const auto identity = [d](std::int64_t i) { return i / d == i % d ? 1.0 : 0.0; };
    q.fill(identity);
    k.fill(identity);
    for (const int gamma : {1, 3, 8}) {
      const Values scores = run(q, k, gamma).values;
      double sum = 0;
      for (const double score : scores) {
        EXPECT_GE(score, 0);
        sum += score;
      }
      EXPECT_NEAR(sum, std::min<double>(gamma, static_cast<double>(d)), 1e-9) << d;
    }
    // All of them: orthogonal vectors, or a neuron's share would not be 1.
    for (const double score : run(q, k, static_cast<int>(d)).values) EXPECT_NEAR(score, 1, 1e-9);
  }
}

// Every thread count and order gives the same bits: no phase depends on itself.
TEST_P(CudaScoreHead, SameBitsForAnyThreads) {
  for (const std::int64_t d : {5, 16, 33}) {
    const TestTensor q = head(DType::bf16, 50, d, 31), k = head(DType::bf16, 50, d, 32, 3);
    const Values one = run(q, k, 8, true, Block(1)).values;
    for (const int threads : {2, 7, 32, 256}) {
      for (const bool backwards : {false, true}) {
        EXPECT_EQ(one, run(q, k, 8, true, Block(threads, backwards), backwards).values) << threads;
      }
    }
  }
}

TEST_P(CudaScoreHead, MomentsAreTheGrams) {
  for (const DType dtype : kDTypes) {
    for (const double offset : {0.0, 50.0}) {
      const std::int64_t n = 45, d = 13;
      const TestTensor q = head(dtype, n, d, 41), k = head(dtype, n, d, 42, offset);
      const Values found = run(q, k, 4, true).values;
      const reference::Matrix queries = reference::gram(matrix(q), false);
      const reference::Matrix keys = reference::gram(matrix(k), true);
      const std::size_t packed = d * (d + 1) / 2;
      std::size_t at = d;
      for (std::size_t i = 0; i < d; ++i) {
        for (std::size_t j = i; j < d; ++j, ++at) {
          const double query = queries(i, j), key = keys(i, j);
          const double scale = std::sqrt(queries(i, i) * queries(j, j));
          const double key_scale = std::sqrt(keys(i, i) * keys(j, j));
          EXPECT_NEAR(found[at], query, 1e-13 * scale);
          EXPECT_NEAR(found[at + packed], key, 1e-12 * key_scale);
          EXPECT_NEAR(found[at + 2 * packed], query * key, 1e-12 * scale * key_scale);
        }
      }
    }
  }
}

TEST_P(CudaScoreHead, ScaleDoesNotMatter) {
  const Values plain = run(head(DType::f64, 25, 17, 51), head(DType::f64, 25, 17, 52)).values;
  for (const double scale : {0x1p-900, 0x1p-40, 0x1p40, 0x1p900}) {
    TestTensor q = head(DType::f64, 25, 17, 51), k = head(DType::f64, 25, 17, 52);
    for (std::int64_t i = 0; i < 25 * 17; ++i) {
      q.set(i, q.get(i) * scale);
      k.set(i, k.get(i) / scale);
    }
    EXPECT_EQ(plain, run(q, k).values) << scale;
  }
}

TEST_P(CudaScoreHead, FaultsAreFound) {
  for (const DType dtype : kDTypes) {
    for (const double value : {kNaN, kInf, -kInf}) {
      for (const bool in_keys : {false, true}) {
        TestTensor q = head(dtype, 30, 6, 61), k = head(dtype, 30, 6, 62);
        (in_keys ? k : q).set(29 * 6 + 5, value);
        EXPECT_EQ(run(q, k).fault, secateur::cuda::kNotFinite) << value << " " << in_keys;
      }
    }
  }
  TestTensor q = head(DType::f64, 30, 6, 63);
  q.set(4, 2e60);
  EXPECT_EQ(run(q, q, 8, true).fault, secateur::cuda::kTooLarge);
  EXPECT_EQ(run(q, q, 8, false).fault, secateur::cuda::kSound);
}

// Every 16-bit pattern, against the definition.
TEST_P(CudaScoreHead, ReadsEvery16BitNumber) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto small = static_cast<std::uint16_t>(bits);
    const char* at = reinterpret_cast<const char*>(&small);
    const double half = secateur::cuda::to_double(secateur::cuda::Half{small});
    const double brain = secateur::cuda::to_double(secateur::cuda::BFloat{small});
    const double wanted_half = decode(DType::f16, at), wanted_brain = decode(DType::bf16, at);
    ASSERT_TRUE(half == wanted_half || (std::isnan(half) && std::isnan(wanted_half))) << bits;
    ASSERT_TRUE(brain == wanted_brain || (std::isnan(brain) && std::isnan(wanted_brain))) << bits;
  }
}

}  // namespace
