// Pruning in a C++ program that owns its buffers: score the query/key neurons of a layer on a few
// images, choose which stay, and cut the projection's rows in place. No Python, no framework.
#include <secateur/secateur.h>

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr std::int64_t kImages = 4, kTokens = 50, kHeads = 3, kHeadDim = 16, kWidth = 48;
constexpr std::int64_t kKeep = 12;

/// Stand-in for activations and weights.
float wave(std::int64_t i) {
  return static_cast<float>(std::sin(0.37 * static_cast<double>(i * i % 9973)));
}

}  // namespace

int main() try {
  // Queries and keys of a batch, (images, tokens, heads, head_dim). The last four neurons of each
  // head are silent.
  std::vector<float> q(kImages * kTokens * kHeads * kHeadDim), k(q.size());
  for (std::size_t i = 0; i < q.size(); ++i) {
    const auto index = static_cast<std::int64_t>(i);
    q[i] = wave(index);
    k[i] = wave(index + 7);
    if (index % kHeadDim >= kKeep) q[i] = k[i] = 0;
  }
  const secateur::Dims shape{kImages, kTokens, kHeads, kHeadDim};
  secateur::AttentionScorer scorer(kHeads, kHeadDim);
  scorer.update({q.data(), secateur::DType::f32, shape}, {k.data(), secateur::DType::f32, shape});

  const std::vector<double> scores = scorer.scores();
  const std::vector<std::int64_t> keep =
      secateur::select({scores.data(), secateur::DType::f64, {kHeads, kHeadDim}}, kKeep);

  // The query projection, (heads · head_dim, width), loses the rows that are not kept.
  std::vector<float> weight(kHeads * kHeadDim * kWidth);
  for (std::size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i);
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < kHeads * kKeep; ++i) {
    rows.push_back(i / kKeep * kHeadDim + keep[static_cast<std::size_t>(i)]);
  }
  const secateur::MutableTensorView small = secateur::compact(
      {weight.data(), secateur::DType::f32, {kHeads * kHeadDim, kWidth}}, 0, rows);
  weight.resize(static_cast<std::size_t>(small.numel()));

  std::printf("secateur %s, %s, %d threads\n", secateur::version().c_str(), secateur::isa().c_str(),
              secateur::threads());
  std::printf("query weight (%d, %d) -> %s\n", static_cast<int>(kHeads * kHeadDim),
              static_cast<int>(kWidth), secateur::to_string(small.shape).c_str());

  for (std::size_t r = 0; r < rows.size(); ++r) {
    // The silent neurons are the ones that left, and each row came whole.
    if (rows[r] % kHeadDim >= kKeep) return 1;
    if (weight[r * kWidth + 5] != static_cast<float>(rows[r] * kWidth + 5)) return 1;
  }
  std::puts("ok");
  return 0;
} catch (const secateur::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
