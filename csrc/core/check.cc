#include "check.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>
#include <utility>

#include "../cpu/dispatch.h"
#include "../cuda/backend.h"
#include "parallel.h"

namespace secateur {
namespace {

// Elements that are worth a task of their own.
constexpr std::size_t kScanTask = std::size_t{1} << 16;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Of rows along the last axis; a view without axes is one row of one element.
std::size_t row_length(const TensorView& view) {
  return view.rank() == 0 ? 1 : static_cast<std::size_t>(view.shape[view.rank() - 1]);
}
std::int64_t row_stride(const TensorView& view) {
  return view.rank() == 0 ? 1 : view.strides[view.rank() - 1];
}

/// Whether the row at this offset is finite; raises *peak to its largest magnitude.
bool scan_row(const TensorView& view, std::int64_t offset, double* peak) {
  const auto scan = cpu::kernels().panel.scan[static_cast<std::size_t>(view.dtype)];
  const auto size = static_cast<std::int64_t>(item_size(view.dtype));
  return scan(static_cast<const char*>(view.data) + offset * size, row_stride(view),
              row_length(view), peak);
}

/// How far apart M_ij and M_ji may be, relative to sqrt(M_ii M_jj).
double asymmetry(DType dtype) {
  switch (dtype) {
    case DType::f16:
      return 0x1p-7;
    case DType::bf16:
      return 0x1p-4;
    case DType::f32:
    case DType::f64:
      break;
  }
  return 1e-4;
}

[[noreturn]] void fail_at(const TensorView& view, const std::string& argument,
                          const std::vector<std::string>& axes, const Renumber& renumber,
                          std::int64_t index, double value) {
  std::vector<std::int64_t> at(view.rank());
  for (std::size_t axis = view.rank(); axis-- > 0;) {
    at[axis] = index % view.shape[axis];
    index /= view.shape[axis];
  }
  if (renumber) renumber(at);
  std::string place;
  for (std::size_t axis = 0; axis < at.size(); ++axis) {
    place += (axis == 0 ? "" : ", ") + (axis < axes.size() ? axes[axis] + " " : std::string()) +
             std::to_string(at[axis]);
  }
  fail<NumericalError>(argument, "finite values", number(value) + " at (" + place + ")");
}

/// Sizes >= 0 and memory that is there and aligned.
void check_geometry(const TensorView& view, const std::string& argument) {
  const std::size_t size = item_size(view.dtype);
  if (std::any_of(view.shape.begin(), view.shape.end(), [](std::int64_t n) { return n < 0; })) {
    fail<InvalidArgument>(argument, "sizes of at least 0", to_string(view.shape));
  }
  if (view.strides.size() != view.rank()) {
    fail<InvalidArgument>(argument, "one stride per dimension", to_string(view.strides));
  }
  if (view.numel() == 0) return;
  if (view.data == nullptr) fail<InvalidArgument>(argument, "memory", "a null pointer");
  if (reinterpret_cast<std::uintptr_t>(view.data) % size != 0) {
    fail<InvalidArgument>(argument, "memory aligned to " + std::to_string(size) + " bytes",
                          "an unaligned pointer");
  }
}

}  // namespace

std::string label(const std::string& owner, const char* argument) {
  return owner.empty() ? argument : owner + " " + argument;
}

std::string to_string(const Device& device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

void check_view(const TensorView& view, const std::string& argument) {
  if (view.device.type != DeviceType::cpu) {
    fail<Unsupported>(argument, "a tensor on the CPU", "one on " + to_string(view.device));
  }
  check_geometry(view, argument);
}

bool check_device_view(const TensorView& view, const std::string& argument) {
  const bool on_cuda = view.device.type == DeviceType::cuda;
  // First: what a device's memory is cannot be said without it.
  if (on_cuda) cuda::check_memory(view, view.data, argument);
  check_geometry(view, argument);
  return on_cuda;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", std::isnan(value) ? std::fabs(value) : value);
  return text;
}

std::string place(std::size_t row, std::size_t column) {
  return " at (row " + std::to_string(row) + ", column " + std::to_string(column) + ")";
}

void check_at_least(std::int64_t value, std::int64_t low, const std::string& argument) {
  if (value >= low) return;
  fail<InvalidArgument>(argument, "at least " + std::to_string(low), std::to_string(value));
}

void check_range(std::int64_t value, std::int64_t low, std::int64_t high,
                 const std::string& argument) {
  if (value >= low && value <= high) return;
  fail<InvalidArgument>(argument, std::to_string(low) + " to " + std::to_string(high),
                        std::to_string(value));
}

void check_count(std::int64_t value, std::int64_t low, const std::string& argument) {
  check_at_least(value, low, argument);
  if (value > kMaxCount) fail<InvalidArgument>(argument, "at most 2^62", std::to_string(value));
}

std::int64_t count_sum(std::int64_t a, std::int64_t b, const std::string& argument) {
  if (a > kMaxCount - b) {
    fail<InvalidArgument>(argument, "at most 2^62 in all",
                          std::to_string(a) + " and " + std::to_string(b));
  }
  return a + b;
}

void check_sum(const std::vector<double>& a, const std::vector<double>& b,
               const std::string& argument) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i] + b[i])) {
      fail<NumericalError>(argument, "sums that fit into float64",
                           number(a[i]) + " and " + number(b[i]) + " at " + std::to_string(i));
    }
  }
}

void check_sums(const std::vector<double>& values, std::size_t size, const std::string& argument) {
  if (values.size() != size) {
    fail<InvalidArgument>(argument, std::to_string(size) + " values",
                          std::to_string(values.size()));
  }
  for (std::size_t i = 0; i < size; ++i) {
    if (!std::isfinite(values[i])) {
      fail<NumericalError>(argument, "finite values",
                           number(values[i]) + " at " + std::to_string(i));
    }
  }
}

void read(const TensorView& view, std::int64_t offset, std::int64_t stride, std::size_t count,
          double* out) {
  const auto pack = cpu::kernels().panel.pack_f64[static_cast<std::size_t>(view.dtype)];
  double panel[cpu::kPanelF64];
  std::int64_t columns[cpu::kPanelF64];
  for (std::size_t c = 0; c < std::min(count, cpu::kPanelF64); ++c) {
    columns[c] = static_cast<std::int64_t>(c) * stride;
  }
  for (std::size_t i = 0; i < count; i += cpu::kPanelF64) {
    const std::size_t width = std::min(cpu::kPanelF64, count - i);
    const std::int64_t start = offset + static_cast<std::int64_t>(i) * stride;
    pack(view.data, &start, 1, columns, width, panel);
    std::copy_n(panel, width, out + i);
  }
}

std::int64_t diagonal_stride(const TensorGeometry& view) {
  const std::size_t last = view.rank() - 1;
  return view.shape[last] > 1 ? view.strides[last - 1] + view.strides[last] : 0;
}

std::vector<std::int64_t> offsets(const TensorGeometry& view, std::size_t axes) {
  std::vector<std::int64_t> result{0};
  for (std::size_t axis = 0; axis < axes; ++axis) {
    std::vector<std::int64_t> next;
    next.reserve(result.size() * static_cast<std::size_t>(view.shape[axis]));
    for (const std::int64_t base : result) {
      for (std::int64_t i = 0; i < view.shape[axis]; ++i) {
        next.push_back(base + i * view.strides[axis]);
      }
    }
    result = std::move(next);
  }
  return result;
}

double scan_rows(const TensorView& view, const std::vector<std::int64_t>& rows) {
  const std::size_t length = row_length(view);
  const std::size_t step = std::max<std::size_t>(1, kScanTask / length);
  const std::size_t tasks = (rows.size() + step - 1) / step, slots = parallel_slots();
  std::vector<double> peaks(slots, 0.0);
  parallel_for(tasks, slots, [&](std::size_t task, std::size_t slot) {
    const std::size_t end = std::min(rows.size(), (task + 1) * step);
    for (std::size_t row = task * step; row < end; ++row) {
      if (!scan_row(view, rows[row], &peaks[slot])) peaks[slot] = kInfinity;
    }
  });
  return *std::max_element(peaks.begin(), peaks.end());
}

double check_finite(const TensorView& view, const std::string& argument,
                    const std::vector<std::string>& axes, const Renumber& renumber) {
  if (view.numel() == 0) return 0;
  if (view.device.type == DeviceType::cuda) {
    const cuda::Scan found = cuda::scan(view);
    if (found.index >= 0) fail_at(view, argument, axes, renumber, found.index, found.value);
    return found.value;
  }
  const std::vector<std::int64_t> rows = offsets(view, view.rank() == 0 ? 0 : view.rank() - 1);
  const double largest = scan_rows(view, rows);
  if (std::isfinite(largest)) return largest;

  const std::int64_t stride = row_stride(view);
  for (std::size_t row = 0;; ++row) {
    double peak = 0;
    if (scan_row(view, rows[row], &peak)) continue;
    for (std::size_t i = 0;; ++i) {
      double value = 0;
      read(view, rows[row] + static_cast<std::int64_t>(i) * stride, stride, 1, &value);
      if (!std::isfinite(value)) {
        fail_at(view, argument, axes, renumber,
                static_cast<std::int64_t>(row * row_length(view) + i), value);
      }
    }
  }
}

void check_symmetric(const TensorView& matrix, const std::string& argument,
                     const std::vector<double>& norms) {
  constexpr std::size_t kPanel = cpu::kPanelF64;
  const std::size_t n = norms.size(), panels = (n + kPanel - 1) / kPanel;
  std::vector<double> root(panels * kPanel, 0.0), limit(root);
  std::vector<std::int64_t> down(n), across(n);
  for (std::size_t i = 0; i < n; ++i) {
    root[i] = norms[i];
    limit[i] = asymmetry(matrix.dtype) * norms[i];
    down[i] = static_cast<std::int64_t>(i) * matrix.strides[0];
    across[i] = static_cast<std::int64_t>(i) * matrix.strides[1];
  }

  // Both triangles in one pass; the fault is looked for where there is one.
  const auto pack = cpu::kernels().panel.pack_f64[static_cast<std::size_t>(matrix.dtype)];
  const auto symmetric = cpu::kernels().panel.symmetric;
  const bool unit = matrix.strides[1] == 1;
  const auto square = [&](std::size_t p, std::size_t q, double* out) {
    const std::size_t top = p * kPanel, left = q * kPanel;
    const char* base =
        static_cast<const char*>(matrix.data) + (unit ? left * item_size(matrix.dtype) : 0);
    pack(base, down.data() + top, std::min(kPanel, n - top), unit ? nullptr : across.data() + left,
         std::min(kPanel, n - left), out);
  };
  std::atomic<bool> sound{true};
  parallel_for(panels, parallel_slots(), [&](std::size_t p, std::size_t) {
    for (std::size_t q = p; q < panels; ++q) {
      double upper[kPanel * kPanel] = {}, lower[kPanel * kPanel] = {};
      square(p, q, upper);
      square(q, p, lower);
      if (!symmetric(upper, lower, limit.data() + p * kPanel, root.data() + q * kPanel)) {
        sound.store(false, std::memory_order_relaxed);
      }
    }
  });
  if (sound) return;

  check_finite(matrix, argument, {"row", "column"});
  std::vector<double> row(n), column(n);
  for (std::size_t i = 0; i < n; ++i) {
    read(matrix, down[i], matrix.strides[1], n, row.data());
    read(matrix, across[i], matrix.strides[0], n, column.data());
    for (std::size_t j = i + 1; j < n; ++j) {
      if (!(std::fabs(row[j] - column[j]) <= limit[i] * root[j])) {
        fail<InvalidArgument>(
            argument, "a symmetric matrix",
            number(row[j]) + place(i, j) + " and " + number(column[j]) + place(j, i));
      }
    }
  }
}

}  // namespace secateur
