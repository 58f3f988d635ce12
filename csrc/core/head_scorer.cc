#include "head_scorer.h"

#include <algorithm>

#include "../cpu/dispatch.h"
#include "packed.h"
#include "scale.h"

namespace secateur {

using cpu::kPanelF64;
using cpu::kRows;

HeadScorer::HeadScorer(std::size_t tokens, std::size_t head_dim)
    : tokens_(tokens),
      dim_(head_dim),
      panels_((head_dim + kPanelF64 - 1) / kPanelF64),
      ld_(panels_ * kPanelF64),
      rows_(tokens),
      columns_(head_dim),
      packed_(panels_ * tokens * kPanelF64),
      query_gram_(ld_ * ld_),
      key_gram_(ld_ * ld_),
      mean_(ld_),
      work_(cpu::score_workspace(ld_)) {}

bool HeadScorer::score(const TensorView& q, const TensorView& k, std::int64_t image,
                       std::int64_t head, std::size_t gamma, double* scores,
                       const HeadMoments& moments) {
  const double query_unit = gram(q, image, head, false, query_gram_.data());
  const double key_unit = gram(k, image, head, true, key_gram_.data());
  if (moments.query_gram != nullptr) pack_moments(query_unit, key_unit, moments);
  // Centred first and the mean added back: nothing cancels where keys share an offset.
  add_mean(key_gram_.data());
  mirror(query_gram_.data());
  mirror(key_gram_.data());
  const std::size_t limit = std::min({gamma, tokens_, dim_});
  return cpu::kernels().score.omega(dim_, ld_, limit, query_gram_.data(), key_gram_.data(),
                                    work_.data(), scores);
}

double HeadScorer::gram(const TensorView& x, std::int64_t image, std::int64_t head, bool center,
                        double* out) {
  const auto& kernels = cpu::kernels();
  const double factor = normalising_factor(pack(x, image, head));
  for (std::size_t p = 0; p < panels_; ++p) {
    kernels.panel.scale(panel(p), tokens_, factor);
    if (center) kernels.panel.center(panel(p), tokens_, mean_.data() + p * kPanelF64);
  }
  std::fill_n(out, ld_ * ld_, 0.0);
  for (std::size_t row = 0; row < tokens_; row += kRows) {
    const std::size_t count = std::min(kRows, tokens_ - row);
    for (std::size_t i = 0; i < panels_; ++i) {
      for (std::size_t j = i; j < panels_; ++j) {
        kernels.gram.tile_f64(panel(i) + row * kPanelF64, panel(j) + row * kPanelF64, count,
                              out + i * kPanelF64 * ld_ + j * kPanelF64, ld_);
      }
    }
  }
  return factor * factor;
}

double HeadScorer::pack(const TensorView& x, std::int64_t image, std::int64_t head) {
  const auto& kernels = cpu::kernels().panel;
  const auto pack = kernels.pack_f64[static_cast<std::size_t>(x.dtype)];
  const auto scan = kernels.scan[static_cast<std::size_t>(DType::f64)];
  const std::int64_t start = image * x.strides[0] + head * x.strides[2];
  for (std::size_t n = 0; n < tokens_; ++n) {
    rows_[n] = start + static_cast<std::int64_t>(n) * x.strides[1];
  }
  for (std::size_t c = 0; c < dim_; ++c) {
    columns_[c] = static_cast<std::int64_t>(c) * x.strides[3];
  }
  const bool unit = x.strides[3] == 1;
  double peak = 0;
  for (std::size_t p = 0; p < panels_; ++p) {
    const std::size_t first = p * kPanelF64;
    // Without column offsets a column is one element from the last: start the rows further on.
    const char* base = static_cast<const char*>(x.data) + (unit ? first * item_size(x.dtype) : 0);
    pack(base, rows_.data(), tokens_, unit ? nullptr : columns_.data() + first,
         std::min(kPanelF64, dim_ - first), panel(p));
    scan(panel(p), 1, tokens_ * kPanelF64, &peak);
  }
  return peak;
}

void HeadScorer::add_mean(double* gram) const {
  const double* mean = mean_.data();
  for (std::size_t i = 0; i < dim_; ++i) {
    const double left = static_cast<double>(tokens_) * mean[i];
    for (std::size_t j = i; j < dim_; ++j) gram[i * ld_ + j] += left * mean[j];
  }
}

void HeadScorer::mirror(double* gram) const {
  for (std::size_t i = 0; i < dim_; ++i) {
    for (std::size_t j = i + 1; j < dim_; ++j) gram[j * ld_ + i] = gram[i * ld_ + j];
  }
}

void HeadScorer::pack_moments(double query_unit, double key_unit,
                              const HeadMoments& moments) const {
  for (std::size_t i = 0; i < dim_; ++i) {
    const std::size_t row = packed_row(i, dim_);
    for (std::size_t j = i; j < dim_; ++j) {
      const double query = query_gram_.data()[i * ld_ + j] / query_unit;
      const double key = key_gram_.data()[i * ld_ + j] / key_unit;
      moments.query_gram[row + j] = query;
      moments.key_gram[row + j] = key;
      moments.score_gram[row + j] = query * key;
    }
  }
}

double* HeadScorer::panel(std::size_t p) { return packed_.data() + p * tokens_ * kPanelF64; }

}  // namespace secateur
