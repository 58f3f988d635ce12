#include <secateur/attention_scorer.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "../cuda/backend.h"
#include "buffer.h"
#include "check.h"
#include "device_state.h"
#include "head_scorer.h"
#include "packed.h"
#include "parallel.h"
#include "subnormals.h"
#include "turns.h"

namespace secateur {
namespace {

constexpr std::int64_t kMaxHeads = 65536;
constexpr std::int64_t kMaxHeadDim = 4096;
// Of an image of which only Grams are given.
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 31;
// Results of that many bytes wait at most until they are added up in the order of the images.
constexpr std::size_t kPendingBytes = std::size_t{32} << 20;

/// Scores images of heads by what `make` gives each thread, and adds them to next, image after
/// image. `explain` throws what is wrong with values that were refused.
template <typename Make, typename Explain>
void add_images(AttentionScorerState& next, std::size_t images, std::int64_t head_count,
                std::int64_t head_dim, bool moments, const Make& make, const Explain& explain) {
  const auto heads = static_cast<std::size_t>(head_count);
  const auto dim = static_cast<std::size_t>(head_dim);
  const std::size_t packed = moments ? packed_size(dim) : 0;
  const std::size_t item = HeadScorer::result_size(dim, moments);
  const std::size_t slots = parallel_slots();
  const std::size_t chunk = std::clamp<std::size_t>(kPendingBytes / (heads * item * sizeof(double)),
                                                    std::min(slots, images), images);
  Buffer<double> pending(chunk * heads * item);
  std::vector<std::unique_ptr<HeadScorer>> scorers(slots);
  std::atomic<bool> good{true};

  for (std::size_t begin = 0; begin < images; begin += chunk) {
    const std::size_t count = std::min(chunk, images - begin);
    // Groups as large as vectors have lanes, unless threads would have nothing to do.
    const std::size_t pairs = count * heads;
    const std::size_t group = std::min(HeadScorer::lanes(dim), (pairs + slots - 1) / slots);
    parallel_for((pairs + group - 1) / group, slots, [&](std::size_t task, std::size_t slot) {
      auto& scorer = scorers[slot];
      if (!scorer) scorer = make();
      const std::size_t first = task * group;
      if (!scorer->score(begin * heads + first, std::min(group, pairs - first),
                         pending.data() + first * item)) {
        good.store(false, std::memory_order_relaxed);
      }
    });
    // The scorers see that something is wrong for nothing, while they read; what it is, and where,
    // takes a look of its own.
    if (!good) explain();
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
}

/// visit(i, sum) for every sum of a state, i its place among the heads' results.
template <typename Visit>
void for_results(AttentionScorerState& state, std::int64_t heads, std::size_t dim, bool moments,
                 const Visit& visit) {
  const std::size_t packed = moments ? packed_size(dim) : 0;
  std::size_t at = 0;
  for (std::size_t head = 0; head < static_cast<std::size_t>(heads); ++head) {
    const auto each = [&](std::vector<double>& sums, std::size_t size) {
      for (std::size_t i = 0; i < size; ++i) visit(at++, sums[head * size + i]);
    };
    each(state.score_sum, dim);
    each(state.query_gram, packed);
    each(state.key_gram, packed);
    each(state.score_gram, packed);
  }
}

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

AttentionScorer::AttentionScorer(const AttentionScorer& other)
    : heads_(other.heads_),
      head_dim_(other.head_dim_),
      gamma_(other.gamma_),
      moments_(other.moments_),
      name_(other.name_),
      state_(other.state()) {}

AttentionScorer& AttentionScorer::operator=(const AttentionScorer& other) {
  if (this != &other) *this = AttentionScorer(other);
  return *this;
}

AttentionScorer::AttentionScorer(AttentionScorer&&) noexcept = default;
AttentionScorer& AttentionScorer::operator=(AttentionScorer&&) noexcept = default;
AttentionScorer::~AttentionScorer() = default;

std::string AttentionScorer::label(const char* argument) const {
  return secateur::label(name_, argument);
}

void AttentionScorer::check_batch(const TensorView& q, const TensorView& k) const {
  const auto check = [&](const TensorView& x, const char* argument) {
    check_device_view(x, label(argument));
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
  if (q.device.type != k.device.type || q.device.index != k.device.index) {
    fail<InvalidArgument>(label("k"), "the device of q, " + to_string(q.device),
                          to_string(k.device));
  }
  if (q.device.type == DeviceType::cuda && q.dtype != k.dtype) {
    fail<InvalidArgument>(label("k"),
                          std::string("the dtype of q on CUDA, ") + secateur::name(q.dtype),
                          secateur::name(k.dtype));
  }
}

void AttentionScorer::check_values(const TensorView& q, const TensorView& k) const {
  const auto check = [&](const TensorView& x, const char* argument) {
    const double peak = check_finite(x, label(argument), {"image", "token", "head", "channel"});
    if (moments_ && peak > kMaxMomentMagnitude) {
      fail<NumericalError>(label(argument), "magnitudes up to 1e60 with moments", number(peak));
    }
  };
  check(q, "q");
  check(k, "k");
}

void AttentionScorer::update(const TensorView& q, const TensorView& k) {
  update_in_turn({this}, q, k);
}

void AttentionScorer::update_in_turn(const std::vector<AttentionScorer*>& scorers,
                                     const TensorView& q, const TensorView& k, bool wait) {
  check_turns(scorers, "scorers");
  const AttentionScorer& first = *scorers[0];
  for (const AttentionScorer* scorer : scorers) first.check_same(*scorer, "scorers");
  first.check_batch(q, k);
  const auto turns = static_cast<std::int64_t>(scorers.size());
  if (q.device.type != DeviceType::cuda) {
    for (std::int64_t turn = 0; turn < std::min(turns, q.shape[0]); ++turn) {
      AttentionScorer& scorer = *scorers[static_cast<std::size_t>(turn)];
      try {
        scorer.update_on_host(every(q, turn, turns), every(k, turn, turns));
      } catch (const NumericalError&) {
        scorer.check_values(q, k);  // by the image's number in the batch
        throw;
      }
    }
    return;
  }
  if (first.head_dim_ > cuda::max_head_dim()) {
    fail<Unsupported>(first.label("head_dim"),
                      "at most " + std::to_string(cuda::max_head_dim()) + " on CUDA",
                      std::to_string(first.head_dim_));
  }
  std::vector<cuda::Sums*> sums;
  for (AttentionScorer* scorer : scorers) {
    if (wait) scorer->wait();  // or faults of before would be taken for this batch's
    if (scorer->device_ && !scorer->device_->is_on(q.device)) scorer->go_home();
    if (!scorer->device_) {
      std::vector<double> values = scorer->results();
      scorer->device_ = std::make_unique<DeviceState>(
          q.device, values.size(), DeviceState::Parts{{values.data(), values.size()}});
    }
    scorer->device_->prepare();
    sums.push_back(&scorer->device_->sums());
  }
  cuda::score(q, k, first.gamma_, first.moments_, kMaxMomentMagnitude, sums);
  for (std::int64_t turn = 0; turn < turns; ++turn) {
    AttentionScorer& scorer = *scorers[static_cast<std::size_t>(turn)];
    AttentionScorerState& state = scorer.state_;
    const std::int64_t images = (q.shape[0] - turn + turns - 1) / turns;
    scorer.device_->enqueued({state.images, state.tokens});
    state.images += images;
    state.tokens += images * q.shape[1];
  }
  const AttentionScorer* faulty = nullptr;
  for (const AttentionScorer* scorer : scorers) {
    if (wait && !scorer->is_sound() && faulty == nullptr) faulty = scorer;
  }
  if (faulty == nullptr) return;
  faulty->check_values(q, k);
  fail<NumericalError>(faulty->label("q"), "finite values", "one that was not when it was read");
}

bool AttentionScorer::is_sound() const {
  const auto before = device_ ? device_->wait() : std::nullopt;
  if (!before) return true;
  bring_home();
  device_.reset();
  state_.images = before->first;
  state_.tokens = before->second;
  return false;
}

void AttentionScorer::wait() const {
  if (is_sound()) return;
  fail<NumericalError>(label("q"), "finite values",
                       "one that is not, in a batch that was not waited for");
}

void AttentionScorer::bring_home() const {
  if (!device_ || device_->at_home()) return;
  std::vector<double> values = results();
  device_->bring_home({{values.data(), values.size()}});
  for_results(state_, heads_, static_cast<std::size_t>(head_dim_), moments_,
              [&](std::size_t at, double& sum) { sum = values[at]; });
}

void AttentionScorer::go_home() {
  state();
  device_.reset();
}

const AttentionScorerState& AttentionScorer::state() const {
  wait();
  bring_home();
  return state_;
}

std::vector<double> AttentionScorer::results() const {
  std::vector<double> values(
      static_cast<std::size_t>(heads_) *
      HeadScorer::result_size(static_cast<std::size_t>(head_dim_), moments_));
  for_results(state_, heads_, static_cast<std::size_t>(head_dim_), moments_,
              [&](std::size_t at, double& sum) { values[at] = sum; });
  return values;
}

void AttentionScorer::update_on_host(const TensorView& q, const TensorView& k) {
  const KeepSubnormals keep;
  go_home();
  const auto gamma = static_cast<std::size_t>(gamma_);
  const auto make = [&] { return std::make_unique<HeadScorer>(q, k, gamma, moments_); };
  const auto explain = [&] {
    check_values(q, k);
    fail<NumericalError>(label("q"), "an eigenvalue iteration that converges", "one that does not");
  };
  AttentionScorerState next = state_;
  add_images(next, static_cast<std::size_t>(q.shape[0]), heads_, head_dim_, moments_, make,
             explain);
  next.images += q.shape[0];
  next.tokens += q.shape[0] * q.shape[1];
  state_ = std::move(next);
}

void AttentionScorer::update_grams(const TensorView& query_gram, const TensorView& key_gram,
                                   const TensorView& key_mean, std::int64_t tokens) {
  const auto check = [&](const TensorView& x, const char* argument, const Dims& rest) {
    check_view(x, label(argument));
    bool fits = x.rank() == rest.size() + 1 && x.shape[0] >= 1;
    for (std::size_t i = 0; fits && i < rest.size(); ++i) fits = x.shape[i + 1] == rest[i];
    if (!fits) {
      const std::string sizes = to_string(rest).substr(1);
      fail<InvalidArgument>(label(argument), "shape (images >= 1, " + sizes, to_string(x.shape));
    }
    if (x.shape[0] != query_gram.shape[0]) {
      fail<InvalidArgument>(label(argument), std::to_string(query_gram.shape[0]) + " images",
                            std::to_string(x.shape[0]));
    }
  };
  check(query_gram, "query_gram", {heads_, head_dim_, head_dim_});
  check(key_gram, "key_gram", {heads_, head_dim_, head_dim_});
  check(key_mean, "key_mean", {heads_, head_dim_});
  check_at_least(tokens, 1, label("tokens"));
  if (tokens > kMaxTokens) {
    fail<InvalidArgument>(label("tokens"), "at most 2^31", std::to_string(tokens));
  }
  const KeepSubnormals keep;

  const HeadGrams grams{query_gram, key_gram, key_mean, static_cast<std::size_t>(tokens)};
  const auto gamma = static_cast<std::size_t>(gamma_);
  const auto make = [&] { return std::make_unique<HeadScorer>(grams, gamma, moments_); };
  const auto explain = [&] {
    const auto look = [&](const TensorView& x, const char* argument) {
      const double peak = check_finite(x, label(argument), {"image", "head"});
      if (peak > kMaxGramMagnitude) {
        fail<NumericalError>(label(argument), "magnitudes up to 1e130", number(peak));
      }
    };
    look(query_gram, "query_gram");
    look(key_gram, "key_gram");
    look(key_mean, "key_mean");
    fail<NumericalError>(label("query_gram"), "an eigenvalue iteration that converges",
                         "one that does not");
  };
  const std::int64_t images = query_gram.shape[0];
  go_home();
  AttentionScorerState next = state_;
  add_images(next, static_cast<std::size_t>(images), heads_, head_dim_, moments_, make, explain);
  next.images += images;
  next.tokens += images * tokens;
  state_ = std::move(next);
}

void AttentionScorer::check_same(const AttentionScorer& other, const char* argument) const {
  const auto same = [&](std::int64_t mine, std::int64_t theirs, const char* what) {
    if (mine != theirs) {
      fail<InvalidArgument>(label(argument), std::string(what) + " " + std::to_string(mine),
                            std::to_string(theirs));
    }
  };
  same(heads_, other.heads_, "heads");
  same(head_dim_, other.head_dim_, "head_dim");
  same(gamma_, other.gamma_, "gamma");
  if (moments_ != other.moments_) {
    fail<InvalidArgument>(label(argument),
                          moments_ ? "a scorer with moments" : "a scorer without moments",
                          moments_ ? "one without" : "one with");
  }
}

void AttentionScorer::merge(const AttentionScorer& other) {
  check_same(other, "other");
  other.state();
  go_home();
  const KeepSubnormals keep;
  AttentionScorerState& mine = state_;
  const AttentionScorerState& theirs = other.state_;
  const std::int64_t images = count_sum(mine.images, theirs.images, label("images"));
  const std::int64_t tokens = count_sum(mine.tokens, theirs.tokens, label("tokens"));
  check_sum(mine.score_sum, theirs.score_sum, label("score_sum"));
  check_sum(mine.query_gram, theirs.query_gram, label("query_gram"));
  check_sum(mine.key_gram, theirs.key_gram, label("key_gram"));
  check_sum(mine.score_gram, theirs.score_gram, label("score_gram"));
  add(mine.score_sum, theirs.score_sum);
  add(mine.query_gram, theirs.query_gram);
  add(mine.key_gram, theirs.key_gram);
  add(mine.score_gram, theirs.score_gram);
  mine.images = images;
  mine.tokens = tokens;
}

std::vector<double> AttentionScorer::scores() const {
  const AttentionScorerState& seen = state();
  if (seen.images == 0) fail<InvalidArgument>(label("scores"), "at least one image", "none");
  const KeepSubnormals keep;
  std::vector<double> mean = seen.score_sum;
  for (double& value : mean) value /= static_cast<double>(seen.images);
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
  return full(state().query_gram, "query_gram");
}
std::vector<double> AttentionScorer::key_gram() const { return full(state().key_gram, "key_gram"); }
std::vector<double> AttentionScorer::score_gram() const {
  return full(state().score_gram, "score_gram");
}

void AttentionScorer::load_state(AttentionScorerState state) {
  check_count(state.images, 0, label("images"));
  check_count(state.tokens, state.images, label("tokens"));
  check_sums(state.score_sum, state_.score_sum.size(), label("score_sum"));
  check_sums(state.query_gram, state_.query_gram.size(), label("query_gram"));
  check_sums(state.key_gram, state_.key_gram.size(), label("key_gram"));
  check_sums(state.score_gram, state_.score_gram.size(), label("score_gram"));
  device_.reset();
  state_ = std::move(state);
}

}  // namespace secateur
