// An accumulator's sums while they are on a device.
#pragma once

#include <secateur/tensor.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "../cuda/backend.h"

namespace secateur {

class DeviceState {
 public:
  /// What an accumulator had counted.
  struct Counts {
    std::int64_t first = 0, second = 0;
  };

  /// Memory of the host's for some of the sums.
  struct Part {
    double* values;
    std::size_t size;
  };
  using Parts = std::vector<Part>;

  /// Takes `size` sums along, part behind part; no parts are zeros.
  DeviceState(const Device& device, std::size_t size, const Parts& parts)
      : sums_(cuda::make_sums(device, size)) {
    std::size_t first = 0;
    for (const auto& [values, count] : parts) {
      // Nothing was added as yet, mostly.
      if (std::any_of(values, values + count, [](double sum) { return sum != 0; })) {
        sums_->upload(first, values, count);
      }
      first += count;
    }
  }

  bool is_on(const Device& device) const { return sums_->device().index == device.index; }
  cuda::Sums& sums() { return *sums_; }

  /// Room for enqueued(), which must not fail: what is enqueued is added.
  void prepare() {
    if (before_.size() == before_.capacity()) before_.reserve(2 * before_.size() + 1);
  }

  /// An update was enqueued; these were the counts before it.
  void enqueued(const Counts& before) {
    before_.push_back(before);
    at_home_ = false;
  }

  /// Waits for all updates. The counts before the first that was refused: it, and all behind it,
  /// are not in the sums. Says so again when it is asked again.
  std::optional<Counts> wait() {
    if (before_.empty()) return std::nullopt;
    const std::int64_t refused = sums_->wait();
    if (refused >= 0) {
      const auto left = static_cast<std::int64_t>(before_.size());
      return before_[static_cast<std::size_t>(refused - (sums_->updates() - left))];
    }
    before_.clear();
    return std::nullopt;
  }

  /// Has the host the sums already?
  bool at_home() const { return at_home_; }
  /// Copies them, part behind part.
  void copy(const Parts& parts) const {
    std::size_t first = 0;
    for (const auto& [values, count] : parts) {
      sums_->download(first, values, count);
      first += count;
    }
  }
  /// To where they came from.
  void bring_home(const Parts& parts) {
    copy(parts);
    at_home_ = true;
  }

 private:
  std::unique_ptr<cuda::Sums> sums_;
  std::vector<Counts> before_;  ///< each update that nobody has waited for
  bool at_home_ = true;
};

}  // namespace secateur
