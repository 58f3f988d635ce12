#include <secateur/moment_accumulator.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

#include "../cpu/dispatch.h"
#include "../cuda/backend.h"
#include "buffer.h"
#include "check.h"
#include "device_state.h"
#include "packed.h"
#include "parallel.h"
#include "subnormals.h"
#include "turns.h"

namespace secateur {
namespace {

using cpu::kRows;

constexpr std::int64_t kMaxDim = 65536;
constexpr std::int64_t kMaxStride = std::int64_t{1} << 31;
// Squares of this, over 1e60 rows, still fit into float64.
constexpr double kMaxMagnitude = 1e120;
// Where float32 products of two values and their sums neither overflow nor lose the largest.
constexpr double kLowF32 = 0x1p-40, kHighF32 = 0x1p50;
// Packed at a time: panels stay in the cache while every pair of them is multiplied.
constexpr std::size_t kChunkRows = 16 * kRows;
// A task multiplies a square of panels: its panels and tiles stay in the second-level cache.
constexpr std::size_t kGroup = 4;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// The kernels for products in one precision.
template <typename T>
struct Precision;

template <>
struct Precision<float> {
  static constexpr std::size_t kPanel = cpu::kPanelF32;
  static auto pack(DType dtype) {
    return cpu::kernels().panel.pack_f32[static_cast<std::size_t>(dtype)];
  }
  static auto scan() { return cpu::kernels().panel.scan[static_cast<std::size_t>(DType::f32)]; }
  static auto normalise() { return cpu::kernels().panel.normalise_f32; }
  static auto tile() { return cpu::kernels().gram.tile_f32; }
  static auto column_sums() { return cpu::kernels().panel.column_sums_f32; }
};

template <>
struct Precision<double> {
  static constexpr std::size_t kPanel = cpu::kPanelF64;
  static auto pack(DType dtype) {
    return cpu::kernels().panel.pack_f64[static_cast<std::size_t>(dtype)];
  }
  static auto scan() { return cpu::kernels().panel.scan[static_cast<std::size_t>(DType::f64)]; }
  static auto normalise() { return cpu::kernels().panel.normalise_f64; }
  static auto tile() { return cpu::kernels().gram.tile_f64; }
  static auto column_sums() { return cpu::kernels().panel.column_sums_f64; }
};

/// Adds the part of tile (i, j) that lies in the upper triangle to the packed matrix.
template <std::size_t kPanel>
void add_tile(const double* tile, std::size_t i, std::size_t j, std::size_t dim, double* packed) {
  const std::size_t row_end = std::min(dim, (i + 1) * kPanel);
  const std::size_t column_end = std::min(dim, (j + 1) * kPanel);
  for (std::size_t r = i * kPanel; r < row_end; ++r, tile += kPanel) {
    double* out = packed + packed_row(r, dim);
    for (std::size_t c = std::max(r, j * kPanel); c < column_end; ++c) {
      out[c] += tile[c - j * kPanel];
    }
  }
}

/// The rows of a batch that count.
struct Rows {
  const TensorView& view;
  std::vector<std::int64_t> offsets;
  std::vector<double> mean, factor;  ///< what RowNorm takes from each; empty for RowNorm::none

  std::size_t size() const { return offsets.size(); }
};

/// Packs a chunk of rows at a time into panels, and adds their products to the state.
template <typename T>
class Chunk {
 public:
  explicit Chunk(const Rows& rows);

  /// Takes `count` rows from `begin` on. Returns the largest magnitude of what it read, or Inf when
  /// not all of it is finite; with normalised rows 1, for they have been looked at.
  double pack(std::size_t begin, std::size_t count);
  void add_to(MomentAccumulatorState& state);

 private:
  static constexpr std::size_t kPanel = Precision<T>::kPanel;
  static constexpr std::size_t kTile = kPanel * kPanel;

  T* panel(std::size_t block, std::size_t index) {
    return packed_.data() + (block * panels_ + index) * kRows * kPanel;
  }
  std::size_t blocks() const { return (count_ + kRows - 1) / kRows; }
  std::size_t block_rows(std::size_t block) const {
    return std::min(kRows, count_ - block * kRows);
  }
  /// All tiles of a square of panels; their column sums where it lies on the diagonal.
  void add_group(std::size_t left, std::size_t right, double* tiles, MomentAccumulatorState& state);

  const Rows& rows_;
  std::size_t dim_;
  bool unit_;
  std::size_t panels_;
  std::size_t side_;  ///< panels of a group
  std::size_t slots_;
  std::size_t count_ = 0;
  std::vector<std::int64_t> columns_;
  std::vector<double> peaks_;                               ///< one a slot
  std::vector<std::pair<std::size_t, std::size_t>> pairs_;  ///< first panels of two groups
  Buffer<T> packed_;                                        ///< [block][panel][row][column]
  Buffer<double> tiles_;                                    ///< [slot][panel][panel][row][column]
};

template <typename T>
Chunk<T>::Chunk(const Rows& rows)
    : rows_(rows),
      dim_(static_cast<std::size_t>(rows.view.shape[rows.view.rank() - 1])),
      unit_(rows.view.strides[rows.view.rank() - 1] == 1),
      panels_((dim_ + kPanel - 1) / kPanel),
      side_(std::min(kGroup, panels_)),
      slots_(parallel_slots()),
      columns_(dim_),
      peaks_(slots_),
      packed_((std::min(rows.size(), kChunkRows) + kRows - 1) / kRows * panels_ * kRows * kPanel),
      tiles_(slots_ * side_ * side_ * kTile) {
  for (std::size_t c = 0; c < dim_; ++c) {
    columns_[c] = static_cast<std::int64_t>(c) * rows.view.strides[rows.view.rank() - 1];
  }
  for (std::size_t i = 0; i < panels_; i += kGroup) {
    for (std::size_t j = i; j < panels_; j += kGroup) pairs_.emplace_back(i, j);
  }
}

template <typename T>
double Chunk<T>::pack(std::size_t begin, std::size_t count) {
  const auto pack = Precision<T>::pack(rows_.view.dtype);
  const auto scan = Precision<T>::scan();
  const auto normalise = Precision<T>::normalise();
  count_ = count;
  std::fill(peaks_.begin(), peaks_.end(), 0.0);
  parallel_for(blocks() * panels_, slots_, [&](std::size_t task, std::size_t slot) {
    const std::size_t block = task / panels_, first = task % panels_ * kPanel;
    const std::size_t row = begin + block * kRows, size = block_rows(block);
    const char* base = static_cast<const char*>(rows_.view.data) +
                       (unit_ ? first * item_size(rows_.view.dtype) : 0);
    T* out = panel(block, task % panels_);
    pack(base, rows_.offsets.data() + row, size, unit_ ? nullptr : columns_.data() + first,
         std::min(kPanel, dim_ - first), out);
    if (!rows_.factor.empty()) {
      normalise(out, size, rows_.mean.data() + row, rows_.factor.data() + row);
      peaks_[slot] = 1;
    } else if (!scan(out, 1, size * kPanel, &peaks_[slot])) {
      peaks_[slot] = kInfinity;
    }
  });
  return *std::max_element(peaks_.begin(), peaks_.end());
}

template <typename T>
void Chunk<T>::add_to(MomentAccumulatorState& state) {
  parallel_for(pairs_.size(), slots_, [&](std::size_t task, std::size_t slot) {
    add_group(pairs_[task].first, pairs_[task].second, tiles_.data() + slot * side_ * side_ * kTile,
              state);
  });
  state.rows += static_cast<std::int64_t>(count_);
}

template <typename T>
void Chunk<T>::add_group(std::size_t left, std::size_t right, double* tiles,
                         MomentAccumulatorState& state) {
  const auto tile = Precision<T>::tile();
  const std::size_t left_end = std::min(panels_, left + kGroup);
  const std::size_t right_end = std::min(panels_, right + kGroup);
  const auto tile_at = [&](std::size_t i, std::size_t j) {
    return tiles + ((i - left) * side_ + (j - right)) * kTile;
  };
  std::fill_n(tiles, side_ * side_ * kTile, 0.0);
  for (std::size_t block = 0; block < blocks(); ++block) {
    for (std::size_t i = left; i < left_end; ++i) {
      for (std::size_t j = std::max(i, right); j < right_end; ++j) {
        tile(panel(block, i), panel(block, j), block_rows(block), tile_at(i, j), kPanel);
      }
    }
  }
  for (std::size_t i = left; i < left_end; ++i) {
    for (std::size_t j = std::max(i, right); j < right_end; ++j) {
      add_tile<kPanel>(tile_at(i, j), i, j, dim_, state.second_moment.data());
    }
  }
  if (left != right) return;
  for (std::size_t i = left; i < left_end; ++i) {
    double column[kPanel] = {};
    for (std::size_t block = 0; block < blocks(); ++block) {
      Precision<T>::column_sums()(panel(block, i), block_rows(block), column);
    }
    const std::size_t first = i * kPanel;
    for (std::size_t c = first; c < std::min(dim_, first + kPanel); ++c) {
      state.sum[c] += column[c - first];
    }
  }
}

/// Adds all rows. Those of one chunk may be packed already.
template <typename T>
void add_rows(Chunk<T>& chunk, std::size_t rows, bool packed, MomentAccumulatorState& state) {
  for (std::size_t begin = 0; begin < rows; begin += kChunkRows) {
    if (!packed) chunk.pack(begin, std::min(kChunkRows, rows - begin));
    chunk.add_to(state);
  }
}

/// RowNorm's mean and factor of each row. False when not all of them are finite.
bool take_norms(bool center, Rows& rows) {
  const TensorView& x = rows.view;
  const auto row_norm = cpu::kernels().panel.row_norm[static_cast<std::size_t>(x.dtype)];
  const std::size_t last = x.rank() - 1;
  const auto size = static_cast<std::int64_t>(item_size(x.dtype));
  rows.mean.resize(rows.size());
  rows.factor.resize(rows.size());
  std::atomic<bool> finite{true};
  parallel_for((rows.size() + kRows - 1) / kRows, parallel_slots(),
               [&](std::size_t task, std::size_t) {
                 const std::size_t end = std::min(rows.size(), (task + 1) * kRows);
                 for (std::size_t r = task * kRows; r < end; ++r) {
                   const char* row = static_cast<const char*>(x.data) + rows.offsets[r] * size;
                   if (!row_norm(row, x.strides[last], static_cast<std::size_t>(x.shape[last]),
                                 center, &rows.mean[r], &rows.factor[r])) {
                     finite.store(false, std::memory_order_relaxed);
                   }
                 }
               });
  return finite;
}

/// Of the tokens n ≡ phase + b (mod stride), those of image b that count: the first, and how many.
std::int64_t first_token(std::int64_t stride, std::int64_t phase, std::int64_t b) {
  return (phase % stride + b % stride) % stride;
}
std::int64_t token_count(std::int64_t tokens, std::int64_t stride, std::int64_t first) {
  return first < tokens ? (tokens - first - 1) / stride + 1 : 0;
}

/// Those of image b, the first of which is there or not: (1, tokens, dim).
TensorView counted_tokens(const TensorView& x, std::int64_t b, std::int64_t first,
                          std::int64_t stride) {
  TensorView result = x;
  result.shape[0] = 1;
  result.shape[1] = token_count(x.shape[1], stride, first);
  if (result.numel() == 0) return result;
  result.data =
      static_cast<const char*>(x.data) +
      (b * x.strides[0] + first * x.strides[1]) * static_cast<std::int64_t>(item_size(x.dtype));
  if (result.shape[1] > 1) result.strides[1] *= stride;
  return result;
}

/// Their offsets, for all images.
std::vector<std::int64_t> token_offsets(const TensorView& x, std::int64_t stride,
                                        std::int64_t phase) {
  std::vector<std::int64_t> result;
  for (std::int64_t b = 0; b < x.shape[0]; ++b) {
    for (std::int64_t n = first_token(stride, phase, b); n < x.shape[1]; n += stride) {
      result.push_back(b * x.strides[0] + n * x.strides[1]);
    }
  }
  return result;
}

/// In the order in which a device has them.
DeviceState::Parts parts_of(MomentAccumulatorState& state) {
  return {{state.sum.data(), state.sum.size()},
          {state.second_moment.data(), state.second_moment.size()}};
}

bool fits_f32(double peak) { return peak == 0 || (peak > kLowF32 && peak < kHighF32); }

}  // namespace

MomentAccumulator::MomentAccumulator(std::int64_t dim, std::string name)
    : dim_(dim), name_(std::move(name)) {
  check_range(dim, 1, kMaxDim, label("dim"));
}

MomentAccumulator::MomentAccumulator(const MomentAccumulator& other)
    : dim_(other.dim_), name_(other.name_), state_(other.state()) {}

MomentAccumulator& MomentAccumulator::operator=(const MomentAccumulator& other) {
  if (this != &other) *this = MomentAccumulator(other);
  return *this;
}

MomentAccumulator::MomentAccumulator(MomentAccumulator&&) noexcept = default;
MomentAccumulator& MomentAccumulator::operator=(MomentAccumulator&&) noexcept = default;
MomentAccumulator::~MomentAccumulator() = default;

std::size_t MomentAccumulator::sum_size() const { return static_cast<std::size_t>(dim_); }
std::size_t MomentAccumulator::moment_size() const { return packed_size(sum_size()); }

std::string MomentAccumulator::label(const char* argument) const {
  return secateur::label(name_, argument);
}

void MomentAccumulator::check_magnitudes(const TensorView& x, const RowOptions& options,
                                         Turn turn) const {
  double peak = 0;
  if (options.stride == 1 && turn.step == 1) {
    peak = check_finite(x, label("x"), {});
  } else {
    for (std::int64_t b = turn.first; b < x.shape[0]; b += turn.step) {
      const std::int64_t first = first_token(options.stride, options.phase, b / turn.step);
      const TensorView rows = counted_tokens(x, b, first, options.stride);
      peak = std::max(peak, check_finite(rows, label("x"), {}, [&](std::vector<std::int64_t>& at) {
                        at[0] = b;
                        at[1] = first + at[1] * options.stride;
                      }));
    }
  }
  if (peak > kMaxMagnitude) {
    fail<NumericalError>(label("x"), "magnitudes up to 1e120", number(peak));
  }
}

bool MomentAccumulator::check_batch(const TensorView& x, const RowOptions& options) const {
  const bool on_cuda = check_device_view(x, label("x"));
  if (x.rank() < 1 || x.shape[x.rank() - 1] != dim_) {
    fail<InvalidArgument>(label("x"), "shape (..., " + std::to_string(dim_) + ")",
                          to_string(x.shape));
  }
  check_range(options.stride, 1, kMaxStride, label("stride"));
  check_at_least(options.phase, 0, label("phase"));
  if (options.stride > 1 && x.rank() != 3) {
    fail<InvalidArgument>(label("x"), "shape (images, tokens, dim) with a stride",
                          to_string(x.shape));
  }
  return on_cuda;
}

void MomentAccumulator::update(const TensorView& x, const RowOptions& options) {
  if (check_batch(x, options)) {
    update_on_device({this}, x, {options}, true);
  } else {
    update_on_host(x, options, {});
  }
}

void MomentAccumulator::update_in_turn(const std::vector<MomentAccumulator*>& accumulators,
                                       const TensorView& x, const std::vector<RowOptions>& options,
                                       bool wait) {
  check_turns(accumulators, "accumulators");
  const MomentAccumulator& first = *accumulators[0];
  if (options.size() != accumulators.size()) {
    fail<InvalidArgument>(first.label("options"), std::to_string(accumulators.size()),
                          std::to_string(options.size()));
  }
  bool on_cuda = false;
  for (std::size_t turn = 0; turn < accumulators.size(); ++turn) {
    on_cuda = accumulators[turn]->check_batch(x, options[turn]);
    if (options[turn].norm != options[0].norm || options[turn].stride != options[0].stride) {
      fail<InvalidArgument>(first.label("options"), "one norm and stride for all", "several");
    }
  }
  if (x.rank() != 3) {
    fail<InvalidArgument>(first.label("x"), "shape (images, tokens, dim)", to_string(x.shape));
  }
  if (on_cuda) return update_on_device(accumulators, x, options, wait);
  const auto turns = static_cast<std::int64_t>(accumulators.size());
  for (std::int64_t turn = 0; turn < std::min(turns, x.shape[0]); ++turn) {
    const auto t = static_cast<std::size_t>(turn);
    accumulators[t]->update_on_host(x, options[t], {turn, turns});
  }
}

void MomentAccumulator::update_on_host(const TensorView& batch, const RowOptions& options,
                                       Turn turn) {
  const KeepSubnormals keep;
  const auto [norm, stride, phase] = options;
  if (batch.numel() == 0) return;
  const TensorView x = turn.step > 1 ? every(batch, turn.first, turn.step) : batch;
  const auto explain = [&] { check_magnitudes(batch, options, turn); };
  go_home();
  Rows rows{x, stride > 1 ? token_offsets(x, stride, phase) : offsets(x, x.rank() - 1), {}, {}};
  const std::size_t count = rows.size();
  if (count == 0) return;
  const bool one = count <= kChunkRows;  // then packing looks for what must not be there
  double peak = 0;
  if (norm != RowNorm::none) {
    if (!take_norms(norm == RowNorm::layer, rows)) explain();
  } else if (!one) {
    peak = scan_rows(x, rows.offsets);
    if (!(peak <= kMaxMagnitude)) explain();
  }
  if (x.dtype != DType::f64) {
    Chunk<float> chunk(rows);
    if (one) peak = chunk.pack(0, count);
    if (std::isinf(peak)) explain();
    if (norm != RowNorm::none || fits_f32(peak)) return add_rows(chunk, count, one, state_);
  }
  Chunk<double> chunk(rows);
  if (one && chunk.pack(0, count) > kMaxMagnitude) explain();
  add_rows(chunk, count, one, state_);
}

void MomentAccumulator::update_on_device(const std::vector<MomentAccumulator*>& accumulators,
                                         const TensorView& x,
                                         const std::vector<RowOptions>& options, bool wait) {
  if (x.numel() == 0) return;
  const auto turns = static_cast<std::int64_t>(accumulators.size());
  cuda::MomentRows rows;
  rows.x = x;
  rows.normalise = options[0].norm != RowNorm::none;
  rows.center = options[0].norm == RowNorm::layer;
  rows.stride = options[0].stride;
  std::vector<cuda::Sums*> sums;
  for (std::size_t turn = 0; turn < accumulators.size(); ++turn) {
    MomentAccumulator& accumulator = *accumulators[turn];
    rows.phases.push_back(options[turn].phase);
    if (wait) accumulator.wait();  // or faults of before would be taken for this batch's
    if (accumulator.device_ && !accumulator.device_->is_on(x.device)) accumulator.go_home();
    if (!accumulator.device_) {
      MomentAccumulatorState& state = accumulator.state_;
      accumulator.device_ = std::make_unique<DeviceState>(
          x.device, accumulator.sum_size() + accumulator.moment_size(),
          state.sum.empty() ? DeviceState::Parts{} : parts_of(state));
    }
    accumulator.device_->prepare();
    sums.push_back(&accumulator.device_->sums());
  }
  cuda::moments(rows, kMaxMagnitude, sums);
  for (std::int64_t turn = 0; turn < turns; ++turn) {
    MomentAccumulator& accumulator = *accumulators[static_cast<std::size_t>(turn)];
    accumulator.device_->enqueued({accumulator.state_.rows, 0});
    if (turns == 1 && rows.stride == 1) {
      accumulator.state_.rows += x.numel() / x.shape[x.rank() - 1];
    } else {
      for (std::int64_t b = turn; b < x.shape[0]; b += turns) {
        accumulator.state_.rows += token_count(
            x.shape[1], rows.stride,
            first_token(rows.stride, options[static_cast<std::size_t>(turn)].phase, b / turns));
      }
    }
  }
  std::size_t faulty = accumulators.size();
  for (std::size_t turn = accumulators.size(); wait && turn-- > 0;) {
    if (!accumulators[turn]->is_sound()) faulty = turn;
  }
  if (faulty == accumulators.size()) return;
  accumulators[faulty]->check_magnitudes(x, options[faulty],
                                         {static_cast<std::int64_t>(faulty), turns});
  fail<NumericalError>(accumulators[faulty]->label("x"), "finite values",
                       "one that was not when it was read");
}

bool MomentAccumulator::is_sound() const {
  const auto before = device_ ? device_->wait() : std::nullopt;
  if (!before) return true;
  bring_home();
  device_.reset();
  state_.rows = before->first;
  return false;
}

void MomentAccumulator::wait() const {
  if (is_sound()) return;
  fail<NumericalError>(label("x"), "finite magnitudes up to 1e120",
                       "one that is not, in a batch that was not waited for");
}

void MomentAccumulator::bring_home() const {
  if (state_.sum.empty()) {
    std::vector<double> sum(sum_size());
    state_.second_moment.assign(moment_size(), 0.0);
    state_.sum = std::move(sum);
  }
  if (device_ && !device_->at_home()) {
    device_->bring_home(parts_of(state_));
  }
}

void MomentAccumulator::go_home() {
  state();
  device_.reset();
}

const MomentAccumulatorState& MomentAccumulator::state() const {
  wait();
  bring_home();
  return state_;
}

void MomentAccumulator::copy_state(double* sum, double* second_moment) const {
  wait();
  if (device_ && !device_->at_home()) {
    device_->copy({{sum, sum_size()}, {second_moment, moment_size()}});
  } else if (state_.sum.empty()) {
    std::fill_n(sum, sum_size(), 0.0);
    std::fill_n(second_moment, moment_size(), 0.0);
  } else {
    std::copy(state_.sum.begin(), state_.sum.end(), sum);
    std::copy(state_.second_moment.begin(), state_.second_moment.end(), second_moment);
  }
}

void MomentAccumulator::merge(const MomentAccumulator& other) {
  if (dim_ != other.dim_) {
    fail<InvalidArgument>(label("other"), "dim " + std::to_string(dim_),
                          std::to_string(other.dim_));
  }
  other.state();
  go_home();
  const KeepSubnormals keep;
  const std::int64_t rows = count_sum(state_.rows, other.state_.rows, label("rows"));
  check_sum(state_.sum, other.state_.sum, label("sum"));
  check_sum(state_.second_moment, other.state_.second_moment, label("second_moment"));
  add(state_.sum, other.state_.sum);
  add(state_.second_moment, other.state_.second_moment);
  state_.rows = rows;
}

std::vector<double> MomentAccumulator::second_moment() const {
  const auto d = static_cast<std::size_t>(dim_);
  std::vector<double> result(d * d);
  unpack(state().second_moment.data(), d, result.data());
  return result;
}

void MomentAccumulator::load_state(MomentAccumulatorState state) {
  check_count(state.rows, 0, label("rows"));
  check_sums(state.sum, sum_size(), label("sum"));
  check_sums(state.second_moment, moment_size(), label("second_moment"));
  device_.reset();
  state_ = std::move(state);
}

}  // namespace secateur
