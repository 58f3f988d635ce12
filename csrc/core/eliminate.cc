#include <secateur/eliminate.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <utility>

#include "../cpu/dispatch.h"
#include "buffer.h"
#include "check.h"
#include "parallel.h"
#include "subnormals.h"

namespace secateur {
namespace {

using cpu::kPending;

constexpr std::size_t kPanel = cpu::kPanelF64;
// Rows of C⁻¹ and of the weights' Gram matrix are formed a panel at a time (for the inputs that
// cost least, which leave next), and kept until the next flush or until there is no room.
constexpr std::size_t kKept = 8 * kPanel;
// Rows of two panels in one product, which the first-level cache holds.
constexpr std::size_t kDepth = 64;
// Panels of a task.
constexpr std::size_t kGroup = 8;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::size_t whole_panels(std::size_t n) { return (n + kPanel - 1) / kPanel; }

/// Copies what panel `from` has of input `source` to the place of input `target` in panel `to`.
void copy_column(const double* from, std::size_t source, std::size_t rows, double* to,
                 std::size_t target) {
  from += source % kPanel;
  to += target % kPanel;
  for (std::size_t r = 0; r < rows; ++r) to[r * kPanel] = from[r * kPanel];
}

/// The state of an elimination. C⁻¹ is never downdated as a whole: besides its diagonal, only the
/// rows of inputs about to leave are brought up to date. Inputs live at positions [0, active_);
/// where one left, the last that remains moves in at the next flush.
class Eliminator {
 public:
  Eliminator(const TensorView& inverse, const TensorView& weights,
             const std::vector<double>& diagonal, std::size_t count);
  Elimination run();

 private:
  void load_weights(const TensorView& weights);
  /// All costs from the panels of weights.
  void refresh();
  std::size_t cheapest() const;
  /// Takes out `position`; returns its cost. Without an update, nothing can be removed after.
  double remove(std::size_t position, bool update);
  /// Rows as of the last flush for the inputs that are likely to leave next, `position` among them.
  void form_rows(std::size_t position);
  /// Multiplies the pending downdates of the weights out, over the inputs that remain.
  void flush();
  void close_ranks();
  void take_out(std::size_t position);

  double* weights(std::size_t panel) { return weights_.data() + panel * length_ * kPanel; }
  double* columns(std::size_t panel) { return columns_.data() + panel * count_ * kPanel; }
  double* inverse_row(std::size_t slot) { return inverse_rows_.data() + slot * ld_; }
  double* gram_row(std::size_t slot) { return gram_rows_.data() + slot * ld_; }

  TensorView inverse_;
  std::size_t n_;
  std::size_t count_;
  std::size_t active_;
  std::size_t panels_;
  std::size_t ld_;
  std::size_t outputs_;
  std::size_t length_;  ///< of a row of weights: whole panels
  std::size_t slots_;
  std::size_t flushed_ = 0;  ///< removals up to the last flush
  std::size_t rank_ = 0;     ///< and since
  std::size_t kept_ = 0;     ///< formed rows
  int exponent_ = 0;         ///< costs are in units of 2^exponent_

  Buffer<double> weights_;  ///< panels of inputs, a row per output
  Buffer<double> columns_;  ///< panels of u_t (cpu::Removal), count_ rows each
  Buffer<double> images_;
  Buffer<double> rows_;         ///< pending rows v_t, length_ apart
  Buffer<double> packed_rows_;  ///< the same as panels
  Buffer<double> inverse_rows_;
  Buffer<double> gram_rows_;
  std::vector<double> scale_;  ///< of each position, powers of two: the diagonal begins in [1, 4)
  std::vector<double> diagonal_, norms_, costs_, floors_, alive_;
  std::vector<std::int64_t> input_;   ///< at each position
  std::vector<std::int64_t> slot_;    ///< of its formed rows, or -1
  std::vector<std::size_t> removed_;  ///< positions, since the last flush
};

Eliminator::Eliminator(const TensorView& inverse, const TensorView& weights,
                       const std::vector<double>& diagonal, std::size_t count)
    : inverse_(inverse),
      n_(diagonal.size()),
      count_(count),
      active_(n_),
      panels_(whole_panels(n_)),
      ld_(panels_ * kPanel),
      outputs_(static_cast<std::size_t>(weights.shape[1])),
      length_(whole_panels(outputs_) * kPanel),
      slots_(parallel_slots()),
      weights_(ld_ * length_),
      columns_(ld_ * count_),
      images_(ld_ * kPending),
      rows_(kPending * length_),
      packed_rows_(kPending * length_),
      inverse_rows_(kKept * ld_),
      gram_rows_(kKept * ld_),
      scale_(ld_, 1.0),
      diagonal_(ld_, 1.0),
      norms_(ld_),
      costs_(ld_),
      floors_(ld_, 0.0),
      alive_(ld_, 0.0),
      input_(ld_),
      slot_(ld_, -1) {
  // What is left of a diagonal after n downdates is rounding below this.
  const double noise = static_cast<double>(n_) * std::numeric_limits<double>::epsilon();
  for (std::size_t i = 0; i < n_; ++i) {
    scale_[i] = std::ldexp(1.0, -static_cast<int>(std::floor(std::ilogb(diagonal[i]) / 2.0)));
    diagonal_[i] = diagonal[i] * scale_[i] * scale_[i];
    floors_[i] = noise * diagonal_[i];
    alive_[i] = 1;
    input_[i] = static_cast<std::int64_t>(i);
  }
  // Whichever triangle's elements lie next to each other.
  if (std::abs(inverse.strides[0]) < std::abs(inverse.strides[1])) {
    std::swap(inverse_.strides[0], inverse_.strides[1]);
  }
  load_weights(weights);
  refresh();
}

void Eliminator::load_weights(const TensorView& source) {
  const auto pack = cpu::kernels().panel.pack_f64[static_cast<std::size_t>(source.dtype)];
  std::vector<std::int64_t> outputs(outputs_), inputs(n_);
  for (std::size_t r = 0; r < outputs_; ++r) {
    outputs[r] = static_cast<std::int64_t>(r) * source.strides[1];
  }
  for (std::size_t i = 0; i < n_; ++i) inputs[i] = static_cast<std::int64_t>(i) * source.strides[0];
  const auto peaks_of = cpu::kernels().eliminate.peaks;
  std::vector<double> peaks(ld_);
  std::vector<char> finite(panels_);
  parallel_for(panels_, slots_, [&](std::size_t p, std::size_t) {
    const std::size_t first = p * kPanel;
    double* panel = weights(p);
    pack(source.data, outputs.data(), outputs_, inputs.data() + first, std::min(kPanel, n_ - first),
         panel);
    std::fill(panel + outputs_ * kPanel, panel + length_ * kPanel, 0.0);
    finite[p] = peaks_of(panel, outputs_, peaks.data() + first);
  });
  if (std::count(finite.begin(), finite.end(), 0) > 0) {
    check_finite(source, "weights", {"input", "output"});
  }
  // C⁻¹ ← D C⁻¹ D and W ← D W leave the costs as they are.
  int top = std::numeric_limits<int>::min();
  for (std::size_t i = 0; i < n_; ++i) {
    if (peaks[i] > 0) top = std::max(top, std::ilogb(peaks[i]) + std::ilogb(scale_[i]));
  }
  if (top == std::numeric_limits<int>::min()) return;
  top = std::max(top, -1000);  // below, the factor itself would overflow
  exponent_ = 2 * top;
  parallel_for(panels_, slots_, [&](std::size_t p, std::size_t) {
    // The factor of a column far below the others may not fit into a number, its halves do.
    double factor[kPanel], rest[kPanel];
    for (std::size_t c = 0; c < kPanel; ++c) {
      const int exponent = std::ilogb(scale_[p * kPanel + c]) - top;
      factor[c] = std::ldexp(1.0, exponent / 2);
      rest[c] = std::ldexp(1.0, exponent - exponent / 2);
    }
    double* panel = weights(p);
    for (std::size_t r = 0; r < outputs_; ++r) {
      for (std::size_t c = 0; c < kPanel; ++c) {
        panel[r * kPanel + c] = panel[r * kPanel + c] * factor[c] * rest[c];
      }
    }
  });
}

void Eliminator::refresh() {
  const auto squares = cpu::kernels().eliminate.squares;
  parallel_for(panels_, slots_, [&](std::size_t p, std::size_t) {
    squares(weights(p), length_, norms_.data() + p * kPanel);
  });
  std::fill(norms_.begin() + static_cast<std::ptrdiff_t>(active_), norms_.end(), kInfinity);
  for (std::size_t i = 0; i < panels_ * kPanel; ++i) costs_[i] = norms_[i] / diagonal_[i];
}

std::size_t Eliminator::cheapest() const {
  std::size_t best = 0;
  for (std::size_t i = 1; i < active_; ++i) {
    if (costs_[i] < costs_[best] || (costs_[i] == costs_[best] && input_[i] < input_[best])) {
      best = i;
    }
  }
  return best;
}

void Eliminator::take_out(std::size_t position) {
  alive_[position] = 0;
  diagonal_[position] = 1;
  floors_[position] = 0;
  norms_[position] = kInfinity;
  costs_[position] = kInfinity;
}

double Eliminator::remove(std::size_t position, bool update) {
  const auto& kernels = cpu::kernels().eliminate;
  double coefficients[kPending], products[kPending];
  const double* column = columns(position / kPanel) + flushed_ * kPanel + position % kPanel;
  for (std::size_t t = 0; t < rank_; ++t) coefficients[t] = column[t * kPanel];
  const double* flushed = weights(position / kPanel) + position % kPanel;
  double* own = rows_.data() + rank_ * length_;
  for (std::size_t r = 0; r < length_; ++r) own[r] = flushed[r * kPanel];
  const double norm =
      kernels.weights_row(length_, rank_, rows_.data(), coefficients, own, products);
  const double pivot = diagonal_[position];
  const double cost = norm / pivot;
  if (!update) return cost;

  if (slot_[position] < 0) form_rows(position);
  const auto slot = static_cast<std::size_t>(slot_[position]);
  take_out(position);
  removed_.push_back(position);
  cpu::Removal removal{};
  removal.panels = panels_;
  removal.rank = rank_;
  removal.negated_row = inverse_row(slot);
  removal.gram_row = gram_row(slot);
  removal.coefficients = coefficients;
  removal.products = products;
  removal.inverse_root = 1 / std::sqrt(pivot);
  removal.norm = norm;
  removal.alive = alive_.data();
  removal.floors = floors_.data();
  removal.columns = columns(0) + flushed_ * kPanel;
  removal.stride = count_ * kPanel;
  removal.images = images_.data();
  removal.diagonal = diagonal_.data();
  removal.norms = norms_.data();
  removal.costs = costs_.data();
  if (!kernels.remove(removal)) {
    std::int64_t lost = std::numeric_limits<std::int64_t>::max();
    for (std::size_t i = 0; i < active_; ++i) {
      if (!(diagonal_[i] > floors_[i])) lost = std::min(lost, input_[i]);
    }
    fail<NumericalError>("inverse", "a matrix that stays positive definite",
                         "a diagonal lost to rounding at input " + std::to_string(lost) +
                             " when input " + std::to_string(input_[position]) + " is removed");
  }
  for (std::size_t r = 0; r < length_; ++r) own[r] *= -removal.inverse_root;
  ++rank_;
  return cost;
}

void Eliminator::form_rows(std::size_t position) {
  if (kept_ == kKept) {
    std::fill(slot_.begin(), slot_.end(), -1);
    kept_ = 0;
  }
  std::vector<std::size_t> members;
  for (std::size_t i = 0; i < active_; ++i) {
    if (alive_[i] > 0 && slot_[i] < 0 && i != position) members.push_back(i);
  }
  if (members.size() >= kPanel) {
    const auto cheap = members.begin() + static_cast<std::ptrdiff_t>(kPanel - 1);
    std::nth_element(members.begin(), cheap, members.end(), [&](std::size_t a, std::size_t b) {
      return costs_[a] != costs_[b] ? costs_[a] < costs_[b] : a < b;
    });
    members.resize(kPanel - 1);
  }
  members.push_back(position);
  for (std::size_t b = 0; b < members.size(); ++b) {
    slot_[members[b]] = static_cast<std::int64_t>(kept_ + b);
  }
  members.resize(kPanel, position);  // a whole panel, whose last rows nobody uses

  std::vector<std::int64_t> down(kPanel), across(active_);
  for (std::size_t b = 0; b < kPanel; ++b) down[b] = input_[members[b]] * inverse_.strides[0];
  for (std::size_t i = 0; i < active_; ++i) across[i] = input_[i] * inverse_.strides[1];
  Buffer<double> their_columns(kPanel * flushed_), their_weights(kPanel * length_);
  parallel_for(kPanel, slots_, [&](std::size_t b, std::size_t) {
    const std::size_t source = members[b];
    copy_column(columns(source / kPanel), source, flushed_, their_columns.data(), b);
    copy_column(weights(source / kPanel), source, length_, their_weights.data(), b);
  });

  const auto pack = cpu::kernels().panel.pack_f64[static_cast<std::size_t>(inverse_.dtype)];
  const auto tile = cpu::kernels().gram.tile_f64;
  const auto multiply = [tile, this](const double* left, const double* right, std::size_t rows,
                                     double* out) {
    for (std::size_t r = 0; r < rows; r += kDepth) {
      tile(left + r * kPanel, right + r * kPanel, std::min(kDepth, rows - r), out, ld_);
    }
  };
  parallel_for((panels_ + kGroup - 1) / kGroup, slots_, [&](std::size_t task, std::size_t) {
    const std::size_t begin = task * kGroup, end = std::min(panels_, begin + kGroup);
    // Row by row, as they lie in memory.
    for (std::size_t b = 0; b < kPanel; ++b) {
      double* inverse = inverse_row(kept_ + b);
      const double factor = -scale_[members[b]];
      for (std::size_t first = begin * kPanel; first < end * kPanel; first += kPanel) {
        pack(inverse_.data, &down[b], 1, across.data() + first, std::min(kPanel, active_ - first),
             inverse + first);
        for (std::size_t i = first; i < first + kPanel; ++i) {
          inverse[i] = inverse[i] * factor * scale_[i];
        }
      }
      std::fill(gram_row(kept_ + b) + begin * kPanel, gram_row(kept_ + b) + end * kPanel, 0.0);
    }
    for (std::size_t p = begin; p < end; ++p) {
      multiply(their_columns.data(), columns(p), flushed_, inverse_row(kept_) + p * kPanel);
      multiply(their_weights.data(), weights(p), length_, gram_row(kept_) + p * kPanel);
    }
  });
  kept_ += kPanel;
}

void Eliminator::close_ranks() {
  const std::size_t remaining = active_ - removed_.size();
  std::vector<std::pair<std::size_t, std::size_t>> moves;  // from, to
  std::size_t last = remaining;
  std::sort(removed_.begin(), removed_.end());
  for (const std::size_t to : removed_) {
    if (to >= remaining) break;
    while (alive_[last] == 0) ++last;
    moves.emplace_back(last++, to);
  }
  const std::size_t rows = flushed_ + rank_;
  for (const auto& [source, target] : moves) {
    copy_column(weights(source / kPanel), source, length_, weights(target / kPanel), target);
    copy_column(columns(source / kPanel), source, rows, columns(target / kPanel), target);
    input_[target] = input_[source];
    scale_[target] = scale_[source];
    diagonal_[target] = diagonal_[source];
    floors_[target] = floors_[source];
    alive_[target] = 1;
  }
  for (std::size_t i = remaining; i < active_; ++i) take_out(i);
  active_ = remaining;
  panels_ = whole_panels(remaining);
  removed_.clear();
}

void Eliminator::flush() {
  close_ranks();
  for (std::size_t o = 0; o < length_; o += kPanel) {
    for (std::size_t t = 0; t < rank_; ++t) {
      std::copy_n(rows_.data() + t * length_ + o, kPanel,
                  packed_rows_.data() + o * kPending + t * kPanel);
    }
  }
  const auto tile = cpu::kernels().gram.tile_f64;
  parallel_for(panels_, slots_, [&](std::size_t p, std::size_t) {
    for (std::size_t o = 0; o < length_; o += kPanel) {
      tile(packed_rows_.data() + o * kPending, columns(p) + flushed_ * kPanel, rank_,
           weights(p) + o * kPanel, kPanel);
    }
  });
  flushed_ += rank_;
  rank_ = 0;
  std::fill(slot_.begin(), slot_.end(), -1);
  kept_ = 0;
  refresh();
}

Elimination Eliminator::run() {
  Elimination result;
  result.order.reserve(count_);
  result.costs.reserve(count_);
  while (result.order.size() < count_) {
    if (rank_ == kPending) flush();
    const std::size_t position = cheapest();
    result.order.push_back(input_[position]);
    const double cost = std::ldexp(remove(position, result.order.size() < count_), exponent_);
    if (!std::isfinite(cost)) fail<NumericalError>("weights", "costs that fit into float64", "inf");
    result.costs.push_back(cost);
  }
  return result;
}

/// Refuses an inverse for the first fault: not finite, a diagonal not above 0, not symmetric.
/// Returns the diagonal. The view has been checked.
std::vector<double> check_inverse(const TensorView& inverse) {
  const auto n = static_cast<std::size_t>(inverse.shape[0]);
  std::vector<double> diagonal(n), norms(n);
  read(inverse, 0, diagonal_stride(inverse), n, diagonal.data());
  for (std::size_t i = 0; i < n; ++i) {
    if (!(diagonal[i] > 0)) {
      check_finite(inverse, "inverse", {"row", "column"});
      fail<InvalidArgument>("inverse", "a diagonal above 0", number(diagonal[i]) + place(i, i));
    }
    norms[i] = std::sqrt(diagonal[i]);
  }
  check_symmetric(inverse, "inverse", norms);
  return diagonal;
}

}  // namespace

Elimination eliminate(const TensorView& inverse, const TensorView& weights, std::int64_t count) {
  const KeepSubnormals keep;
  check_view(inverse, "inverse");
  check_view(weights, "weights");
  if (inverse.rank() != 2 || inverse.shape[0] != inverse.shape[1] || inverse.shape[0] < 1) {
    fail<InvalidArgument>("inverse", "shape (n, n), n >= 1", to_string(inverse.shape));
  }
  const std::int64_t n = inverse.shape[0];
  if (weights.rank() != 2 || weights.shape[0] != n || weights.shape[1] < 1) {
    fail<InvalidArgument>("weights", "shape (" + std::to_string(n) + ", outputs), outputs >= 1",
                          to_string(weights.shape));
  }
  check_range(count, 0, n, "count");
  const std::vector<double> diagonal = check_inverse(inverse);
  return Eliminator(inverse, weights, diagonal, static_cast<std::size_t>(count)).run();
}

}  // namespace secateur
