#include <algorithm>
#include <numeric>

#include "reference.h"
#include "test_tensor.h"

namespace {

using namespace secateur_test;
using secateur::AttentionScorer;
using secateur::AttentionScorerState;
using secateur::InvalidArgument;
using secateur::NumericalError;
using Values = std::vector<double>;

/// A batch of queries or keys, (images, tokens, heads, dim), from one function of its index.
TestTensor batch(const Dims& shape, std::uint64_t seed, DType dtype = DType::f64,
                 const Layout& layout = {}, double offset = 0, double scale = 1) {
  TestTensor tensor(dtype, shape, layout);
  Random random(seed);
  tensor.fill([&](std::int64_t) { return scale * (offset + random.normal()); });
  return tensor;
}

Values scores_of(const TensorView& q, const TensorView& k, std::int64_t gamma = 8) {
  AttentionScorer scorer(q.shape[2], q.shape[3], gamma);
  scorer.update(q, k);
  return scorer.scores();
}

/// Gram-Schmidt, twice.
void orthonormalise(reference::Matrix& a) {
  for (int round = 0; round < 2; ++round) {
    for (std::size_t j = 0; j < a.columns; ++j) {
      for (std::size_t i = 0; i <= j; ++i) {
        double dot = 0;
        for (std::size_t r = 0; r < a.rows; ++r) dot += a(r, i) * a(r, j);
        for (std::size_t r = 0; r < a.rows; ++r) {
          a(r, j) = i < j ? a(r, j) - dot * a(r, i) : a(r, j) / std::sqrt(dot);
        }
      }
    }
  }
}

/// Adds half of neuron i to neuron i + 1 in q, and takes half of neuron i + 1 from neuron i in k:
/// Q Kᵀ stays as it is.
void mix(TestTensor& q, TestTensor& k, std::int64_t d) {
  for (std::int64_t i = 0; i < q.view().numel(); ++i) {
    if (i % d > 0) q.set(i, q.get(i) + 0.5 * q.get(i - 1));
  }
  for (std::int64_t i = 0; i < k.view().numel(); ++i) {
    if (i % d < d - 1) k.set(i, k.get(i) - 0.5 * k.get(i + 1));
  }
}

struct Comparison {
  int heads = 0;     ///< compared
  double error = 0;  ///< largest absolute difference
};

/// The library's scores against the literal SVD, heads with ties left out.
Comparison compare(const TestTensor& q, const TestTensor& k, std::int64_t gamma) {
  const Dims& shape = q.view().shape;
  const Values scores = scores_of(q, k, gamma);
  Comparison result;
  for (std::int64_t h = 0; h < shape[2]; ++h) {
    Values mean(static_cast<std::size_t>(shape[3]), 0.0);
    bool comparable = true;
    for (std::int64_t b = 0; b < shape[0]; ++b) {
      const auto literal = reference::attention_scores(head_of(q, b, h), head_of(k, b, h),
                                                       static_cast<std::size_t>(gamma));
      comparable = comparable && literal.comparable;
      for (std::size_t i = 0; i < mean.size(); ++i) {
        mean[i] += literal.omega[i] / static_cast<double>(shape[0]);
      }
    }
    if (!comparable) continue;
    ++result.heads;
    for (std::size_t i = 0; i < mean.size(); ++i) {
      const double mine = scores[static_cast<std::size_t>(h) * mean.size() + i];
      const double error = std::fabs(mine - mean[i]);
      result.error = std::isnan(error) ? kInf : std::max(result.error, error);
    }
  }
  return result;
}

TEST(AttentionScorer, MatchesTheSvdForEverySize) {
  for (const std::int64_t d : kSizes) {
    // Fewer tokens than neurons, about as many, more.
    for (const std::int64_t n : {(d + 1) / 2, d, d + 9}) {
      const Dims shape{2, n, 2, d};
      for (const std::int64_t gamma : {std::int64_t{3}, d + 5}) {
        const Comparison result = compare(batch(shape, 1), batch(shape, 2), gamma);
        EXPECT_EQ(result.heads, 2) << to_string(shape);
        EXPECT_LT(result.error, 1e-9) << to_string(shape) << " gamma " << gamma;
      }
    }
  }
}

// More rows than one block of the kernels.
TEST(AttentionScorer, MatchesTheSvdForManyTokens) {
  for (const std::int64_t n : {255, 256, 257}) {
    const Dims shape{1, n, 1, 8};
    const Comparison result = compare(batch(shape, 3), batch(shape, 4), 8);
    EXPECT_EQ(result.heads, 1);
    EXPECT_LT(result.error, 1e-11);
  }
}

TEST(AttentionScorer, MatchesTheSvdForEveryDTypeAndLayout) {
  const std::vector<Layout> layouts{
      {},
      {{0, 2, 1, 3}, 1, {}},         // (B, H, N, d) in memory, as timm's modules have it
      {{0, 1, 2, 3}, 3, {}},         // gaps, as in a fused qkv
      {{0, 2, 3, 1}, 1, {}},         // channels not adjacent
      {{3, 1, 0, 2}, 2, {0, 1, 3}},  // backwards
  };
  for (const DType dtype : kDTypes) {
    for (const Layout& layout : layouts) {
      const Dims shape{2, 20, 3, 17};
      const Comparison result = compare(batch(shape, 5, dtype, layout), batch(shape, 6, dtype), 8);
      EXPECT_EQ(result.heads, 3);
      EXPECT_LT(result.error, 1e-11);
      const Comparison swapped = compare(batch(shape, 7, dtype), batch(shape, 8, dtype, layout), 8);
      EXPECT_EQ(swapped.heads, 3);
      EXPECT_LT(swapped.error, 1e-11);
    }
  }
}

// The layout is no part of the values.
TEST(AttentionScorer, SameBitsForEveryLayout) {
  const Dims shape{2, 30, 2, 24};
  const TestTensor k = batch(shape, 9, DType::f32);
  const Values plain = scores_of(batch(shape, 10, DType::f32), k);
  EXPECT_EQ(plain, scores_of(batch(shape, 10, DType::f32, {{3, 1, 0, 2}, 2, {0, 3}}), k));
}

TEST(AttentionScorer, SharedOffsetsDoNotCancel) {
  int heads = 0;
  for (const std::int64_t d : {3, 16, 33, 64}) {
    const Dims shape{1, d + 20, 2, d};
    const Comparison both =
        compare(batch(shape, 11, DType::f64, {}, 1000), batch(shape, 12, DType::f64, {}, 1000), 8);
    EXPECT_LT(both.error, 1e-8) << d;
    const Comparison keys = compare(batch(shape, 13), batch(shape, 14, DType::f64, {}, 1000), 8);
    EXPECT_LT(keys.error, 1e-8) << d;
    heads += both.heads + keys.heads;
  }
  EXPECT_GE(heads, 12);
}

TEST(AttentionScorer, ScaleDoesNotMatter) {
  const Dims shape{1, 25, 2, 17};
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    for (const double q_scale : {1e-12, 1.0, 1e12}) {
      for (const double k_scale : {1e-12, 1e12}) {
        const Comparison result = compare(batch(shape, 15, dtype, {}, 0, q_scale),
                                          batch(shape, 16, dtype, {}, 0, k_scale), 8);
        EXPECT_EQ(result.heads, 2);
        EXPECT_LT(result.error, 1e-11) << q_scale << " " << k_scale;
      }
    }
  }
  // Powers of two change no mantissa, so no bit; even where squares would overflow or vanish.
  const Values scores = scores_of(batch(shape, 15), batch(shape, 16));
  for (const double scale : {0x1p-900, 0x1p-40, 0x1p40, 0x1p900}) {
    EXPECT_EQ(scores, scores_of(batch(shape, 15, DType::f64, {}, 0, scale),
                                batch(shape, 16, DType::f64, {}, 0, 1 / scale)));
  }
}

// Neurons of one head whose scales lie twelve orders apart.
TEST(AttentionScorer, NeuronsOfDifferentScale) {
  const Dims shape{1, 40, 1, 12};
  TestTensor q = batch(shape, 17), k = batch(shape, 18);
  for (std::int64_t i = 0; i < q.view().numel(); ++i) {
    const double scale = std::pow(10.0, static_cast<double>(i % 12) - 6);
    q.set(i, q.get(i) * scale);
    k.set(i, k.get(i) / scale);
  }
  const Comparison result = compare(q, k, 4);
  EXPECT_EQ(result.heads, 1);
  EXPECT_LT(result.error, 1e-9);
}

TEST(AttentionScorer, ZeroNeuronsAndHeadsScoreZero) {
  const Dims shape{1, 12, 3, 9};
  TestTensor q = batch(shape, 19), k = batch(shape, 20);
  for (std::int64_t i = 0; i < q.view().numel(); ++i) {
    const std::int64_t head = i / 9 % 3, channel = i % 9;
    if (head == 0 && channel == 4) q.set(i, 0);
    if (head == 0 && channel == 8) k.set(i, 0);
    if (head == 1) q.set(i, 0);
  }
  const Values scores = scores_of(q, k);
  EXPECT_EQ(scores[4], 0);
  EXPECT_EQ(scores[8], 0);
  EXPECT_GT(scores[3], 0);
  for (std::size_t i = 9; i < 18; ++i) EXPECT_EQ(scores[i], 0);
  const Comparison result = compare(q, k, 8);
  EXPECT_EQ(result.heads, 3);
  EXPECT_LT(result.error, 1e-11);
}

TEST(AttentionScorer, DuplicateAndDependentNeurons) {
  for (const std::int64_t d : {4, 17, 64}) {
    const Dims shape{1, 2 * d, 1, d};
    TestTensor q = batch(shape, 21), k = batch(shape, 22);
    for (std::int64_t n = 0; n < 2 * d; ++n) {
      // Neuron 1 is neuron 0, and neuron 3 is −2 times neuron 2: singular Grams.
      q.set(n * d + 1, q.get(n * d));
      k.set(n * d + 1, k.get(n * d));
      q.set(n * d + 3, -2 * q.get(n * d + 2));
      k.set(n * d + 3, k.get(n * d + 2));
    }
    // Within the rank, and beyond it.
    for (const std::int64_t gamma : {d - 3, d + 5}) {
      const Comparison result = compare(q, k, gamma);
      EXPECT_EQ(result.heads, 1);
      EXPECT_LT(result.error, 1e-8) << d << " gamma " << gamma;
    }
    const Values scores = scores_of(q, k);
    EXPECT_NEAR(scores[0], scores[1], 1e-8);
    EXPECT_NEAR(scores[2], scores[3], 1e-8);
  }
}

// Heads of every kind side by side, more of them than vectors have lanes: none changes another.
TEST(AttentionScorer, HeadsDoNotInfluenceEachOther) {
  const std::int64_t heads = 11, n = 29;
  for (const std::int64_t d : {5, 16, 31}) {
    const Dims shape{3, n, heads, d};
    TestTensor q = batch(shape, 57), k = batch(shape, 58);
    for (std::int64_t i = 0; i < q.view().numel(); ++i) {
      const std::int64_t channel = i % d, head = i / d % heads, token = i / d / heads % n;
      if (head == 1) q.set(i, 0);
      if (head == 2) k.set(i, 0);
      if (head == 3) q.set(i, q.get(i) * 1e150);
      if (head == 4) k.set(i, k.get(i) * 1e-150);
      if (head == 5 && channel == 1) q.set(i, q.get(i - 1));
      if (head == 6) q.set(i, channel == token ? 1 : 0);  // all singular values tie
      if (head == 6) k.set(i, channel == token ? 1 : 0);
      if (head == 7) q.set(i, q.get(i) * std::pow(0.1, static_cast<double>(channel)));
      if (head == 8) k.set(i, 1000 + k.get(i));
      if (head == 9 && token > 2) q.set(i, 0);
    }
    const Values together = scores_of(q, k);
    for (std::int64_t h = 0; h < heads; ++h) {
      TensorView left = q, right = k;
      for (TensorView* view : {&left, &right}) {
        view->data = static_cast<const double*>(view->data) + h * view->strides[2];
        view->shape[2] = 1;
      }
      const Values alone = scores_of(left, right);
      for (std::size_t i = 0; i < alone.size(); ++i) {
        EXPECT_EQ(together[static_cast<std::size_t>(h * d) + i], alone[i]) << d << " head " << h;
      }
    }
  }
}

// Dead channels beside a live one, down to where squares of what is left of them vanish: among
// ordinary heads, and as a head too large for lanes.
TEST(AttentionScorer, ChannelsThatAreAlmostZero) {
  for (const double small : {1e-39, 1e-76, 1e-78, 1e-80, 1e-120, 1e-160, 1e-300, 5e-324}) {
    for (const std::int64_t d : {9, 33, 130}) {
      const Dims shape{1, 40, 3, d};
      TestTensor q = batch(shape, 61), k = batch(shape, 62);
      for (std::int64_t i = 0; i < q.view().numel(); ++i) {
        const std::int64_t channel = i % d, head = i / d % 3;
        if (head == 1 && channel != 4) q.set(i, q.get(i) * small);
        if (head == 1 && channel != 4) k.set(i, k.get(i) * small);
        // Strong where the other is weak.
        if (head == 2 && channel != 4) q.set(i, q.get(i) * small);
        if (head == 2 && channel == 4) k.set(i, k.get(i) * small);
      }
      const Values scores = scores_of(q, k);
      for (const double score : scores) {
        ASSERT_TRUE(std::isfinite(score)) << small << " " << d;
        EXPECT_GE(score, 0);
        EXPECT_LE(score, 8 + 1e-9);
      }
      // What head 1 does is channel 4's doing.
      EXPECT_NEAR(scores[static_cast<std::size_t>(d + 4)], 1, 1e-9) << small << " " << d;
    }
  }
}

// Where all singular values tie no basis is the right one, but with q = k orthonormal
// Σ_j |A_ij| |B_ij| = Σ_j A_ij²: 1 for γ >= d, and γ over all neurons.
TEST(AttentionScorer, TiedSingularValues) {
  for (const std::int64_t d : kSizes) {
    const Dims shape{2, d, 5, d};
    TestTensor q(DType::f64, shape);
    q.fill([&](std::int64_t i) { return i % d == i / d / 5 % d ? 3.0 : 0.0; });
    for (const double score : scores_of(q, q, d)) EXPECT_NEAR(score, 1, 1e-12) << d;
    const Values few = scores_of(q, q, 2);
    for (auto head = few.begin(); head != few.end(); head += d) {
      EXPECT_NEAR(std::accumulate(head, head + d, 0.0), d > 1 ? 2 : 1, 1e-12) << d;
    }
  }
}

// Pairs of singular values that lie closer and closer, on both sides of what lanes can tell apart.
TEST(AttentionScorer, CloseSingularValues) {
  const std::int64_t n = 40, d = 12;
  int compared = 0;
  for (const double gap : {1e-2, 1e-4, 2e-5, 1e-8}) {
    const TestTensor left = batch({1, n, 1, d}, 59), right = batch({1, n, 1, d}, 60);
    reference::Matrix u = head_of(left, 0, 0), v = head_of(right, 0, 0);
    for (reference::Matrix* basis : {&u, &v}) orthonormalise(*basis);
    const Dims shape{1, n, 1, d};
    TestTensor q(DType::f64, shape), k(DType::f64, shape);
    for (std::int64_t i = 0; i < n * d; ++i) {
      const auto token = static_cast<std::size_t>(i / d), channel = static_cast<std::size_t>(i % d);
      const double pair = static_cast<double>(channel / 2) + 1;
      // Pairs of values that are close themselves, or that have close squares far below the first.
      const double sigma = gap > 1e-5     ? (channel % 2 == 0 ? 1 : 1 - gap) / (pair * pair * pair)
                           : channel == 0 ? 1
                                          : std::sqrt(gap) / static_cast<double>(channel);
      q.set(i, u(token, channel) * sigma);
      k.set(i, v(token, channel));
    }
    // A change of basis that leaves Q Kᵀ alone, so that neurons and singular directions differ.
    mix(q, k, d);
    const Comparison result = compare(q, k, 8);
    compared += result.heads;
    EXPECT_LT(result.error, gap > 1e-5 ? 1e-7 : 1e-6) << gap;
  }
  EXPECT_EQ(compared, 4);
}

// As in trained models: a few strong directions, then a fast decay.
TEST(AttentionScorer, DecayingSpectra) {
  const std::int64_t n = 60, d = 32;
  const Dims shape{1, n, 1, d};
  Random random(23);
  TestTensor q(DType::f64, shape), k(DType::f64, shape);
  for (TestTensor* x : {&q, &k}) {
    const TestTensor left = batch({1, n, 1, d}, 24), right = batch({1, d, 1, d}, 25);
    x->fill([&](std::int64_t i) {
      double sum = 1e-5 * random.normal();
      for (std::int64_t r = 0; r < 8; ++r) {
        sum += std::pow(4.0, -static_cast<double>(r)) * left.get(i / d * d + r) *
               right.get(r * d + i % d);
      }
      return sum;
    });
  }
  const Comparison result = compare(q, k, 6);
  EXPECT_EQ(result.heads, 1);
  EXPECT_LT(result.error, 1e-8);
}

TEST(AttentionScorer, MomentsAreTheGrams) {
  for (const double offset : {0.0, 1000.0}) {
    for (const std::int64_t d : {1, 7, 16, 33}) {
      const Dims shape{3, 21, 2, d};
      const TestTensor q = batch(shape, 26, DType::f64, {}, offset);
      const TestTensor k = batch(shape, 27, DType::f64, {}, offset);
      AttentionScorer scorer(2, d, 8, true);
      scorer.update(q, k);
      const Values query = scorer.query_gram(), key = scorer.key_gram();
      const Values score = scorer.score_gram();
      const auto size = static_cast<std::size_t>(d * d);
      ASSERT_EQ(query.size(), 2 * size);
      for (std::int64_t h = 0; h < 2; ++h) {
        Values wanted_query(size), wanted_key(size), wanted_score(size);
        for (std::int64_t b = 0; b < 3; ++b) {
          const auto gram_q = reference::gram(head_of(q, b, h), false);
          const auto gram_k = reference::gram(head_of(k, b, h), true);
          for (std::size_t i = 0; i < size; ++i) {
            wanted_query[i] += gram_q.values[i];
            wanted_key[i] += gram_k.values[i];
            wanted_score[i] += gram_q.values[i] * gram_k.values[i];
          }
        }
        // Against sqrt(G_ii G_jj): an element may be small by chance.
        const auto near = [&](const Values& mine, const Values& wanted, const char* what) {
          for (std::size_t i = 0; i < size; ++i) {
            const auto n = static_cast<std::size_t>(d);
            const double scale = std::sqrt(wanted[i / n * (n + 1)] * wanted[i % n * (n + 1)]);
            EXPECT_NEAR(mine[static_cast<std::size_t>(h) * size + i], wanted[i], 1e-12 * scale)
                << what << " " << d << " " << offset;
          }
        };
        near(query, wanted_query, "query_gram");
        near(key, wanted_key, "key_gram");
        near(score, wanted_score, "score_gram");
      }
      // The scores do not depend on whether moments are wanted.
      EXPECT_EQ(scorer.scores(), scores_of(q, k));
    }
  }
}

TEST(AttentionScorer, MomentsKeepTheUnitsOfTheInput) {
  const Dims shape{1, 10, 1, 5};
  for (const double scale : {0x1p-40, 0x1p100}) {
    AttentionScorer plain(1, 5, 8, true), scaled(1, 5, 8, true);
    plain.update(batch(shape, 28), batch(shape, 29));
    scaled.update(batch(shape, 28, DType::f64, {}, 0, scale), batch(shape, 29));
    for (std::size_t i = 0; i < 25; ++i) {
      EXPECT_EQ(scaled.query_gram()[i], plain.query_gram()[i] * scale * scale);
      EXPECT_EQ(scaled.key_gram()[i], plain.key_gram()[i]);
      EXPECT_EQ(scaled.score_gram()[i], plain.score_gram()[i] * scale * scale);
    }
  }
}

void expect_same(const AttentionScorerState& a, const AttentionScorerState& b) {
  EXPECT_EQ(a.images, b.images);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.score_sum, b.score_sum);
  EXPECT_EQ(a.query_gram, b.query_gram);
  EXPECT_EQ(a.key_gram, b.key_gram);
  EXPECT_EQ(a.score_gram, b.score_gram);
}

TEST(AttentionScorer, SameBitsForAnyThreadsAndAnySplit) {
  const Dims shape{7, 19, 3, 17};
  const TestTensor q = batch(shape, 30, DType::f32), k = batch(shape, 31, DType::f32);
  const auto slice = [](const TestTensor& x, std::int64_t begin, std::int64_t count) {
    TensorView view = x;
    view.data = static_cast<const char*>(view.data) + begin * view.strides[0] * 4;
    view.shape[0] = count;
    return view;
  };
  AttentionScorer whole(3, 17, 8, true);
  {
    const Threads one(1);
    whole.update(q, k);
  }
  EXPECT_EQ(whole.images(), 7);
  EXPECT_EQ(whole.state().tokens, 7 * 19);
  for (const int threads : {1, 2, 3, 5}) {
    const Threads set(threads);
    for (const std::int64_t step : {1, 2, 3, 7}) {
      AttentionScorer split(3, 17, 8, true);
      for (std::int64_t b = 0; b < 7; b += step) {
        const std::int64_t count = std::min<std::int64_t>(step, 7 - b);
        split.update(slice(q, b, count), slice(k, b, count));
      }
      expect_same(split.state(), whole.state());
    }
  }
}

// So many results that they are added up in several rounds.
TEST(AttentionScorer, LargeBatchesInRounds) {
  const Dims shape{24, 2, 16, 96};  // 1.8 MB of results per image, 32 MB at a time
  const TestTensor q = batch(shape, 32, DType::f32), k = batch(shape, 33, DType::f32);
  AttentionScorer whole(16, 96, 1, true), single(16, 96, 1, true);
  whole.update(q, k);
  for (std::int64_t b = 0; b < 24; ++b) {
    TensorView left = q, right = k;
    left.data = static_cast<const char*>(left.data) + b * left.strides[0] * 4;
    right.data = static_cast<const char*>(right.data) + b * right.strides[0] * 4;
    left.shape[0] = right.shape[0] = 1;
    single.update(left, right);
  }
  expect_same(whole.state(), single.state());
}

TEST(AttentionScorer, MergeAddsUp) {
  const Dims shape{2, 11, 2, 9};
  AttentionScorer a(2, 9, 8, true), b(2, 9, 8, true), both(2, 9, 8, true);
  a.update(batch(shape, 34), batch(shape, 35));
  b.update(batch(shape, 36), batch(shape, 37));
  both.update(batch(shape, 34), batch(shape, 35));
  both.update(batch(shape, 36), batch(shape, 37));
  a.merge(b);
  EXPECT_EQ(a.images(), 4);
  EXPECT_EQ(a.state().tokens, 44);
  const auto near = [](const Values& x, const Values& y) {
    ASSERT_EQ(x.size(), y.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      EXPECT_NEAR(x[i], y[i], 1e-13 * (1 + std::fabs(y[i])));
    }
  };
  near(a.scores(), both.scores());
  near(a.query_gram(), both.query_gram());
  near(a.key_gram(), both.key_gram());
  near(a.score_gram(), both.score_gram());
  a.merge(a);
  EXPECT_EQ(a.images(), 8);
  near(a.scores(), both.scores());
}

TEST(AttentionScorer, MergeRefusesAnotherKind) {
  AttentionScorer scorer(2, 4, 8, false, "blocks.0.attn");
  const auto refused = [&](const AttentionScorer& other, const std::string& text) {
    expect_error<InvalidArgument>([&] { scorer.merge(other); }, "blocks.0.attn other: " + text);
  };
  refused(AttentionScorer(3, 4), "expected heads 2, got 3");
  refused(AttentionScorer(2, 5), "expected head_dim 4, got 5");
  refused(AttentionScorer(2, 4, 9), "expected gamma 8, got 9");
  refused(AttentionScorer(2, 4, 8, true), "expected a scorer without moments, got one with");
  AttentionScorer with(2, 4, 8, true);
  expect_error<InvalidArgument>([&] { with.merge(AttentionScorer(2, 4)); },
                                "other: expected a scorer with moments, got one without");
}

TEST(AttentionScorer, StateRoundTrip) {
  const Dims shape{2, 11, 2, 9};
  AttentionScorer first(2, 9, 8, true), second(2, 9, 8, true), straight(2, 9, 8, true);
  first.update(batch(shape, 38), batch(shape, 39));
  second.load_state(first.state());
  expect_same(second.state(), first.state());
  second.update(batch(shape, 40), batch(shape, 41));
  straight.update(batch(shape, 38), batch(shape, 39));
  straight.update(batch(shape, 40), batch(shape, 41));
  expect_same(second.state(), straight.state());
}

TEST(AttentionScorer, BadStatesChangeNothing) {
  AttentionScorer scorer(1, 2, 8, true, "attn");
  scorer.update(batch({2, 3, 1, 2}, 42), batch({2, 3, 1, 2}, 43));
  const AttentionScorerState good = scorer.state();
  const auto state = [&](auto change) {
    AttentionScorerState copy = good;
    change(copy);
    return [&scorer, copy] { scorer.load_state(copy); };
  };
  using State = AttentionScorerState;
  expect_error<InvalidArgument>(state([](State& s) { s.images = -1; }),
                                "attn images: expected at least 0, got -1");
  expect_error<InvalidArgument>(state([](State& s) { s.tokens = 1; }),
                                "attn tokens: expected at least 2, got 1");
  expect_error<InvalidArgument>(state([](State& s) { s.score_sum.pop_back(); }),
                                "attn score_sum: expected 2 values, got 1");
  expect_error<InvalidArgument>(state([](State& s) { s.query_gram.clear(); }),
                                "attn query_gram: expected 3 values, got 0");
  expect_error<InvalidArgument>(state([](State& s) { s.key_gram.push_back(0); }),
                                "attn key_gram: expected 3 values, got 4");
  expect_error<InvalidArgument>(state([](State& s) { s.score_gram.clear(); }),
                                "attn score_gram: expected 3 values, got 0");
  expect_error<NumericalError>(state([](State& s) { s.score_sum[1] = kNaN; }),
                               "attn score_sum: expected finite values, got nan at 1");
  expect_error<NumericalError>(state([](State& s) { s.score_gram[2] = -kInf; }),
                               "attn score_gram: expected finite values, got -inf at 2");
  expect_same(scorer.state(), good);
}

TEST(AttentionScorer, NonFiniteBatchesLeaveNoTrace) {
  const Dims shape{2, 6, 3, 40};
  for (const DType dtype : kDTypes) {
    for (const double bad : {kNaN, kInf, -kInf}) {
      AttentionScorer scorer(3, 40, 8, true, "blocks.3.attn");
      scorer.update(batch(shape, 44, dtype), batch(shape, 45, dtype));
      const AttentionScorerState before = scorer.state();
      const std::string text = std::isnan(bad) ? "nan" : bad < 0 ? "-inf" : "inf";
      // In the vectorised part of a row and in its rest; the first of several is named.
      for (const std::int64_t channel : {7, 39}) {
        TestTensor q = batch(shape, 46, dtype), k = batch(shape, 47, dtype);
        q.set(((1 * 6 + 5) * 3 + 0) * 40 + channel, bad);
        q.set(((1 * 6 + 5) * 3 + 1) * 40 + 3, kNaN);
        expect_error<NumericalError>([&] { scorer.update(q, k); },
                                     "blocks.3.attn q: expected finite values, got " + text +
                                         " at (image 1, token 5, head 0, channel " +
                                         std::to_string(channel) + ")");
        expect_error<NumericalError>([&] { scorer.update(k, q); },
                                     "blocks.3.attn k: expected finite values, got " + text +
                                         " at (image 1, token 5, head 0, channel " +
                                         std::to_string(channel) + ")");
        expect_same(scorer.state(), before);
      }
      scorer.update(batch(shape, 48, dtype), batch(shape, 49, dtype));
      EXPECT_EQ(scorer.images(), 4);
    }
  }
}

TEST(AttentionScorer, MomentsThatDoNotFitAreRefused) {
  const Dims shape{1, 3, 1, 2};
  const TestTensor huge = batch(shape, 50, DType::f64, {}, 3, 1e200), k = batch(shape, 51);
  AttentionScorer with(1, 2, 8, true);
  try {
    with.update(huge, k);
    FAIL();
  } catch (const NumericalError& error) {
    EXPECT_EQ(
        std::string(error.what()).rfind("q: expected magnitudes up to 1e60 with moments, got ", 0),
        0u);
  }
  EXPECT_EQ(with.images(), 0);
  for (const double score : scores_of(huge, k)) EXPECT_TRUE(std::isfinite(score));
}

TEST(AttentionScorer, RefusesBadArguments) {
  expect_error<InvalidArgument>([] { AttentionScorer(0, 4); }, "heads: expected 1 to 65536, got 0");
  expect_error<InvalidArgument>([] { AttentionScorer(65537, 4); },
                                "heads: expected 1 to 65536, got 65537");
  expect_error<InvalidArgument>([] { AttentionScorer(1, 0, 8, false, "a"); },
                                "a head_dim: expected 1 to 4096, got 0");
  expect_error<InvalidArgument>([] { AttentionScorer(1, 4097); },
                                "head_dim: expected 1 to 4096, got 4097");
  expect_error<InvalidArgument>([] { AttentionScorer(1, 4, 0); },
                                "gamma: expected at least 1, got 0");

  AttentionScorer scorer(2, 4, 8, false, "attn");
  const TestTensor good = batch({1, 3, 2, 4}, 52);
  const auto refused = [&](const Dims& shape) {
    const TestTensor bad = batch(shape, 53);
    const std::string text =
        ": expected shape (images >= 1, tokens >= 1, 2, 4), got " + to_string(shape);
    expect_error<InvalidArgument>([&] { scorer.update(bad, good); }, "attn q" + text);
    expect_error<InvalidArgument>([&] { scorer.update(good, bad); }, "attn k" + text);
  };
  refused({3, 2, 4});
  refused({0, 3, 2, 4});
  refused({1, 0, 2, 4});
  refused({1, 3, 3, 4});
  refused({1, 3, 2, 5});
  expect_error<InvalidArgument>([&] { scorer.update(good, batch({1, 4, 2, 4}, 54)); },
                                "attn k: expected the shape of q, (1, 3, 2, 4), got (1, 4, 2, 4)");
  expect_error<InvalidArgument>([&] { scorer.scores(); },
                                "attn scores: expected at least one image, got none");
  expect_error<InvalidArgument>([&] { scorer.query_gram(); },
                                "attn query_gram: expected a scorer with moments, got one without");
  expect_error<InvalidArgument>([&] { scorer.key_gram(); },
                                "attn key_gram: expected a scorer with moments, got one without");
  expect_error<InvalidArgument>([&] { scorer.score_gram(); },
                                "attn score_gram: expected a scorer with moments, got one without");
  EXPECT_EQ(scorer.images(), 0);
}

// q and k may differ in dtype.
TEST(AttentionScorer, MixedDTypes) {
  const Dims shape{1, 12, 1, 9};
  const Comparison result = compare(batch(shape, 55, DType::bf16), batch(shape, 56), 8);
  EXPECT_EQ(result.heads, 1);
  EXPECT_LT(result.error, 1e-11);
}

/// A batch's Grams and key means, in float64, as update_grams takes them.
struct Grams {
  TestTensor query, key, mean;
};

Grams grams_of(const TestTensor& q, const TestTensor& k, const Layout& layout = {}) {
  const Dims& shape = q.view().shape;
  const std::int64_t images = shape[0], n = shape[1], heads = shape[2], d = shape[3];
  const Dims square{images, heads, d, d};
  Grams grams{TestTensor(DType::f64, square, layout), TestTensor(DType::f64, square),
              TestTensor(DType::f64, {images, heads, d})};
  for (std::int64_t pair = 0; pair < images * heads; ++pair) {
    const reference::Matrix keys = head_of(k, pair / heads, pair % heads);
    const reference::Matrix query = reference::gram(head_of(q, pair / heads, pair % heads), false);
    const reference::Matrix key = reference::gram(keys, true);
    for (std::int64_t e = 0; e < d * d; ++e) {
      // What lies below the diagonal is nobody's business.
      const bool lower = e % d < e / d;
      grams.query.set(pair * d * d + e, lower ? 99 : query.values[static_cast<std::size_t>(e)]);
      grams.key.set(pair * d * d + e, lower ? 99 : key.values[static_cast<std::size_t>(e)]);
    }
    for (std::int64_t c = 0; c < d; ++c) {
      long double sum = 0;
      for (std::int64_t t = 0; t < n; ++t) {
        sum += keys(static_cast<std::size_t>(t), static_cast<std::size_t>(c));
      }
      grams.mean.set(pair * d + c, static_cast<double>(sum / static_cast<long double>(n)));
    }
  }
  return grams;
}

TEST(AttentionScorer, GramsGiveWhatQueriesAndKeysDo) {
  for (const std::int64_t d : {1, 7, 17, 64, 130}) {
    for (const std::int64_t n : {d / 2 + 1, d + 30}) {
      const Dims shape{3, n, 2, d};
      const TestTensor q = batch(shape, 61), k = batch(shape, 62, DType::f64, {}, 5);
      AttentionScorer direct(2, d, 5, true), found(2, d, 5, true);
      direct.update(q, k);
      const Grams grams = grams_of(q, k, {{3, 1, 0, 2}, 2, {0, 3}});
      found.update_grams(grams.query, grams.key, grams.mean, n);
      EXPECT_EQ(found.state().images, 3);
      EXPECT_EQ(found.state().tokens, 3 * n);
      const Values scores = found.scores(), wanted = direct.scores();
      for (std::size_t i = 0; i < scores.size(); ++i) EXPECT_NEAR(scores[i], wanted[i], 1e-9) << d;
      const auto close = [](const Values& mine, const Values& theirs) {
        const double peak = *std::max_element(theirs.begin(), theirs.end());
        for (std::size_t i = 0; i < mine.size(); ++i) EXPECT_NEAR(mine[i], theirs[i], 1e-12 * peak);
      };
      close(found.query_gram(), direct.query_gram());
      close(found.key_gram(), direct.key_gram());
      close(found.score_gram(), direct.score_gram());
    }
  }
}

TEST(AttentionScorer, GramsAreChecked) {
  AttentionScorer scorer(2, 3, 8, true, "blocks.0.attn");
  const Dims shape{2, 9, 2, 3};
  const TestTensor q = batch(shape, 63), k = batch(shape, 64);
  Grams good = grams_of(q, k);
  const TestTensor small(DType::f64, {2, 2, 3}), one(DType::f64, {1, 2, 3});
  expect_error<InvalidArgument>(
      [&] { scorer.update_grams(small, good.key, good.mean, 9); },
      "blocks.0.attn query_gram: expected shape (images >= 1, 2, 3, 3), got (2, 2, 3)");
  expect_error<InvalidArgument>([&] { scorer.update_grams(good.query, good.key, one, 9); },
                                "blocks.0.attn key_mean: expected 2 images, got 1");
  expect_error<InvalidArgument>([&] { scorer.update_grams(good.query, good.key, good.mean, 0); },
                                "blocks.0.attn tokens: expected at least 1, got 0");
  good.key.set(9 + 1, kNaN);
  expect_error<NumericalError>(
      [&] { scorer.update_grams(good.query, good.key, good.mean, 9); },
      "blocks.0.attn key_gram: expected finite values, got nan at (image 0, head 1, 0, 1)");
  good.key.set(9 + 1, 1e131);
  expect_error<NumericalError>(
      [&] { scorer.update_grams(good.query, good.key, good.mean, 9); },
      "blocks.0.attn key_gram: expected magnitudes up to 1e130, got 1e+131");
  EXPECT_EQ(scorer.images(), 0);
}

TEST(AttentionScorerInTurn, ImagesGoToOneAfterTheOther) {
  const TestTensor q = batch({7, 12, 2, 9}, 201), k = batch({7, 12, 2, 9}, 202);
  const auto image = [](const TestTensor& x, std::int64_t i) {
    TensorView view = x;
    view.data = static_cast<const double*>(view.data) + i * view.strides[0];
    view.shape[0] = 1;
    return view;
  };
  for (const std::size_t turns : {1, 3, 8}) {
    std::vector<AttentionScorer> found, expected;
    for (std::size_t i = 0; i < turns; ++i) found.emplace_back(2, 9, 8, true);
    expected = found;
    std::vector<AttentionScorer*> all;
    for (AttentionScorer& scorer : found) all.push_back(&scorer);
    for (const bool wait : {true, false}) {
      AttentionScorer::update_in_turn(all, q, k, wait);
      for (std::int64_t i = 0; i < 7; ++i) {
        expected[static_cast<std::size_t>(i) % turns].update(image(q, i), image(k, i));
      }
    }
    for (std::size_t i = 0; i < turns; ++i) {
      found[i].wait();
      EXPECT_EQ(found[i].state().images, expected[i].state().images);
      EXPECT_EQ(found[i].state().tokens, expected[i].state().tokens);
      EXPECT_EQ(found[i].state().score_sum, expected[i].state().score_sum);
      EXPECT_EQ(found[i].state().key_gram, expected[i].state().key_gram);
    }
  }
}

// The image is that of the batch, not of those of its scorer.
TEST(AttentionScorerInTurn, NamesTheImageThatIsNotFinite) {
  const TestTensor q = batch({6, 5, 1, 4}, 204);
  TestTensor k = batch({6, 5, 1, 4}, 205);
  k.set((3 * 5 + 2) * 4 + 1, kNaN);
  AttentionScorer even(1, 4, 8, false, "even"), odd(1, 4, 8, false, "odd");
  expect_error<NumericalError>(
      [&] { AttentionScorer::update_in_turn({&even, &odd}, q, k); },
      "odd k: expected finite values, got nan at (image 3, token 2, head 0, channel 1)");
  EXPECT_EQ(even.images(), 3);
  EXPECT_EQ(odd.images(), 0);
}

TEST(AttentionScorerInTurn, RefusesScorersThatDoNotFit) {
  const TestTensor q = batch({2, 5, 1, 4}, 203);
  AttentionScorer scorer(1, 4, 8, false, "attn"), wide(1, 5), moments(1, 4, 8, true);
  using Scorers = std::vector<AttentionScorer*>;
  const auto expect = [&](const Scorers& scorers, const std::string& text) {
    expect_error<InvalidArgument>([&] { AttentionScorer::update_in_turn(scorers, q, q); }, text);
    EXPECT_EQ(scorer.images(), 0);
  };
  expect({}, "scorers: expected 1 to 8, got 0");
  expect(Scorers(9, &scorer), "scorers: expected 1 to 8, got 9");
  expect({nullptr}, "scorers: expected objects, got a null pointer");
  expect({&scorer, &scorer}, "scorers: expected different objects, got the same one twice");
  expect({&scorer, &wide}, "attn scorers: expected head_dim 4, got 5");
  expect({&scorer, &moments}, "attn scorers: expected a scorer without moments, got one with");
}

TEST(AttentionScorer, CountsAndSumsThatDoNotFitAreRefused) {
  AttentionScorer scorer(1, 2, 1, true, "attn"), other(1, 2, 1, true);
  TestTensor gram(DType::f64, {2, 1, 2, 2}), mean(DType::f64, {2, 1, 2});
  gram.fill([](std::int64_t i) { return i % 4 == 0 || i % 4 == 3 ? 2.0 : 0.5; });
  constexpr std::int64_t kTokens = std::int64_t{1} << 31;
  expect_error<InvalidArgument>([&] { scorer.update_grams(gram, gram, mean, kTokens + 1); },
                                "attn tokens: expected at most 2^31, got 2147483649");
  scorer.update_grams(gram, gram, mean, kTokens);
  EXPECT_EQ(scorer.state().tokens, 2 * kTokens);

  secateur::AttentionScorerState state = scorer.state();
  state.tokens = std::numeric_limits<std::int64_t>::max();
  expect_error<InvalidArgument>([&] { scorer.load_state(state); },
                                "attn tokens: expected at most 2^62, got 9223372036854775807");
  state.tokens = std::int64_t{1} << 62;
  other.load_state(state);
  const auto before = scorer.state();
  expect_error<InvalidArgument>([&] { scorer.merge(other); },
                                "attn tokens: expected at most 2^62 in all, got 4294967296 and "
                                "4611686018427387904");
  state.tokens = 4;
  state.key_gram[1] = before.key_gram[1] > 0 ? 1.5e308 : -1.5e308;
  other.load_state(state);
  scorer.load_state(state);
  expect_error<NumericalError>([&] { scorer.merge(other); },
                               "attn key_gram: expected sums that fit into float64, got 1.5e+308 "
                               "and 1.5e+308 at 1");
  EXPECT_EQ(scorer.state().images, 2);
  EXPECT_EQ(scorer.state().key_gram, state.key_gram);
}

TEST(AttentionScorer, StridesOfSingleElementsDoNotMatter) {
  constexpr std::int64_t kAny = std::numeric_limits<std::int64_t>::max();
  const double one = 2;
  const TensorView gram(&one, DType::f64, {1, 1, 1, 1}, {kAny, kAny, kAny, kAny});
  const TensorView mean(&one, DType::f64, {1, 1, 1}, {kAny, kAny, kAny});
  AttentionScorer scorer(1, 1);
  scorer.update_grams(gram, gram, mean, 3);
  EXPECT_NEAR(scorer.scores()[0], 1, 1e-12);
  scorer.update(gram, gram);
  EXPECT_NEAR(scorer.scores()[0], 1, 1e-12);
}

}  // namespace
