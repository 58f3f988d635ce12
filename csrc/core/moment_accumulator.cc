#include <secateur/moment_accumulator.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "../cpu/dispatch.h"
#include "buffer.h"
#include "check.h"
#include "packed.h"
#include "parallel.h"

namespace secateur {
namespace {

using cpu::kRows;

constexpr std::int64_t kMaxDim = 65536;
// Squares of this, over 1e60 rows, still fit into float64.
constexpr double kMaxMagnitude = 1e120;
// Where float32 products of two values and their sums neither overflow nor lose the largest.
constexpr double kLowF32 = 0x1p-40, kHighF32 = 0x1p50;
// Packed at a time: panels stay in the cache while every pair of them is multiplied.
constexpr std::size_t kChunkRows = 16 * kRows;
// A task multiplies a square of panels: its panels and tiles stay in the second-level cache.
constexpr std::size_t kGroup = 4;

/// The kernels for products in one precision.
template <typename T>
struct Precision;

template <>
struct Precision<float> {
  static constexpr std::size_t kPanel = cpu::kPanelF32;
  static auto pack(DType dtype) {
    return cpu::kernels().panel.pack_f32[static_cast<std::size_t>(dtype)];
  }
  static auto tile() { return cpu::kernels().gram.tile_f32; }
  static auto column_sums() { return cpu::kernels().panel.column_sums_f32; }
};

template <>
struct Precision<double> {
  static constexpr std::size_t kPanel = cpu::kPanelF64;
  static auto pack(DType dtype) {
    return cpu::kernels().panel.pack_f64[static_cast<std::size_t>(dtype)];
  }
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

/// Adds all rows of a checked view to the state. Allocates before it changes anything.
template <typename T>
void accumulate(const TensorView& x, MomentAccumulatorState& state) {
  constexpr std::size_t kPanel = Precision<T>::kPanel;
  constexpr std::size_t kTile = kPanel * kPanel;
  const auto pack = Precision<T>::pack(x.dtype);
  const auto tile = Precision<T>::tile();
  const auto column_sums = Precision<T>::column_sums();

  const std::size_t last = x.rank() - 1;
  const auto dim = static_cast<std::size_t>(x.shape[last]);
  const bool unit = x.strides[last] == 1;
  const std::size_t panels = (dim + kPanel - 1) / kPanel;
  const std::size_t groups = (panels + kGroup - 1) / kGroup;
  const std::vector<std::int64_t> rows = offsets(x, last);
  std::vector<std::int64_t> columns(dim);
  for (std::size_t c = 0; c < dim; ++c) {
    columns[c] = static_cast<std::int64_t>(c) * x.strides[last];
  }
  std::vector<std::pair<std::size_t, std::size_t>> pairs;
  for (std::size_t i = 0; i < groups; ++i) {
    for (std::size_t j = i; j < groups; ++j) pairs.emplace_back(i, j);
  }

  const std::size_t slots = parallel_slots();
  const std::size_t chunk_rows = std::min(rows.size(), kChunkRows);
  const std::size_t blocks = (chunk_rows + kRows - 1) / kRows;
  Buffer<T> packed(blocks * panels * kRows * kPanel);  // [block][panel][row][column]
  const auto panel_at = [&](std::size_t block, std::size_t panel) {
    return packed.data() + (block * panels + panel) * kRows * kPanel;
  };
  const std::size_t side = std::min(kGroup, panels);
  const std::size_t group_size = side * side * kTile;
  Buffer<double> tiles(slots * group_size);

  for (std::size_t begin = 0; begin < rows.size(); begin += chunk_rows) {
    const std::size_t count = std::min(chunk_rows, rows.size() - begin);
    const std::size_t used = (count + kRows - 1) / kRows;
    const auto block_rows = [&](std::size_t block) {
      return std::min(kRows, count - block * kRows);
    };
    parallel_for(used * panels, slots, [&](std::size_t task, std::size_t) {
      const std::size_t block = task / panels, panel = task % panels, first = panel * kPanel;
      const char* base = static_cast<const char*>(x.data) + (unit ? first * item_size(x.dtype) : 0);
      pack(base, rows.data() + begin + block * kRows, block_rows(block),
           unit ? nullptr : columns.data() + first, std::min(kPanel, dim - first),
           panel_at(block, panel));
    });
    parallel_for(pairs.size(), slots, [&](std::size_t task, std::size_t slot) {
      const auto [left, right] = pairs[task];
      const std::size_t left_end = std::min(panels, (left + 1) * kGroup);
      const std::size_t right_end = std::min(panels, (right + 1) * kGroup);
      double* sums = tiles.data() + slot * group_size;
      const auto tile_at = [&](std::size_t i, std::size_t j) {
        return sums + ((i - left * kGroup) * side + (j - right * kGroup)) * kTile;
      };
      std::fill_n(sums, group_size, 0.0);
      for (std::size_t block = 0; block < used; ++block) {
        for (std::size_t i = left * kGroup; i < left_end; ++i) {
          for (std::size_t j = std::max(i, right * kGroup); j < right_end; ++j) {
            tile(panel_at(block, i), panel_at(block, j), block_rows(block), tile_at(i, j), kPanel);
          }
        }
      }
      for (std::size_t i = left * kGroup; i < left_end; ++i) {
        for (std::size_t j = std::max(i, right * kGroup); j < right_end; ++j) {
          add_tile<kPanel>(tile_at(i, j), i, j, dim, state.second_moment.data());
        }
      }
      if (left != right) return;
      for (std::size_t i = left * kGroup; i < left_end; ++i) {
        double column[kPanel] = {};
        for (std::size_t block = 0; block < used; ++block) {
          column_sums(panel_at(block, i), block_rows(block), column);
        }
        const std::size_t first = i * kPanel;
        for (std::size_t c = first; c < std::min(dim, first + kPanel); ++c) {
          state.sum[c] += column[c - first];
        }
      }
    });
  }
  state.rows += static_cast<std::int64_t>(rows.size());
}

}  // namespace

MomentAccumulator::MomentAccumulator(std::int64_t dim, std::string name)
    : dim_(dim), name_(std::move(name)) {
  check_range(dim, 1, kMaxDim, label("dim"));
  const auto d = static_cast<std::size_t>(dim);
  state_.sum.assign(d, 0.0);
  state_.second_moment.assign(packed_size(d), 0.0);
}

std::string MomentAccumulator::label(const char* argument) const {
  return secateur::label(name_, argument);
}

void MomentAccumulator::update(const TensorView& x) {
  check_view(x, label("x"));
  if (x.rank() < 1 || x.shape[x.rank() - 1] != dim_) {
    fail<InvalidArgument>(label("x"), "shape (..., " + std::to_string(dim_) + ")",
                          to_string(x.shape));
  }
  const double peak = check_finite(x, label("x"), {});
  if (peak > kMaxMagnitude) {
    fail<NumericalError>(label("x"), "magnitudes up to 1e120", number(peak));
  }
  if (x.numel() == 0) return;
  const bool single = x.dtype != DType::f64 && (peak == 0 || (peak > kLowF32 && peak < kHighF32));
  if (single) {
    accumulate<float>(x, state_);
  } else {
    accumulate<double>(x, state_);
  }
}

void MomentAccumulator::merge(const MomentAccumulator& other) {
  if (dim_ != other.dim_) {
    fail<InvalidArgument>(label("other"), "dim " + std::to_string(dim_),
                          std::to_string(other.dim_));
  }
  add(state_.sum, other.state_.sum);
  add(state_.second_moment, other.state_.second_moment);
  state_.rows += other.state_.rows;
}

std::vector<double> MomentAccumulator::second_moment() const {
  const auto d = static_cast<std::size_t>(dim_);
  std::vector<double> result(d * d);
  unpack(state_.second_moment.data(), d, result.data());
  return result;
}

void MomentAccumulator::load_state(MomentAccumulatorState state) {
  check_at_least(state.rows, 0, label("rows"));
  check_sums(state.sum, state_.sum.size(), label("sum"));
  check_sums(state.second_moment, state_.second_moment.size(), label("second_moment"));
  state_ = std::move(state);
}

}  // namespace secateur
