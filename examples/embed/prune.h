// What the programs that prune a model file share: all but where queries and keys come from.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "vit.h"

namespace embed {

struct Options {
  std::vector<std::string> files{};  ///< the model's first, that of the smaller one last
  std::string report{};
  Ratios ratios{0.5, 0, 0};
  std::int64_t gamma = 8;
  bool stream = false, verify = true;
};

/// files: what they are called where there are more or fewer. Throws secateur::InvalidArgument, as
/// every function here.
Options parse(const std::vector<std::string>& arguments, const std::vector<std::string>& files);

/// Scores of all blocks, asked for once and only where query/key neurons are to leave.
using ScoreQueryKey = std::function<Scores(const std::vector<Block>& blocks)>;
/// Writes the smaller model and the report, and prints what stays.
void prune(const Options& options, const ScoreQueryKey& score);

}  // namespace embed
