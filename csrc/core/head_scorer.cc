#include "head_scorer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../cpu/dispatch.h"
#include "check.h"
#include "packed.h"
#include "scale.h"

namespace secateur {
namespace {

using cpu::kPanelF64;
using cpu::kRows;

// Where the Grams of all lanes stay in the second-level cache; above it rows fill vectors anyway.
constexpr std::size_t kMaxLaneDim = 128;

}  // namespace

HeadScorer::HeadScorer(const TensorView& q, const TensorView& k, std::size_t gamma, bool moments)
    : HeadScorer(static_cast<std::size_t>(q.shape[1]), static_cast<std::size_t>(q.shape[2]),
                 static_cast<std::size_t>(q.shape[3]), gamma, moments,
                 static_cast<std::size_t>(q.shape[1])) {
  q_ = &q;
  k_ = &k;
}

HeadScorer::HeadScorer(const HeadGrams& grams, std::size_t gamma, bool moments)
    : HeadScorer(grams.tokens, static_cast<std::size_t>(grams.query.shape[1]),
                 static_cast<std::size_t>(grams.query.shape[2]), gamma, moments, 0) {
  grams_ = &grams;
}

HeadScorer::HeadScorer(std::size_t tokens, std::size_t heads, std::size_t dim, std::size_t gamma,
                       bool moments, std::size_t packed_rows)
    : tokens_(tokens),
      heads_(heads),
      dim_(dim),
      limit_(std::min({gamma, tokens_, dim_})),
      moments_(moments),
      panels_((dim_ + kPanelF64 - 1) / kPanelF64),
      ld_(panels_ * kPanelF64),
      rows_(packed_rows),
      columns_(dim_),
      packed_(panels_ * packed_rows * kPanelF64),
      query_gram_{Buffer<double>(ld_ * ld_)},
      key_gram_{Buffer<double>(ld_ * ld_)},
      mean_(ld_),
      exponents_(dim_),
      query_factors_(dim_),
      key_factors_(dim_),
      lanes_(lanes(dim_)),
      query_lanes_(lanes_ > 1 ? lanes_ * cpu::lane_matrix(dim_) : 0),
      key_lanes_(lanes_ > 1 ? lanes_ * cpu::lane_matrix(dim_) : 0),
      scores_(dim_ * lanes_),
      work_(std::max(cpu::score_workspace(ld_),
                     lanes_ > 1 ? lanes_ * cpu::score_lanes_workspace(dim_) : 0)) {
  if (lanes_ == 1) return;
  std::fill_n(query_lanes_.data(), lanes_ * cpu::lane_matrix(dim_), 0.0);
  std::fill_n(key_lanes_.data(), lanes_ * cpu::lane_matrix(dim_), 0.0);
}

std::size_t HeadScorer::lanes(std::size_t head_dim) {
  return head_dim <= kMaxLaneDim ? cpu::kernels().score_lanes.lanes : 1;
}

std::size_t HeadScorer::result_size(std::size_t head_dim, bool moments) {
  return head_dim + (moments ? 3 * packed_size(head_dim) : 0);
}

bool HeadScorer::score(std::size_t first, std::size_t count, double* results) {
  const std::size_t size = result_size(dim_, moments_);
  const auto moments_of = [&](std::size_t i) {
    return moments_ ? results + i * size + dim_ : nullptr;
  };
  bool good = true;
  if (lanes_ == 1) {
    for (std::size_t i = 0; i < count; ++i) {
      good = score_alone(first + i, results + i * size, moments_of(i)) && good;
    }
    return good;
  }
  for (std::size_t lane = 0; lane < lanes_; ++lane) {
    // Lanes without a head repeat the last one.
    if (lane < count && !load(first + lane, moments_of(lane))) return false;
    to_lane(query_gram_, lane, query_lanes_.data());
    to_lane(key_gram_, lane, key_lanes_.data());
  }
  const std::uint32_t refused = cpu::kernels().score_lanes.omega(
      dim_, limit_, query_lanes_.data(), key_lanes_.data(), work_.data(), scores_.data());
  for (std::size_t lane = 0; lane < count; ++lane) {
    double* scores = results + lane * size;
    if ((refused >> lane & 1) != 0) {
      good = score_alone(first + lane, scores, nullptr) && good;
      continue;
    }
    for (std::size_t i = 0; i < dim_; ++i) scores[i] = scores_.data()[i * lanes_ + lane];
  }
  return good;
}

bool HeadScorer::score_alone(std::size_t head, double* scores, double* moments) {
  if (!load(head, moments)) return false;
  mirror(query_gram_);
  mirror(key_gram_);
  return cpu::kernels().score.omega(dim_, ld_, limit_, query_gram_.values.data(),
                                    key_gram_.values.data(), work_.data(), scores);
}

bool HeadScorer::load(std::size_t head, double* moments) {
  if (grams_ != nullptr) {
    if (!read_grams(head)) return false;
  } else if (!gram(*q_, head, false, query_gram_) || !gram(*k_, head, true, key_gram_)) {
    return false;
  }
  if (moments != nullptr) pack_moments(moments);
  // Centred first and the mean added back: nothing cancels where keys share an offset.
  add_mean(key_gram_);
  balance();
  return true;
}

bool HeadScorer::gram(const TensorView& x, std::size_t head, bool center, Gram& out) {
  const auto& kernels = cpu::kernels();
  pack(x, head);
  double factor = 1;
  // Squares of the narrower types can neither overflow nor vanish in float64.
  if (x.dtype == DType::f64 && rescale(&factor) > kMaxMomentMagnitude && moments_) return false;
  out.unit = factor * factor;
  if (center) {
    for (std::size_t p = 0; p < panels_; ++p) {
      kernels.panel.center(panel(p), tokens_, mean_.data() + p * kPanelF64);
    }
  }
  double* values = out.values.data();
  std::fill_n(values, ld_ * ld_, 0.0);
  for (std::size_t row = 0; row < tokens_; row += kRows) {
    const std::size_t count = std::min(kRows, tokens_ - row);
    for (std::size_t i = 0; i < panels_; ++i) {
      for (std::size_t j = i; j < panels_; ++j) {
        kernels.gram.tile_f64(panel(i) + row * kPanelF64, panel(j) + row * kPanelF64, count,
                              values + i * kPanelF64 * ld_ + j * kPanelF64, ld_);
      }
    }
  }
  // NaN or Inf anywhere in a column is in its norm.
  double poison = 0;
  for (std::size_t i = 0; i < dim_; ++i) poison += values[i * (ld_ + 1)] * 0;
  return poison == 0;
}

bool HeadScorer::read_grams(std::size_t head) {
  const auto image = static_cast<std::int64_t>(head / heads_);
  const auto h = static_cast<std::int64_t>(head % heads_);
  const auto start = [&](const TensorView& x) { return image * x.strides[0] + h * x.strides[1]; };
  double peak = 0, poison = 0;
  const auto look = [&](const double* values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      poison += values[i] * 0;
      peak = std::max(peak, std::fabs(values[i]));
    }
  };
  const auto fill = [&](const TensorView& x, Gram& out) {
    for (std::size_t i = 0; i < dim_; ++i) {
      double* row = out.values.data() + i * ld_ + i;
      read(x, start(x) + static_cast<std::int64_t>(i) * diagonal_stride(x), x.strides[3], dim_ - i,
           row);
      look(row, dim_ - i);
    }
  };
  fill(grams_->query, query_gram_);
  fill(grams_->key, key_gram_);
  read(grams_->key_mean, start(grams_->key_mean), grams_->key_mean.strides[2], dim_, mean_.data());
  look(mean_.data(), dim_);
  return poison == 0 && peak <= kMaxGramMagnitude;
}

void HeadScorer::pack(const TensorView& x, std::size_t head) {
  const auto pack = cpu::kernels().panel.pack_f64[static_cast<std::size_t>(x.dtype)];
  const std::int64_t start = static_cast<std::int64_t>(head / heads_) * x.strides[0] +
                             static_cast<std::int64_t>(head % heads_) * x.strides[2];
  for (std::size_t n = 0; n < tokens_; ++n) {
    rows_[n] = start + static_cast<std::int64_t>(n) * x.strides[1];
  }
  for (std::size_t c = 0; c < dim_; ++c) {
    columns_[c] = static_cast<std::int64_t>(c) * x.strides[3];
  }
  const bool unit = x.strides[3] == 1;
  for (std::size_t p = 0; p < panels_; ++p) {
    const std::size_t first = p * kPanelF64;
    // Without column offsets a column is one element from the last: start the rows further on.
    const char* base = static_cast<const char*>(x.data) + (unit ? first * item_size(x.dtype) : 0);
    pack(base, rows_.data(), tokens_, unit ? nullptr : columns_.data() + first,
         std::min(kPanelF64, dim_ - first), panel(p));
  }
}

double HeadScorer::rescale(double* factor) {
  const auto& kernels = cpu::kernels().panel;
  const auto scan = kernels.scan[static_cast<std::size_t>(DType::f64)];
  double peak = 0;
  scan(packed_.data(), 1, panels_ * tokens_ * kPanelF64, &peak);
  *factor = normalising_factor(peak);
  for (std::size_t p = 0; p < panels_; ++p) kernels.scale(panel(p), tokens_, *factor);
  return peak;
}

void HeadScorer::add_mean(Gram& gram) const {
  const double* mean = mean_.data();
  for (std::size_t i = 0; i < dim_; ++i) {
    const double left = static_cast<double>(tokens_) * mean[i];
    double* row = gram.values.data() + i * ld_;
    for (std::size_t j = i; j < dim_; ++j) row[j] += left * mean[j];
  }
}

void HeadScorer::balance() {
  double* const query = query_gram_.values.data();
  double* const key = key_gram_.values.data();
  int largest = std::numeric_limits<int>::min();  // exponent of a balanced neuron's square norm
  for (std::size_t i = 0; i < dim_; ++i) {
    const double q = query[i * (ld_ + 1)], k = key[i * (ld_ + 1)];
    exponents_[i] = 0;
    if (q > 0 && k > 0) {
      exponents_[i] = (std::ilogb(k) - std::ilogb(q)) / 4;
      largest =
          std::max({largest, std::ilogb(q) + 2 * exponents_[i], std::ilogb(k) - 2 * exponents_[i]});
    }
  }
  for (std::size_t i = 0; i < dim_; ++i) {
    const bool counts = query[i * (ld_ + 1)] > 0 && key[i * (ld_ + 1)] > 0;
    query_factors_[i] = counts ? std::ldexp(1.0, exponents_[i] - largest / 2) : 0;
    key_factors_[i] = counts ? std::ldexp(1.0, -exponents_[i] - largest / 2) : 0;
  }
  for (std::size_t i = 0; i < dim_; ++i) {
    for (std::size_t j = i; j < dim_; ++j) {
      query[i * ld_ + j] = query[i * ld_ + j] * query_factors_[i] * query_factors_[j];
      key[i * ld_ + j] = key[i * ld_ + j] * key_factors_[i] * key_factors_[j];
    }
  }
}

void HeadScorer::mirror(Gram& gram) const {
  double* values = gram.values.data();
  for (std::size_t i = 0; i < dim_; ++i) {
    for (std::size_t j = i + 1; j < dim_; ++j) values[j * ld_ + i] = values[i * ld_ + j];
  }
}

void HeadScorer::pack_moments(double* out) const {
  double* const query_gram = out;
  double* const key_gram = query_gram + packed_size(dim_);
  double* const score_gram = key_gram + packed_size(dim_);
  const double query_factor = 1 / query_gram_.unit, key_factor = 1 / key_gram_.unit;
  for (std::size_t i = 0; i < dim_; ++i) {
    const std::size_t row = packed_row(i, dim_);
    for (std::size_t j = i; j < dim_; ++j) {
      const double query = query_gram_.values.data()[i * ld_ + j] * query_factor;
      const double key = key_gram_.values.data()[i * ld_ + j] * key_factor;
      query_gram[row + j] = query;
      key_gram[row + j] = key;
      score_gram[row + j] = query * key;
    }
  }
}

void HeadScorer::to_lane(const Gram& gram, std::size_t lane, double* out) const {
  const double* values = gram.values.data();
  for (std::size_t i = 0; i < dim_; ++i) {
    double* to = out + i * cpu::lane_stride(dim_) * lanes_ + lane;
    for (std::size_t j = 0; j <= i; ++j) to[j * lanes_] = values[j * ld_ + i];
    const std::size_t end = std::min(dim_, cpu::lane_rows(i + 1));
    for (std::size_t j = i + 1; j < end; ++j) to[j * lanes_] = values[i * ld_ + j];
  }
}

}  // namespace secateur
