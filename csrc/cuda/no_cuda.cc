// A build without CUDA: the same symbols, which refuse.
#include "../core/check.h"
#include "backend.h"

namespace secateur::cuda {
namespace {

[[noreturn]] void refuse(const std::string& argument, const Device& device) {
  fail<Unsupported>(argument, "a tensor on the CPU (this build has no CUDA)",
                    "one on " + to_string(device));
}

}  // namespace

bool built() { return false; }

void check_memory(const TensorGeometry& view, const void*, const std::string& argument) {
  refuse(argument, view.device);
}

std::int64_t max_head_dim() { return 0; }

std::unique_ptr<Sums> make_sums(const Device& device, std::size_t) { refuse("tensor", device); }

void score(const TensorView& q, const TensorView&, std::int64_t, bool, double,
           const std::vector<Sums*>&) {
  refuse("q", q.device);
}

Scan scan(const TensorView& view) { refuse("tensor", view.device); }

void moments(const MomentRows& rows, double, const std::vector<Sums*>&) {
  refuse("x", rows.x.device);
}

void compact(const MutableTensorView& tensor, const MutableTensorView&, std::size_t,
             const std::vector<std::int64_t>&) {
  refuse("tensor", tensor.device);
}

}  // namespace secateur::cuda
