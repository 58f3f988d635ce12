#include <secateur/attention_scorer.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "buffer.h"
#include "check.h"
#include "head_scorer.h"
#include "packed.h"
#include "parallel.h"

namespace secateur {
namespace {

constexpr std::int64_t kMaxHeads = 65536;
constexpr std::int64_t kMaxHeadDim = 4096;
// Results of that many bytes wait at most until they are added up in the order of the images.
constexpr std::size_t kPendingBytes = std::size_t{32} << 20;

}  // namespace

AttentionScorer::AttentionScorer(std::int64_t heads, std::int64_t head_dim, std::int64_t gamma,
                                 bool moments, std::string name)
    : heads_(heads), head_dim_(head_dim), gamma_(gamma), moments_(moments), name_(std::move(name)) {
  check_range(heads, 1, kMaxHeads, label("heads"));
  check_range(head_dim, 1, kMaxHeadDim, label("head_dim"));
  check_at_least(gamma, 1, label("gamma"));
  const auto h = static_cast<std::size_t>(heads);
  const auto d = static_cast<std::size_t>(head_dim);
  state_.score_sum.assign(h * d, 0.0);
  if (moments) {
    state_.query_gram.assign(h * packed_size(d), 0.0);
    state_.key_gram = state_.score_gram = state_.query_gram;
  }
}

std::string AttentionScorer::label(const char* argument) const {
  return secateur::label(name_, argument);
}

void AttentionScorer::check_batch(const TensorView& q, const TensorView& k) const {
  const auto check = [&](const TensorView& x, const char* argument) {
    check_view(x, label(argument));
    if (x.rank() != 4 || x.shape[0] < 1 || x.shape[1] < 1 || x.shape[2] != heads_ ||
        x.shape[3] != head_dim_) {
      fail<InvalidArgument>(label(argument),
                            "shape (images >= 1, tokens >= 1, " + std::to_string(heads_) + ", " +
                                std::to_string(head_dim_) + ")",
                            to_string(x.shape));
    }
  };
  check(q, "q");
  check(k, "k");
  if (q.shape != k.shape) {
    fail<InvalidArgument>(label("k"), "the shape of q, " + to_string(q.shape), to_string(k.shape));
  }
}

void AttentionScorer::check_values(const TensorView& x, const char* argument) const {
  const double peak = check_finite(x, label(argument), {"image", "token", "head", "channel"});
  if (moments_ && peak > kMaxMomentMagnitude) {
    fail<NumericalError>(label(argument), "magnitudes up to 1e60 with moments", number(peak));
  }
}

void AttentionScorer::update(const TensorView& q, const TensorView& k) {
  check_batch(q, k);
  const auto images = static_cast<std::size_t>(q.shape[0]);
  const auto heads = static_cast<std::size_t>(heads_);
  const auto dim = static_cast<std::size_t>(head_dim_);
  const auto gamma = static_cast<std::size_t>(gamma_);
  const std::size_t packed = moments_ ? packed_size(dim) : 0;
  const std::size_t item = HeadScorer::result_size(dim, moments_);

  const std::size_t slots = parallel_slots();
  const std::size_t chunk = std::clamp<std::size_t>(kPendingBytes / (heads * item * sizeof(double)),
                                                    std::min(slots, images), images);
  Buffer<double> pending(chunk * heads * item);
  std::vector<std::unique_ptr<HeadScorer>> scorers(slots);
  AttentionScorerState next = state_;
  std::atomic<bool> good{true};

  for (std::size_t begin = 0; begin < images; begin += chunk) {
    const std::size_t count = std::min(chunk, images - begin);
    // Groups as large as vectors have lanes, unless threads would have nothing to do.
    const std::size_t pairs = count * heads;
    const std::size_t group = std::min(HeadScorer::lanes(dim), (pairs + slots - 1) / slots);
    parallel_for((pairs + group - 1) / group, slots, [&](std::size_t task, std::size_t slot) {
      auto& scorer = scorers[slot];
      if (!scorer) scorer = std::make_unique<HeadScorer>(q, k, gamma, moments_);
      const std::size_t first = task * group;
      if (!scorer->score(begin * heads + first, std::min(group, pairs - first),
                         pending.data() + first * item)) {
        good.store(false, std::memory_order_relaxed);
      }
    });
    if (!good) {
      // The scorers see that something is wrong for nothing, while they read; what it is, and
      // where, takes a look of its own.
      check_values(q, "q");
      check_values(k, "k");
      fail<NumericalError>(label("q"), "an eigenvalue iteration that converges",
                           "one that does not");
    }
    // One image after the other, whatever the batches and the threads.
    parallel_for(heads, slots, [&](std::size_t head, std::size_t) {
      for (std::size_t image = 0; image < count; ++image) {
        const double* from = pending.data() + (image * heads + head) * item;
        const auto fold = [&](std::vector<double>& sums, std::size_t size) {
          double* to = sums.data() + head * size;
          for (std::size_t i = 0; i < size; ++i) to[i] += from[i];
          from += size;
        };
        fold(next.score_sum, dim);
        fold(next.query_gram, packed);
        fold(next.key_gram, packed);
        fold(next.score_gram, packed);
      }
    });
  }
  next.images += q.shape[0];
  next.tokens += q.shape[0] * q.shape[1];
  state_ = std::move(next);
}

void AttentionScorer::merge(const AttentionScorer& other) {
  const auto same = [&](std::int64_t mine, std::int64_t theirs, const char* what) {
    if (mine != theirs) {
      fail<InvalidArgument>(label("other"), std::string(what) + " " + std::to_string(mine),
                            std::to_string(theirs));
    }
  };
  same(heads_, other.heads_, "heads");
  same(head_dim_, other.head_dim_, "head_dim");
  same(gamma_, other.gamma_, "gamma");
  if (moments_ != other.moments_) {
    fail<InvalidArgument>(label("other"),
                          moments_ ? "a scorer with moments" : "a scorer without moments",
                          moments_ ? "one without" : "one with");
  }
  add(state_.score_sum, other.state_.score_sum);
  add(state_.query_gram, other.state_.query_gram);
  add(state_.key_gram, other.state_.key_gram);
  add(state_.score_gram, other.state_.score_gram);
  state_.images += other.state_.images;
  state_.tokens += other.state_.tokens;
}

std::vector<double> AttentionScorer::scores() const {
  if (state_.images == 0) fail<InvalidArgument>(label("scores"), "at least one image", "none");
  std::vector<double> mean = state_.score_sum;
  for (double& value : mean) value /= static_cast<double>(state_.images);
  return mean;
}

std::vector<double> AttentionScorer::full(const std::vector<double>& packed,
                                          const char* what) const {
  if (!moments_) fail<InvalidArgument>(label(what), "a scorer with moments", "one without");
  const auto d = static_cast<std::size_t>(head_dim_);
  std::vector<double> result(static_cast<std::size_t>(heads_) * d * d);
  for (std::size_t h = 0; h < static_cast<std::size_t>(heads_); ++h) {
    unpack(packed.data() + h * packed_size(d), d, result.data() + h * d * d);
  }
  return result;
}

std::vector<double> AttentionScorer::query_gram() const {
  return full(state_.query_gram, "query_gram");
}
std::vector<double> AttentionScorer::key_gram() const { return full(state_.key_gram, "key_gram"); }
std::vector<double> AttentionScorer::score_gram() const {
  return full(state_.score_gram, "score_gram");
}

void AttentionScorer::load_state(AttentionScorerState state) {
  check_at_least(state.images, 0, label("images"));
  check_at_least(state.tokens, state.images, label("tokens"));
  check_sums(state.score_sum, state_.score_sum.size(), label("score_sum"));
  check_sums(state.query_gram, state_.query_gram.size(), label("query_gram"));
  check_sums(state.key_gram, state_.key_gram.size(), label("key_gram"));
  check_sums(state.score_gram, state_.score_gram.size(), label("score_gram"));
  state_ = std::move(state);
}

}  // namespace secateur
