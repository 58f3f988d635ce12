// Which kernels run: chosen once per process.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace secateur::cpu {

struct Kernels {
  const char* isa;
  const PanelKernels& panel;
  const GramKernels& gram;
  const ScoreKernels& score;
  const ScoreLanesKernels& score_lanes;
  const EliminateKernels& eliminate;
};

/// Throws InvalidArgument when SECATEUR_ISA names nothing that can run here.
const Kernels& kernels();

/// Built in and runnable here, narrowest first.
std::vector<std::string> available_isas();

}  // namespace secateur::cpu
