// An accumulator's sums while they are on a device.
#pragma once

#include <secateur/tensor.h>

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

  DeviceState(const Device& device, const std::vector<double>& values)
      : sums_(cuda::make_sums(device, values)), size_(values.size()) {}

  bool is_on(const Device& device) const { return sums_->device().index == device.index; }
  cuda::Sums& sums() { return *sums_; }

  /// An update was enqueued; these were the counts before it.
  void enqueued(const Counts& before) {
    before_.push_back(before);
    at_home_ = false;
  }

  /// Waits for all updates. The counts before the first that was refused: it, and all behind it,
  /// are not in the sums.
  std::optional<Counts> wait() {
    if (before_.empty()) return std::nullopt;
    const std::int64_t refused = sums_->wait();
    std::optional<Counts> result;
    if (refused >= 0) {
      const auto left = static_cast<std::int64_t>(before_.size());
      result = before_[static_cast<std::size_t>(refused - (sums_->updates() - left))];
    }
    before_.clear();
    return result;
  }

  /// The sums, unless the host has them already.
  std::optional<std::vector<double>> bring_home() {
    if (at_home_) return std::nullopt;
    std::vector<double> values(size_);
    sums_->download(values);
    at_home_ = true;
    return values;
  }

 private:
  std::unique_ptr<cuda::Sums> sums_;
  std::size_t size_;
  std::vector<Counts> before_;  ///< each update that nobody has waited for
  bool at_home_ = true;
};

}  // namespace secateur
