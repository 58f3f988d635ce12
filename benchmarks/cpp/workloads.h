// What is measured: each kernel, and each public function that is nothing but kernels.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace secateur_bench {

struct Workload {
  double flops = 0;     ///< additions and multiplications that the result needs, each counted
  double bytes = 0;     ///< that must be read and written, each once
  bool single = false;  ///< multiplied in float32
  std::function<void()> run;
  /// Whether what run() left agrees with plain loops in float64.
  std::function<bool()> correct;
};

/// Makes its data when it is made itself.
struct Maker {
  std::string name;
  std::function<Workload()> make;
};

/// On one thread; sizes are those of a ViT-Small at 224 pixels.
std::vector<Maker> workloads();

}  // namespace secateur_bench
